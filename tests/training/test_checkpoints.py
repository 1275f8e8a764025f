"""Checkpoints: a resumed run is the uninterrupted one, and a crash or a full disk leaves the checkpoint before."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.checkpoints import (
    INCOMPLETE_FOLDER,
    checkpoint_to_resume,
    newest_checkpoint,
    record_to_begin,
    refuse_to_overwrite,
)
from self_speculation.training.packing import StreamedTexts
from self_speculation.training.run_record import RUN_FILE, RunRecord
from self_speculation.training.tokenizer import train_tokenizer
from self_speculation.training.trainer import LayerSkipTrainer

MakeModel = Callable[..., LlamaForCausalLM]
MakeBlocks = Callable[..., list[dict[str, Tensor]]]
MakeTrainer = Callable[..., LayerSkipTrainer]
CHECKPOINT_FILES = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(
    tiny: MakeModel, tmp_path: Path, muon: bool, accumulation: int, make_blocks: MakeBlocks, make_trainer: MakeTrainer
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
    assert_same(resumed.state_dict(), whole.state_dict())
    changed = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not torch.equal(changed["lm_head.weight"], whole.lm_head.weight)


def test_resumed_stream_goes_on_where_it_was(tiny: MakeModel, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"], 260)
    stream = StreamedTexts(lambda: (f"x = {number}\n" for number in range(50)), tokenizer, 8, separate=True)
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = tiny(), tiny(initializer_range=0.01)
    make_trainer(whole, tmp_path, stream, LayerSkipArguments(), **options).train()
    again = make_trainer(resumed, tmp_path, stream, LayerSkipArguments(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for step, _, _ in again.trace] == [2, 3, 4]
    assert_same(resumed.state_dict(), whole.state_dict())


def test_resuming_a_complete_run_trains_no_further(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    whole, resumed = tiny(), tiny(initializer_range=0.01)
    make_trainer(whole, tmp_path, make_blocks(10), LayerSkipArguments(), **options).train()
    again = make_trainer(resumed, tmp_path, make_blocks(10), LayerSkipArguments(), **options)
    again.train(resume_from_checkpoint=True)
    assert again.trace == []
    assert again.state.global_step == 4
    assert_same(resumed.state_dict(), whole.state_dict())


class CrashError(Exception):
    """The power fails."""


@pytest.mark.parametrize("place", ["torch.save", "os.replace"])
def test_crash_while_saving_leaves_the_checkpoint_before(
    tiny: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    make_blocks: MakeBlocks,
    make_trainer: MakeTrainer,
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
    assert_same(resumed.state_dict(), whole.state_dict())
    assert [folder.name for folder in output.iterdir()] == ["checkpoint-6"]


class FullDisk(TrainerCallback):
    """From the end of a step on, no file that is written can become longer than `free_bytes`."""

    def __init__(self, step: int, free_bytes: int) -> None:
        self.step = step
        self.free_bytes = free_bytes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.free_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def free_disk() -> Iterator[None]:
    """Give back at the end the room that `FullDisk` takes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_checkpoint_before(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
    """Of the checkpoint of step 4, the weights can be written, and the optimiser's states not whole."""
    layerskip = LayerSkipArguments(p_max=0.5, rotation_interval=2)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = tiny(), tiny(initializer_range=0.01)
    make_trainer(whole, tmp_path / "whole", make_blocks(10), layerskip, **options).train()
    full = tmp_path / "full"
    stopped = make_trainer(tiny(), full, make_blocks(10), layerskip, **options)
    stopped.add_callback(FullDisk(step=4, free_bytes=100_000))
    with free_disk(), pytest.raises((OSError, RuntimeError), match=r"(?i)file|write|pos"):
        stopped.train()
    assert {file.name for file in (full / INCOMPLETE_FOLDER / "checkpoint-4").glob("*.safetensors")}
    assert get_last_checkpoint(str(full)) == str(full / "checkpoint-2")
    second = make_trainer(resumed, full, make_blocks(10), layerskip, **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    assert_same(resumed.state_dict(), whole.state_dict())


def test_best_checkpoint_is_kept_and_loaded(
    tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks, make_trainer: MakeTrainer
) -> None:
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
    assert_same(model.state_dict(), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert {folder.name for folder in tmp_path.iterdir()} == {f"checkpoint-{best}", "checkpoint-4"}
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_newest_whole_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    def resumed(value: str | None) -> str | None:
        return checkpoint_to_resume(TrainingArguments(str(tmp_path), resume_from_checkpoint=value, use_cpu=True))

    assert (resumed(None), resumed("False"), resumed("True")) == (None, None, None)  # There is no checkpoint yet.
    for name in ("checkpoint-2", "checkpoint-10", f"{INCOMPLETE_FOLDER}/checkpoint-12"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").touch()
    assert resumed("True") == str(tmp_path / "checkpoint-10")
    assert resumed(str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    assert resumed("False") is None
    with pytest.raises(ValueError, match=r"^--resume_from_checkpoint: .* is not the folder of a checkpoint\.$"):
        resumed(str(tmp_path))


def make_checkpoint(folder: Path, record: RunRecord | None) -> Path:
    """A folder that looks like a checkpoint, of a run."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").touch()
    if record:
        record.write(folder)
    return folder


def test_checkpoints_of_another_run_are_never_taken(tmp_path: Path) -> None:
    own, other = (RunRecord({"seed": seed}, {"texts": "a"}).named() for seed in (1, 2))
    make_checkpoint(tmp_path / "checkpoint-10", other)
    make_checkpoint(tmp_path / "checkpoint-20", None)
    own.write(tmp_path)
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"holds an earlier run \(checkpoint-10\) without a checkpoint of its own"):
        refuse_to_overwrite(tmp_path, None)
    make_checkpoint(tmp_path / "checkpoint-4", own)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    other.write(tmp_path)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_run_that_went_on_from_another_is_gone_on_with(tmp_path: Path) -> None:
    """Killed before its first checkpoint: from where it began, and not from a newer one of the run before."""
    before, now = (RunRecord({"seed": seed}, {"texts": "a"}) for seed in (1, 2))
    began = str(make_checkpoint(tmp_path / "checkpoint-2", before.named()))
    make_checkpoint(tmp_path / "checkpoint-3", before.named())
    before.named().write(tmp_path)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-2: its run had --seed 1, not 2; --resume_changed True"):
        record_to_begin(tmp_path, began, now, resume_changed=False)
    begun = record_to_begin(tmp_path, began, now, resume_changed=True)
    assert begun.goes_on_from == "checkpoint-2"
    begun.write(tmp_path)
    assert newest_checkpoint(tmp_path) == began
    assert record_to_begin(tmp_path, began, now, resume_changed=False) == begun
    shutil.rmtree(began)
    with pytest.raises(ValueError, match=r"^--resume_from_checkpoint: checkpoint-2, with which .* began, is gone\.$"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_without_a_record_is_not_known(tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint-2", None))
    now = RunRecord({}, {})
    with pytest.raises(ValueError, match=f"its run left no {RUN_FILE} to know it by; --resume_changed True goes on"):
        record_to_begin(tmp_path, checkpoint, now, resume_changed=False)
    assert record_to_begin(tmp_path, checkpoint, now, resume_changed=True).goes_on_from == "checkpoint-2"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"arguments": 1, "contents": 2}', '{"bogus": 1}', '{"argu'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{RUN_FILE} is damaged; delete it"):
        newest_checkpoint(tmp_path)
