"""Checkpoints that are whole or absent, what a run goes on from, and the trained model's folder."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from self_speculation.training.whole_files import whole_files

INCOMPLETE_FOLDER = "incomplete-checkpoint"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names: a checkpoint's folder, or True for the newest one, if there is one yet."""
    value = training.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() == "true":
        return get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if not Path(value, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint: {value} is not the folder of a checkpoint.")
    return value


def refuse_to_overwrite(output_dir: Path, checkpoint: str | None) -> None:
    """Refuse a folder that holds another run than the one to be gone on with, if any is.

    Raises:
        ValueError: names the folder, what it holds, and the flags to go on with.
    """
    model = next((path for pattern in WEIGHTS for path in sorted(output_dir.glob(pattern))), None)
    newest = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if not (model or newest) or (checkpoint and Path(checkpoint).resolve().parent == output_dir.resolve()):
        return
    held = f"--output_dir: {output_dir} holds an earlier run ({Path(model or newest or '').name})"
    if newest:
        raise ValueError(f"{held}; give --resume_from_checkpoint True to go on with it, or another --output_dir.")
    raise ValueError(f"{held} without a checkpoint to go on from; give another --output_dir.")


class WholeCheckpointTrainer(Trainer):
    """transformers' `Trainer`, of whose checkpoints a kill leaves no half; a run that is complete trains no further."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_saving = False

    def save_trained(self) -> None:
        """Write the model in bfloat16 into `--output_dir`; called by all processes, of which the first writes."""
        model = self.whole_model()
        if model is not None:
            model.config.use_cache = True  # The Trainer turns it off.
            with whole_files(Path(self.args.output_dir)) as folder:
                model.to(torch.bfloat16).save_pretrained(folder)

    def whole_model(self) -> LlamaForCausalLM | None:
        """On the first process, the model with all its weights, which FSDP has spread; all processes must call this."""
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if not self.is_world_process_zero():
            return None
        if state_dict is None:
            return self.model
        whole = LlamaForCausalLM(self.model.config)
        whole.load_state_dict(state_dict)
        return whole

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Epochs and batches already trained on: all of them when the run resumed is complete."""
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
        self.is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.is_saving = False
        output_dir = Path(self.args.output_dir)
        if self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(output_dir / Path(self.state.best_model_checkpoint).name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._complete_checkpoint(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _complete_checkpoint(self, output_dir: Path, name: str) -> None:
        incomplete = output_dir / INCOMPLETE_FOLDER
        self.state.save_to_json(str(incomplete / name / TRAINER_STATE_NAME))
        shutil.rmtree(output_dir / name, ignore_errors=True)
        os.replace(incomplete / name, output_dir / name)
        shutil.rmtree(incomplete)
        rotate_checkpoints(
            output_dir=str(output_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
