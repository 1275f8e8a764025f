"""Checkpoints that are whole or absent, what a run goes on from, and the trained model's folder."""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from self_speculation.exit_adapter import adapter_of
from self_speculation.pretrained import is_finite
from self_speculation.training.lora import adapter_tensors, merged, save_adapter
from self_speculation.training.run_record import RUN_FILE, RunRecord, read_record
from self_speculation.training.whole_files import whole_files

if TYPE_CHECKING:
    from peft import PeftModel

INCOMPLETE_FOLDER = "incomplete-checkpoint"
LOWER = "a lower rate may train, unless numbers overflow in --model's own weights"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names: a checkpoint's folder, or True for the newest one, if there is one yet."""
    value = training.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() == "true":
        return newest_checkpoint(output_dir_of(training))
    if not Path(value, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint: {value} is not the folder of a checkpoint.")
    return value


def output_dir_of(training: TrainingArguments) -> Path:
    """`--output_dir`, to which transformers gives a name where the user gives none."""
    return Path(cast(str, training.output_dir))


def newest_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint of the run in a folder, or what that run began with; never another run's.

    In a folder without a record of its run, the newest of all.

    Raises:
        ValueError: what the run began with is gone.
    """
    record = read_record(output_dir)
    if not record:
        return get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    own = {int(path.name.rpartition("-")[2]): path for path in _checkpoints(output_dir) if _run_of(path) == record.run}
    if own:
        return str(own[max(own)])
    if record.goes_on_from and not Path(output_dir, record.goes_on_from, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint: {record.goes_on_from}, with which {output_dir} began, is gone.")
    return str(output_dir / record.goes_on_from) if record.goes_on_from else None


def refuse_to_overwrite(output_dir: Path, checkpoint: str | None) -> None:
    """Refuse a folder that holds another run than the one to be gone on with, if any is.

    Raises:
        ValueError: names the folder, what it holds, and the flags to go on with.
    """
    held = next(chain(model_files(output_dir), _checkpoints(output_dir)), None)
    newest = newest_checkpoint(output_dir)
    if not held or (checkpoint and (lies_in(checkpoint, output_dir) or newest == checkpoint)):
        return
    sentence = f"--output_dir: {output_dir} holds an earlier run ({held.name})"
    if newest:
        raise ValueError(f"{sentence}; give --resume_from_checkpoint True to go on with it, or another --output_dir.")
    raise ValueError(f"{sentence} without a checkpoint of its own to go on from; give another --output_dir.")


def record_to_begin(output_dir: Path, checkpoint: str | None, now: RunRecord, resume_changed: bool) -> RunRecord:
    """The record that a run begins with: that of the run it goes on with, or a new one.

    Raises:
        ValueError: the run to be gone on with was another, by its record or for want of one.
    """
    if checkpoint is None:
        return now.named()
    is_inside = lies_in(checkpoint, output_dir)
    place = Path(checkpoint).name if is_inside else str(Path(checkpoint).resolve())
    here = read_record(output_dir)
    recorded = here if here and here.goes_on_from == place else read_record(Path(checkpoint))
    difference = recorded.difference(now) if recorded else f"left no {RUN_FILE} to know it by"
    if recorded and not difference:
        return recorded if is_inside or recorded is here else replace(recorded, goes_on_from=place)
    if not resume_changed:
        raise ValueError(f"{checkpoint}: its run {difference}; --resume_changed True goes on from it all the same.")
    if any(model_files(output_dir)):
        raise ValueError(f"--resume_changed True needs another --output_dir: {output_dir} has a finished model.")
    return now.named(place, recorded.run if recorded else "")


def model_files(folder: Path) -> Iterator[Path]:
    """Files of weights in a folder."""
    return chain.from_iterable(sorted(folder.glob(pattern)) for pattern in WEIGHTS)


def lies_in(checkpoint: str, output_dir: Path) -> bool:
    """Whether a checkpoint is one of a folder's."""
    return Path(checkpoint).resolve().parent == output_dir.resolve()


def _checkpoints(output_dir: Path) -> Iterator[Path]:
    paths = sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return (path for path in paths if path.name.rpartition("-")[2].isdecimal())


def _run_of(checkpoint: Path) -> str | None:
    record = read_record(checkpoint)
    return record.run if record else None


class WholeCheckpointTrainer(Trainer):
    """transformers' `Trainer`, of whose checkpoints a kill leaves no half; a run that is complete trains no further."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_saving = False

    @property
    def llama(self) -> PreTrainedModel:
        """The model, without what LoRA puts around it."""
        return self.model if isinstance(self.model, PreTrainedModel) else cast(Any, self.model).get_base_model()

    @property
    def adapted(self) -> "PeftModel | None":
        """The model with its adapters, if it is trained with LoRA."""
        return None if isinstance(self.model, PreTrainedModel) else cast("PeftModel", self.model)

    def tensors_to_save(self) -> dict[str, Tensor]:
        """The weights that a checkpoint has, by their names there."""
        return self.llama.state_dict() if self.adapted is None else adapter_tensors(self.adapted)

    @property
    def diverged(self) -> str:
        """How a sentence begins that says so."""
        return f"--learning_rate {self.args.learning_rate}"

    def check_finite(self) -> None:
        """Refuse to write weights that are of no use.

        Raises:
            ValueError: names one.
        """
        for name, parameter in self.llama.named_parameters():
            if not is_finite(parameter):
                step = self.state.global_step
                raise ValueError(f"{self.diverged}: after step {step} {name} is NaN or infinite; {LOWER}.")

    def save_trained(self) -> None:
        """Write the model in bfloat16 into `--output_dir`; called by all processes, of which the first writes.

        With LoRA it is the merged one, and the adapter is written beside it. Where an exit adapter was trained, that
        alone is written, with the name of its model.

        Raises:
            ValueError: a weight is not finite.
        """
        self.check_finite()
        if self.adapted is not None and self.is_world_process_zero():
            save_adapter(self.adapted, output_dir_of(self.args))
        model, exit_adapter = self.whole_model(), adapter_of(self.llama)
        if model is not None and exit_adapter is not None:
            with whole_files(output_dir_of(self.args)) as folder:
                exit_adapter.save(folder, model.name_or_path or "")
        elif model is not None:
            model.config.use_cache = True  # The Trainer turns it off.
            model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' wrapper of `to` takes it for a function.
            with whole_files(output_dir_of(self.args)) as folder:
                model.save_pretrained(folder)

    def whole_model(self) -> PreTrainedModel | None:
        """On the first process, the model with all its weights, which FSDP has spread; all processes must call this."""
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if not self.is_world_process_zero():
            return None
        if self.adapted is not None:
            return merged(self.adapted)
        if state_dict is None:
            return self.llama
        whole: PreTrainedModel = AutoModelForCausalLM.from_config(self.llama.config, dtype=torch.float32)
        whole.load_state_dict(state_dict)
        return whole

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Epochs and batches already trained on: all of them when the run resumed is complete."""
        # A share of the steps becomes their number, which is what a checkpoint remembers.
        if self.args.logging_steps < 1:
            self.args.logging_steps = max(1, math.ceil(max_steps * self.args.logging_steps))
        trained = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, *args)
        return (num_epochs, 0) if self.state.global_step >= max_steps else trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{checkpoint}: the optimiser's states there do not fit this run's optimiser.") from error

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, INCOMPLETE_FOLDER) if self.is_saving else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside the others and rename it, so that a kill leaves no half of one."""
        self.check_finite()
        self.is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.is_saving = False
        output_dir = output_dir_of(self.args)
        if self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(output_dir / Path(self.state.best_model_checkpoint).name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._complete_checkpoint(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _complete_checkpoint(self, output_dir: Path, name: str) -> None:
        incomplete = output_dir / INCOMPLETE_FOLDER
        self.state.save_to_json(str(incomplete / name / TRAINER_STATE_NAME))
        if (output_dir / RUN_FILE).is_file():
            shutil.copyfile(output_dir / RUN_FILE, incomplete / name / RUN_FILE)
        shutil.rmtree(output_dir / name, ignore_errors=True)
        os.replace(incomplete / name, output_dir / name)
        shutil.rmtree(incomplete)
        rotate_checkpoints(
            output_dir=str(output_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
