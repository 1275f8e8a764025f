"""LoRA: what learns and what does not, what is written, and that a resumed run is the uninterrupted one."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments

from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.trainer import LayerSkipTrainer, prepared

MakeModel = Callable[..., LlamaForCausalLM]
MakeBlocks = Callable[..., list[dict[str, Tensor]]]
MakeTrainer = Callable[..., LayerSkipTrainer]
ADAPTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def layerskip() -> LayerSkipArguments:
    """Adapters of rank 2, with layer dropout and all exits at every step."""
    return LayerSkipArguments(
        p_max=0.3, layer_dropout_schedule="constant", early_exit_curriculum="none", exit_weights="uniform", lora_rank=2
    )


@pytest.mark.parametrize(
    ("bf16", "checkpointing"),
    [(False, None), (True, {"use_reentrant": False}), (False, {"use_reentrant": True})],
)
def test_the_loss_falls_and_only_adapters_learn(
    tiny: MakeModel,
    tmp_path: Path,
    layerskip: LayerSkipArguments,
    bf16: bool,
    checkpointing: dict[str, bool] | None,
    make_blocks: MakeBlocks,
    make_trainer: MakeTrainer,
) -> None:
    model = tiny()
    before = deepcopy(model.state_dict())
    own = {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    trainer = make_trainer(
        model, tmp_path, make_blocks(8), layerskip, max_steps=12, bf16=bf16, learning_rate=3e-2, **own
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1
    learning = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-4] for name in learning} == ADAPTED
    assert all(".layers." in name and ".lora_" in name for name in learning)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_adapter_and_merged_model_are_written(
    tiny: MakeModel, tmp_path: Path, layerskip: LayerSkipArguments, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    blocks = make_blocks(6)
    trainer = make_trainer(tiny(torch.float64), tmp_path, blocks, layerskip, max_steps=5)
    trainer.train()
    ids_BT = torch.stack([block["input_ids"] for block in blocks])
    with torch.no_grad():
        trained = trainer.model.eval()(input_ids=ids_BT).logits
    trainer.save_trained()
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}
    adapted = PeftModel.from_pretrained(tiny(torch.float64), tmp_path / "adapter").eval()
    assert not torch.allclose(tiny(torch.float64)(ids_BT).logits, trained, atol=1e-2)
    torch.testing.assert_close(adapted(input_ids=ids_BT).logits, trained)
    torch.testing.assert_close(deepcopy(adapted).merge_and_unload()(ids_BT).logits, trained)
    expected = adapted.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in name for name in merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny: MakeModel,
    tmp_path: Path,
    layerskip: LayerSkipArguments,
    bf16: bool,
    make_blocks: MakeBlocks,
    make_trainer: MakeTrainer,
) -> None:
    own = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": bf16, "gradient_checkpointing": True}
    for name, start in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        trainer = make_trainer(tiny(), tmp_path / name, make_blocks(6), layerskip, **own)
        trainer.train(resume_from_checkpoint=start)
        trainer.save_trained()
    for file in ("checkpoint-4/adapter_model.safetensors", "checkpoint-4/optimizer.pt", "model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes(), file
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_anchor_keeps_the_model_near_what_it_was(
    tiny: MakeModel, tmp_path: Path, lora_rank: int, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    blocks = make_blocks(4)
    ids_BT = torch.stack([block["input_ids"] for block in blocks])
    before = tiny().model(ids_BT).last_hidden_state
    drifts = []
    for weight in (1e-9, 10.0):
        layerskip = LayerSkipArguments(
            p_max=0.5, lora_rank=lora_rank, exit_target="acceptance", anchor_weight=weight, acceptance_after=0.5
        )
        trainer = make_trainer(tiny(), tmp_path, blocks, layerskip, max_steps=10)
        trainer.train()
        assert torch.equal(trainer.early_exit_loss.anchor.states(ids_BT), before)
        with torch.no_grad():
            drifts.append((trainer.llama.eval().model(ids_BT).last_hidden_state - before).norm().item())
        learning = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert learning
        assert all(("lora_" in name) == bool(lora_rank) for name in learning)
    assert 0 < drifts[1] < 0.7 * drifts[0]


def test_a_run_begins_with_an_adapter_that_was_trained_before(
    tiny: MakeModel, tmp_path: Path, layerskip: LayerSkipArguments, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    blocks = make_blocks(6)
    ids_BT = torch.stack([block["input_ids"] for block in blocks])
    first = make_trainer(tiny(), tmp_path / "first", blocks, layerskip, max_steps=3, learning_rate=1e-2)
    first.train()
    with torch.no_grad():
        trained = first.model.eval()(input_ids=ids_BT).logits
    first.adapted.peft_config["default"].base_model_name_or_path = "runs/base"
    first.save_trained()
    going_on = replace(layerskip, lora_from=str(tmp_path / "first" / "adapter"))
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with torch.no_grad():
        torch.testing.assert_close(prepared(tiny(), training, going_on).eval()(input_ids=ids_BT).logits, trained)
    with pytest.raises(ValueError, match=r"adapter needs --lora_rank 2 --lora_alpha 16\.$"):
        prepared(tiny(), training, replace(going_on, lora_rank=3))
    with pytest.raises(ValueError, match=r"^--lora_from: .* is an adapter of another model, or of other matrices\.$"):
        prepared(tiny(num_hidden_layers=2), training, going_on)
    with pytest.raises(ValueError, match=r"^--lora_from: .* is no folder of an adapter\.$"):
        prepared(tiny(), training, replace(going_on, lora_from=str(tmp_path)))
    (tmp_path / "first" / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^--lora_from: .*safetensors is missing or damaged\.$"):
        prepared(tiny(), training, going_on)
    with pytest.raises(ValueError, match="--lora_from is an adapter to begin with, and needs --lora_rank"):
        LayerSkipArguments(lora_from="adapter")


def test_no_adapters_with_fsdp(tiny: MakeModel, tmp_path: Path, layerskip: LayerSkipArguments) -> None:
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    training.fsdp = "full_shard"
    with pytest.raises(ValueError, match="--lora_rank does not go with --fsdp"):
        prepared(tiny(), training, layerskip)
