"""Training: learning, accumulation, what dropout and loss are told, and the model afterwards."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.measuring.exit_report import evaluate_exits
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.trainer import LayerSkipTrainer

MakeModel = Callable[..., LlamaForCausalLM]
MakeBlocks = Callable[..., list[dict[str, Tensor]]]
MakeTrainer = Callable[..., LayerSkipTrainer]


@pytest.mark.parametrize("bf16", [False, True])
def test_loss_falls_at_every_exit(
    tiny: MakeModel, tmp_path: Path, bf16: bool, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    model = tiny()
    blocks = make_blocks(8)
    before = evaluate_exits(model, blocks, 8)["loss"]
    layerskip = LayerSkipArguments(p_max=0.2, exit_weights="uniform", e_scale=1.0, early_exit_curriculum="none")
    trainer = make_trainer(model, tmp_path, blocks, layerskip, max_steps=40, bf16=bf16, learning_rate=3e-2)
    trainer.train()
    after = evaluate_exits(model, blocks, 8)["loss"]
    assert (after < before - 1).all()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5]) - 5


def test_accumulated_batches_equal_one_large_batch(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    blocks = make_blocks(6, ignored=True)  # Micro-batches of different numbers of labels.
    layerskip = LayerSkipArguments(p_max=0.0, rotation_interval=2)
    ends = []
    for batch_size, accumulation in [(4, 1), (2, 2), (1, 4)]:
        model = tiny(torch.float64)
        start = deepcopy(model.state_dict())
        trainer = make_trainer(
            model,
            tmp_path,
            blocks,
            layerskip,
            max_steps=3,  # The epoch's second step has only 2 blocks.
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        assert max((model.state_dict()[name] - start[name]).abs().max() for name in start) > 1e-2
        ends.append(model.state_dict())
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ends[2][name], expected, rtol=0, atol=1e-6)


def test_steps_and_micro_batches_are_told_to_dropout_and_loss(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    # 5 batches an epoch, 2 a step: the third step of an epoch has one.
    trainer = make_trainer(
        tiny(), tmp_path, make_blocks(10), LayerSkipArguments(), max_steps=5, gradient_accumulation_steps=2
    )
    expected = [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 2), (3, 0, 3), (3, 1, 3), (4, 0, 4), (4, 1, 4)]
    trainer.train()
    assert trainer.trace == expected
    trainer.trace.clear()
    trainer.train()  # Once more, from the start.
    assert trainer.trace == expected


def test_schedules_know_the_number_of_steps(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    layerskip = LayerSkipArguments(early_exit_curriculum="gradual")
    by_epochs = make_trainer(
        tiny(), tmp_path, make_blocks(10), layerskip, num_train_epochs=2, gradient_accumulation_steps=2
    )
    by_epochs.train()
    assert by_epochs.state.global_step == 6
    assert by_epochs.dropout.rates.num_steps == by_epochs.early_exit_loss.schedule.num_steps == 6
    by_steps = make_trainer(tiny(), tmp_path, make_blocks(10), layerskip, max_steps=4)
    assert by_steps.dropout.rates.num_steps == by_steps.early_exit_loss.schedule.num_steps == 4
    with pytest.raises(ValueError, match="--max_steps"):
        make_trainer(tiny(), tmp_path, make_blocks(10), layerskip, max_steps=0)


def test_the_trainer_wires_the_arguments(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    layerskip = LayerSkipArguments(
        p_max=0.3,
        layer_dropout_schedule="decreasing",
        layer_dropout_depth="linear",
        layer_dropout_rescale=True,
        e_scale=0.5,
        early_exit_curriculum="gradual",
        rotation_interval=2,
        strict_rotation=True,
        exit_weights="uniform",
        exit_layers=[2],
        exit_target="last_layer",
        loss_chunk_tokens=77,
    )
    trainer = make_trainer(tiny(), tmp_path, make_blocks(4), layerskip, max_steps=8, seed=9)
    rates, schedule = trainer.dropout.rates, trainer.early_exit_loss.schedule
    assert (rates.p_max, rates.num_layers, rates.schedule, rates.depth) == (0.3, 3, "decreasing", "linear")
    assert (trainer.dropout.seed, trainer.dropout.rescale) == (9, True)
    assert (schedule.num_layers, schedule.exit_layers, schedule.curriculum) == (3, (2, 3), "gradual")
    assert (schedule.rotation_interval, schedule.strict_rotation) == (2, True)
    assert (schedule.weights, schedule.e_scale, trainer.early_exit_loss.target) == ("uniform", 0.5, "last_layer")
    assert trainer.early_exit_loss.chunk_tokens == 77


def test_after_training_the_model_is_a_plain_one_again(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    model = tiny()
    trainer = make_trainer(model, tmp_path, make_blocks(4), LayerSkipArguments(p_max=1.0), max_steps=1)
    inside = []
    watch = model.register_forward_pre_hook(lambda *_: inside.append("forward" in model.__dict__))
    trainer.train()
    watch.remove()
    assert inside == [True]
    assert "forward" not in model.__dict__
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    model.register_forward_pre_hook(crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "forward" not in model.__dict__
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_compiled_layers_learn_the_same(
    tiny: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    compile_, compiled = torch.compile, []

    def eager_backend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled.append(function)
        return compile_(function, backend="eager")

    monkeypatch.setattr(torch, "compile", eager_backend)
    ends = []
    for compile_layers in (False, True):
        model = tiny()
        layerskip = LayerSkipArguments(p_max=0.5, layer_dropout_schedule="constant", compile_layers=compile_layers)
        make_trainer(model, tmp_path, make_blocks(6), layerskip, max_steps=3).train()
        ends.append(model.state_dict())
        assert len(compiled) == 3 * compile_layers
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected)


@pytest.mark.slow
def test_training_needs_no_table_and_no_picture() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('pandas', 'matplotlib', 'datasets')))"
    code += "; import self_speculation.training.trainer"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)
