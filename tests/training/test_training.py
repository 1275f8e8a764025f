"""Training: learning, accumulation, resuming, checkpoints that survive a crash, texts, and train.py itself."""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from self_speculation.commands import train
from self_speculation.decoding.draft_head import COUNTS_FILE
from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.texts import read_texts, split_held_out
from self_speculation.training.exit_measures import evaluate_exits
from self_speculation.training.muon import MuonWithAdamW
from self_speculation.training.packing import PackedTexts, StreamedTexts, train_tokenizer
from self_speculation.training.trainer import INCOMPLETE_FOLDER, LayerSkipArguments, LayerSkipTrainer

MakeModel = Callable[..., LlamaForCausalLM]
Blocks = list[dict[str, Tensor]]
CHECKPOINT_FILES = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


class RecordingTrainer(LayerSkipTrainer):
    """Notes where every forward pass of training is: step, micro-batch, and the loss's step."""

    def compute_loss(self, *args: object, **kwargs: object) -> Tensor:
        self.trace.append((self.dropout.step, self.dropout.micro_batch, self.early_exit_loss.step))
        return super().compute_loss(*args, **kwargs)


def make_blocks(num_blocks: int, ignored: bool = False) -> Blocks:
    """Random blocks of 8 tokens out of 20; with `ignored`, block n has n of its labels left out."""
    draws = torch.Generator().manual_seed(3)
    blocks = []
    for number in range(num_blocks):
        ids_T = torch.randint(20, (8,), generator=draws)
        labels_T = ids_T.clone()
        labels_T[1 : 1 + number * ignored] = -100
        blocks.append({"input_ids": ids_T, "labels": labels_T})
    return blocks


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """Each run of the Trainer collects garbage: leave out what was imported before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tiny(make_model: MakeModel) -> Callable[..., LlamaForCausalLM]:
    """A function that makes a model of 3 layers of width 16, in float32 unless told otherwise."""

    def make(dtype: torch.dtype = torch.float32, **overrides: object) -> LlamaForCausalLM:
        fields = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return make_model(**fields | overrides).to(dtype)

    return make


def make_trainer(
    model: LlamaForCausalLM, output_dir: Path, blocks: Blocks, layerskip: LayerSkipArguments, **overrides: object
) -> RecordingTrainer:
    fields = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
    }
    training = TrainingArguments(output_dir=str(output_dir), **fields | overrides)
    trainer = RecordingTrainer(
        model,
        training,
        train_dataset=blocks,
        eval_dataset=blocks,
        data_collator=default_data_collator,
        layerskip=layerskip,
    )
    trainer.trace = []
    return trainer


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("bf16", [False, True])
def test_loss_falls_at_every_exit(tiny: MakeModel, tmp_path: Path, bf16: bool) -> None:
    model = tiny()
    blocks = make_blocks(8)
    held = PackedBlocks(blocks)
    before = evaluate_exits(model, held, 8)["loss"]
    layerskip = LayerSkipArguments(p_max=0.2, exit_weights="uniform", e_scale=1.0, early_exit_curriculum="none")
    trainer = make_trainer(model, tmp_path, blocks, layerskip, max_steps=40, bf16=bf16, learning_rate=3e-2)
    trainer.train()
    after = evaluate_exits(model, held, 8)["loss"]
    assert (after < before - 1).all()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5]) - 5


class PackedBlocks(PackedTexts):
    """Blocks given as they are."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = torch.stack([block["input_ids"] for block in blocks]).int()
        self.is_first = torch.zeros(self.blocks.shape, dtype=torch.bool)
        self.separate = False


def test_accumulated_batches_equal_one_large_batch(tiny: MakeModel, tmp_path: Path) -> None:
    blocks = make_blocks(6, ignored=True)  # Micro-batches of different numbers of labels.
    layerskip = LayerSkipArguments(p_max=0.0, rotation_interval=2)
    ends = []
    for batch_size, accumulation in [(4, 1), (2, 2), (1, 4)]:
        model = tiny(torch.float64)
        start = weights(model)
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
        assert max((weights(model)[name] - start[name]).abs().max() for name in start) > 1e-2
        ends.append(weights(model))
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ends[2][name], expected, rtol=0, atol=1e-6)


def test_steps_and_micro_batches_are_told_to_dropout_and_loss(tiny: MakeModel, tmp_path: Path) -> None:
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


def test_schedules_know_the_number_of_steps(tiny: MakeModel, tmp_path: Path) -> None:
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


def test_the_trainer_wires_the_arguments(tiny: MakeModel, tmp_path: Path) -> None:
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


def test_after_training_the_model_is_a_plain_one_again(tiny: MakeModel, tmp_path: Path) -> None:
    model = tiny()
    trainer = make_trainer(model, tmp_path, make_blocks(4), LayerSkipArguments(p_max=1.0), max_steps=1)
    inside = []
    trainer.compute_loss = lambda *args, **kwargs: (
        inside.append("forward" in model.__dict__) or RecordingTrainer.compute_loss(trainer, *args, **kwargs)
    )
    trainer.train()
    assert inside == [True]
    assert "forward" not in model.__dict__
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    trainer.compute_loss = crash
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "forward" not in model.__dict__
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(
    tiny: MakeModel, tmp_path: Path, muon: bool, accumulation: int
) -> None:
    # 5 batches an epoch. With two a step, the checkpoint of step 4 falls behind the first step of the second epoch.
    layerskip = LayerSkipArguments(p_max=0.5, rotation_interval=2, muon=muon)
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": accumulation}
    whole, resumed = tiny(), tiny(initializer_range=0.01)
    first = make_trainer(whole, tmp_path, make_blocks(10), layerskip, **options)
    first.train()
    second = make_trainer(resumed, tmp_path, make_blocks(10), layerskip, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.trace == [entry for entry in first.trace if entry[0] >= 4]
    assert_same(weights(resumed), weights(whole))
    changed = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not torch.equal(changed["lm_head.weight"], whole.lm_head.weight)


def test_resumed_stream_goes_on_where_it_was(tiny: MakeModel, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"], 260)
    stream = StreamedTexts(lambda: (f"x = {number}\n" for number in range(50)), tokenizer, 8, separate=True)
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = tiny(), tiny(initializer_range=0.01)
    make_trainer(whole, tmp_path, stream, LayerSkipArguments(), **options).train()
    again = make_trainer(resumed, tmp_path, stream, LayerSkipArguments(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for step, _, _ in again.trace] == [2, 3, 4]
    assert_same(weights(resumed), weights(whole))


def test_resuming_a_complete_run_trains_no_further(tiny: MakeModel, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    whole, resumed = tiny(), tiny(initializer_range=0.01)
    make_trainer(whole, tmp_path, make_blocks(10), LayerSkipArguments(), **options).train()
    again = make_trainer(resumed, tmp_path, make_blocks(10), LayerSkipArguments(), **options)
    again.train(resume_from_checkpoint=True)
    assert again.trace == []
    assert again.state.global_step == 4
    assert_same(weights(resumed), weights(whole))


class CrashError(Exception):
    """The power fails."""


@pytest.mark.parametrize("place", ["torch.save", "os.replace"])
def test_crash_while_saving_leaves_the_checkpoint_before(
    tiny: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    layerskip = LayerSkipArguments(p_max=0.5, rotation_interval=2)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    whole = tiny()
    make_trainer(whole, tmp_path / "whole", make_blocks(10), layerskip, **options).train()

    original = {"torch.save": torch.save, "os.replace": os.replace}[place]

    def failing(*args: object, **kwargs: object) -> object:
        if any(f"checkpoint-4{os.sep}" in f"{argument}{os.sep}" for argument in args):
            raise CrashError
        return original(*args, **kwargs)

    output = tmp_path / "crashed"
    with monkeypatch.context() as patch:
        patch.setattr(place, failing)
        with pytest.raises(CrashError):
            make_trainer(tiny(), output, make_blocks(10), layerskip, **options).train()
    assert get_last_checkpoint(output) == str(output / "checkpoint-2")
    assert {file.name for file in (output / "checkpoint-2").iterdir()} >= CHECKPOINT_FILES
    assert any((output / INCOMPLETE_FOLDER).rglob("*.safetensors"))  # The crash came in the middle.

    resumed = tiny(initializer_range=0.01)
    second = make_trainer(resumed, output, make_blocks(10), layerskip, **options)
    second.train(resume_from_checkpoint=True)
    assert [step for step, _, _ in second.trace] == [2, 3, 4, 5]
    assert_same(weights(resumed), weights(whole))
    assert [folder.name for folder in output.iterdir()] == ["checkpoint-6"]


def test_best_checkpoint_is_kept_and_loaded(tiny: MakeModel, tmp_path: Path) -> None:
    model = tiny()
    trainer = make_trainer(
        model,
        tmp_path,
        make_blocks(4),
        LayerSkipArguments(),
        max_steps=4,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # So that the best checkpoint is an early one.
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert best < 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert_same(weights(model), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert {folder.name for folder in tmp_path.iterdir()} == {f"checkpoint-{best}", "checkpoint-4"}
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_muon_with_adamw_round_trip(tiny: MakeModel, tmp_path: Path) -> None:
    def optimiser(model: LlamaForCausalLM) -> MuonWithAdamW:
        return MuonWithAdamW(model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))

    def update(model: LlamaForCausalLM, optimizer: MuonWithAdamW) -> None:
        ids_BT = make_blocks(1)[0]["input_ids"][None]
        model(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = tiny()
    optimizer = optimiser(model)
    update(model, optimizer)
    update(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copy = tiny()
    copy.load_state_dict(model.state_dict())
    loaded = optimiser(copy)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    before = weights(model)
    update(model, optimizer)
    update(copy, loaded)
    assert_same(weights(copy), weights(model))
    fresh = tiny()
    fresh.load_state_dict(before)
    update(fresh, optimiser(fresh))
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(fresh.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    # A schedule that changes the groups' learning rate reaches both parts, before and after loading.
    for changed, its_model in ((optimizer, model), (loaded, copy)):
        before = weights(its_model)
        for group in changed.param_groups:
            group["lr"] = 0.0
        update(its_model, changed)
        assert_same(weights(its_model), before)


def test_muon_takes_the_layers_matrices_and_adamw_the_rest(tiny: MakeModel) -> None:
    model = tiny(tie_word_embeddings=True)
    optimizer = MuonWithAdamW(model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert adamw == {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{layer}.{norm}_layernorm.weight" for layer in range(3) for norm in ("input", "post_attention")
    }
    assert len(muon) == 3 * 7
    assert muon | adamw == set(names.values())
    assert [group["params"] for group in optimizer.param_groups] == [
        part.param_groups[0]["params"] for part in optimizer.parts
    ]


def test_compiled_layers_learn_the_same(tiny: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ends.append(weights(model))
        assert len(compiled) == 3 * compile_layers
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("p_max", -0.1),
        ("p_max", 1.5),
        ("p_max", float("nan")),
        ("e_scale", -1.0),
        ("e_scale", float("nan")),
        ("rotation_interval", 0),
        ("loss_chunk_tokens", 0),
    ],
)
def test_bad_arguments_are_refused_by_name(flag: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^--{flag} .*\.$"):
        LayerSkipArguments(**{flag: value})


def test_exits_are_sorted_checked_and_end_with_the_last() -> None:
    assert LayerSkipArguments().exits(3) == (1, 2, 3)
    assert LayerSkipArguments(exit_layers=[4, 2, 4]).exits(6) == (2, 4, 6)
    assert LayerSkipArguments(exit_layers=[6]).exits(6) == (6,)
    for wrong in (0, 7, -1):
        with pytest.raises(ValueError, match=rf"^--exit_layers .* 1 and 6, not {wrong}\.$"):
            LayerSkipArguments(exit_layers=[2, wrong]).exits(6)


NASTY_TEXTS = [
    "",
    " ",
    "\n\n\t\t  \r\n \r",
    "  leading and trailing  ",
    "a\u00a0b\u2028c\u3000d\x0b\x0c\x1c\x85e",
    "\x00\x01\x7f\ufeff",
    "e\u0301 \u200d\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "مرحبا ١٢٣ हिन्दी ไทย 漢字かな",
    "1234567 0.5e-10 0x_ff",
    "    def f(x):\n        return x  # comment\n\n\n",
    "Ġ Ċ ## ▁ <unk> <0x0A> < s>",
    "\U0010ffff\ue000",
]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_keeps_special_tokens_in_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("<s>", "a</s>b", " <s> </s> "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_learns_pieces_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["def foo(x):\n    return x + 1\n"] * 5, 275)
    assert len(tokenizer) == 275
    text = "def foo(y):\n    return y\n"
    ids = tokenizer(text)["input_ids"]
    # A word takes the space before it, a line break the indentation after it.
    pieces = ["<s>", "def", " foo", "(", "y", "):", "\n    ", "return", " ", "y", "\n"]
    assert [tokenizer.decode([token]) for token in ids] == pieces
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


def test_texts_are_packed_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["漢", "", "b 7"]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    stream = [*alone[0], 1, *alone[1], 1, *alone[2], 1]
    assert stream.count(0) == 3
    packed = PackedTexts(texts, tokenizer, block_size=4)
    assert len(packed) == len(stream) // 4 == 3
    assert packed.blocks.tolist() == [stream[0:4], stream[4:8], stream[8:12]][: len(packed)]
    item = packed[1]
    assert item["input_ids"].tolist() == stream[4:8]
    assert item["input_ids"].dtype == torch.int64
    assert PackedTexts(texts, tokenizer, 4, max_blocks=2).blocks.tolist() == [stream[0:4], stream[4:8]]
    assert len(PackedTexts(texts, tokenizer, 4, max_blocks=99)) == 3
    assert PackedTexts(texts, tokenizer, len(stream)).blocks.tolist() == [stream]


def test_too_little_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^The text has 3 tokens, fewer than one block of 4 \(--block_size\)\.$"):
        PackedTexts(["b"], tokenizer, block_size=4)
    with pytest.raises(ValueError, match=r"^The text has 0 tokens"):
        PackedTexts([], tokenizer, block_size=4)
    without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"^--tokenizer has no end-of-sequence token"):
        PackedTexts(["some text"], without_end, block_size=4)


def test_evaluate_exits_equals_the_models_cut_at_each_exit(tiny: MakeModel) -> None:
    model = tiny(torch.float64)
    blocks = PackedBlocks(make_blocks(5))
    table = evaluate_exits(model.train(), blocks, batch_size=2)
    assert not model.training
    assert table["exit_layer"].tolist() == [1, 2, 3]
    ids_BT = blocks.blocks.long()
    layers = model.model.layers
    last_BT = model(ids_BT).logits[:, :-1].argmax(-1)
    for exit_layer in (1, 2, 3):
        model.model.layers, model.config.num_hidden_layers = layers[:exit_layer], exit_layer
        outputs = model(ids_BT, labels=ids_BT)
        assert table["loss"][exit_layer - 1] == pytest.approx(outputs.loss.item(), rel=1e-5)
        agreement = (outputs.logits[:, :-1].argmax(-1) == last_BT).double().mean().item()
        assert table["agreement"][exit_layer - 1] == pytest.approx(agreement, abs=1e-6)
    assert table["agreement"][2] == 1
    assert 0 < table["agreement"][1] < 1


def test_texts_come_from_files_and_json_lines(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep" / "skipped").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "deep" / "b.txt").write_text("second")
    (folder / "deep" / "skipped" / "c.txt").write_text("skipped")
    (folder / "blank.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "rows.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "more": 1}\n')
    texts = read_texts(TextArguments(data_path=[str(folder)], exclude=["skipped"]))
    assert texts == {
        "texts/a.txt": "first",
        "texts/deep/b.txt": "second",
        "texts/rows.jsonl:1": "third",
        "texts/rows.jsonl:3": "fourth",
    }
    only = read_texts(TextArguments(data_path=[str(folder)], file_pattern="b.*"))
    assert only == {"texts/deep/b.txt": "second"}
    one = read_texts(TextArguments(data_path=[str(folder / "a.txt"), str(folder / "deep" / "b.txt")]))
    assert list(one.values()) == ["first", "second"]


def test_files_of_one_name_in_two_folders_are_both_read(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number) / "texts").mkdir(parents=True)
        (tmp_path / str(number) / "texts" / "a.txt").write_text(f"text {number}")
        (tmp_path / str(number) / "texts" / "rows.jsonl").write_text(f'{{"text": "row {number}"}}\n')
    texts = read_texts(TextArguments(data_path=[str(tmp_path / "1" / "texts"), str(tmp_path / "2" / "texts")]))
    assert sorted(texts.values()) == ["row 1", "row 2", "text 1", "text 2"]


def test_held_out_texts_are_a_seeded_share() -> None:
    texts = {f"{number:02}": f"text {number}" for number in range(20)}
    training, held_out = split_held_out(texts, 0.25, seed=1)
    assert len(held_out) == 5
    assert sorted(training + held_out) == sorted(texts.values())
    assert split_held_out(dict(reversed(texts.items())), 0.25, seed=1) == (training, held_out)
    assert split_held_out(texts, 0.25, seed=2)[1] != held_out
    assert len(split_held_out(texts, 0.001, seed=1)[1]) == 1
    with pytest.raises(ValueError, match=r"^--data_path holds 1 text"):
        split_held_out({"a": "text"}, 0.5, seed=1)


@pytest.fixture
def texts_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 8)
    return folder


@pytest.fixture
def run(texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """A function that runs `train.main` with a tiny model, and says from what checkpoints it was resumed."""

    def main(*flags: str) -> list[object]:
        own = (
            train_flags(tmp_path)
            if {"--data_path", "--hub_dataset", "--dataset"} & set(flags)
            else [*train_flags(tmp_path), "--data_path", str(texts_folder)]
        )
        monkeypatch.setattr(sys, "argv", ["train.py", *own, *flags])
        resumed = []
        original = LayerSkipTrainer.train
        monkeypatch.setattr(
            LayerSkipTrainer,
            "train",
            lambda trainer, resume_from_checkpoint: (
                resumed.append(resume_from_checkpoint) or original(trainer, resume_from_checkpoint)
            ),
        )
        train.main()
        return resumed

    return main


def train_flags(tmp_path: Path) -> list[str]:
    return (
        f"--output_dir {tmp_path}/out --vocab_size 270 --block_size 16 --num_layers 2 --hidden_size 16 "
        "--intermediate_size 24 --num_heads 2 --num_kv_heads 1 --max_steps 3 --save_steps 2 --eval_blocks 4 "
        f"--per_device_train_batch_size 2 --use_cpu True --report_to none --held_out 0.2 --rotation_interval 2 "
        f"--token_cache {tmp_path}/tokens --recommend_tokens 4 --recommend_samples 1"
    ).split()


def test_main_trains_resumes_and_writes_what_transformers_loads(
    run: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run("--resume_from_checkpoint", "True") == [None]  # There is no checkpoint yet.
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (2, 270)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    ids_BT = tokenizer("def f1(x):", return_tensors="pt").input_ids
    assert model.generate(ids_BT, max_new_tokens=3, do_sample=False).shape[1] > ids_BT.shape[1]
    table = pd.read_csv(output / "exits.csv")
    assert table["exit_layer"].tolist() == [1, 2]
    assert table["agreement"].tolist()[1] == 1
    assert table["loss"].between(0, 10).all()
    assert (output / "exits.png").read_bytes().startswith(b"\x89PNG")
    advice = json.loads((output / "layerskip.json").read_text())
    assert (output / COUNTS_FILE).is_file()
    said = capsys.readouterr().out
    assert "exit_layer" in said
    last_line = said.splitlines()[-1]
    assert last_line.startswith(f"Loss {table['loss'][1]:.3f} (perplexity {table['perplexity'][1]:.2f}), agreement")
    assert f"exit layer 1 with {advice['num_speculations']} drafts recommended; saved in {output}." in last_line
    assert {folder.name for folder in output.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-3"}

    whole = (output / "model.safetensors").read_bytes()
    for value, resumed in (("True", "checkpoint-3"), (str(output / "checkpoint-2"), "checkpoint-2")):
        assert run("--resume_from_checkpoint", value) == [str(output / resumed)]
        assert (output / "model.safetensors").read_bytes() == whole
    shutil.rmtree(output / "checkpoint-3")
    (output / INCOMPLETE_FOLDER / "checkpoint-3").mkdir(parents=True)
    assert run("--resume_from_checkpoint", "True") == [str(output / "checkpoint-2")]
    assert (output / "model.safetensors").read_bytes() == whole


def test_main_goes_on_from_a_model(run: Callable[..., list[object]], tmp_path: Path) -> None:
    run("--num_train_epochs", "1", "--max_steps", "-1", "--save_strategy", "no")
    first = load_file(tmp_path / "out" / "model.safetensors")
    flags = ["--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "second"), "--learning_rate", "1e-30"]
    run(*flags, "--num_layers", "7", "--vocab_size", "999")
    assert_same(load_file(tmp_path / "second" / "model.safetensors"), first)


def test_main_evaluates_alone(
    run: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--save_strategy", "no")
    trained, said = pd.read_csv(tmp_path / "out" / "exits.csv"), capsys.readouterr().out.splitlines()[-1]
    flags = ["--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "scores"), "--do_eval", "True"]
    assert run(*flags) == []
    scores = pd.read_csv(tmp_path / "scores" / "exits.csv")
    assert scores["exit_layer"].tolist() == [1, 2]
    # The saved model is rounded to bfloat16.
    assert scores["loss"].tolist() == pytest.approx(trained["loss"].tolist(), rel=1e-2)
    assert {file.name for file in (tmp_path / "scores").iterdir()} == {"exits.csv", "exits.png"}
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("Loss ")
    assert "recommended" in said
    assert "recommended" not in last_line
    # While training goes on, and then trains.
    assert run("--do_eval", "True", "--do_train", "True", "--save_strategy", "no") == [None]


def test_main_finetunes_on_responses(run: Callable[..., list[object]], tmp_path: Path) -> None:
    rows = [
        {"domain": "alarm", "utterance": f"wake me at {number}", "semantic_parse": f"[IN:WAKE {number} ]"}
        for number in range(8)
    ]
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--recipe", "finetune_topv2_1.5b", "--data_path", str(tmp_path), "--bf16", "False", "--max_steps", "2"]
    run(*flags, "--block_size", "128", "--e_scale", "0.5", "--save_strategy", "no")
    assert len(pd.read_csv(tmp_path / "out" / "exits.csv")) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 270


def test_main_trains_a_given_configuration_on_a_stream(
    run: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    run("--save_strategy", "no", "--max_steps", "1")
    (tmp_path / "hub").mkdir()
    rows = [json.dumps({"text": f"def f{number}(x):\n    return x + {number}\n"}) for number in range(40)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(rows))
    flags = ["--hub_dataset", str(tmp_path / "hub"), "--streaming", "True", "--tokenizer", str(tmp_path / "out")]
    flags += ["--config", str(tmp_path / "out" / "config.json"), "--output_dir", str(tmp_path / "second")]
    run(*flags, "--hidden_size", "48", "--num_layers", "5", "--stream_held_out", "5", "--save_strategy", "no")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "second").config
    assert (config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (2, 16, True)
    with pytest.raises(SystemExit):
        run(*flags, "--max_steps", "-1")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --max_steps must be given with --streaming")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--bogus 1", "--bogus"),
        ("--max_steps many", "--max_steps"),
        ("--max_steps 0", "--max_steps"),
        ("--p_max 2", "--p_max"),
        ("--held_out 0", "--held_out"),
        ("--exit_layers 1 3", "--exit_layers"),
        ("--early_exit_curriculum circular", "--early_exit_curriculum"),
        ("--block_size 1", "--block_size"),
        ("--block_size 5000", "--block_size"),
        ("--num_layers 0", "--num_layers"),
        ("--hidden_size 18", "--hidden_size"),
        ("--num_heads 3 --hidden_size 18 --num_kv_heads 2", "--num_heads"),
        ("--data_path {tmp}/nowhere", "--data_path: {tmp}/nowhere"),
        ("--data_path {tmp}/empty", "--data_path"),
        ("--data_path {tmp}/broken.jsonl", "{tmp}/broken.jsonl:2"),
        ("--data_path {tmp}/array.jsonl", "{tmp}/array.jsonl:1"),
        ("--data_path {tmp}/other.jsonl", "{tmp}/other.jsonl:1"),
        ("--file_pattern *.txt", "--data_path"),
        ("--file_pattern /abs", "--file_pattern"),
        ("--model {tmp}/nowhere", "--model: {tmp}/nowhere"),
        ("--config {tmp}/nowhere", "--config: {tmp}/nowhere"),
        ("--config {tmp}/empty --model {tmp}/empty", "--config"),
        ("--recommend_samples -1", "--recommend_samples"),
        ("--recommend_tokens 0", "--recommend_tokens"),
        ("--hub_dataset {tmp}/nowhere", "--hub_dataset: {tmp}/nowhere"),
        ("--dataset human_eval", "--dataset human_eval"),
        ("--tokenizer {tmp}/empty", "--tokenizer: {tmp}/empty"),
        ("--resume_from_checkpoint {tmp}/empty", "--resume_from_checkpoint: {tmp}/empty"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, named: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": "bad\n')
    (tmp_path / "array.jsonl").write_text('["text"]\n')
    (tmp_path / "other.jsonl").write_text('{"content": "text"}\n')
    with pytest.raises(SystemExit) as exit_info:
        run(*flags.format(tmp=tmp_path).split())
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:]
    assert named.format(tmp=tmp_path) in errors[0]
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_missing_data_path_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as exit_info:
        train.main()
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--data_path" in line
