"""Checkpoints that are whole or absent, what a run goes on from, and the trained model's folder."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

INCOMPLETE_FOLDER = "incomplete-checkpoint"


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names: a checkpoint's folder, or True for the newest one, if there is one yet."""
    value = training.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() == "true":
        return get_last_checkpoint(training.output_dir) if _output_dir(training).is_dir() else None
    if not Path(value, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint: {value} is not the folder of a checkpoint.")
    return value


def _output_dir(training: TrainingArguments) -> Path:
    """`--output_dir`, to which transformers gives a name where the user gives none."""
    return Path(cast(str, training.output_dir))


class WholeCheckpointTrainer(Trainer):
    """transformers' `Trainer`, of whose checkpoints a kill leaves no half; a run that is complete trains no further."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_saving = False

    @property
    def llama(self) -> LlamaForCausalLM:
        """The model; transformers' own annotation allows any, and none."""
        return cast(LlamaForCausalLM, self.model)

    def save_trained(self) -> None:
        """Write the model in bfloat16 into `--output_dir`; called by all processes, of which the first writes."""
        model = self.whole_model()
        if model is not None:
            model.config.use_cache = True  # The Trainer turns it off.
            model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' wrapper of `to` takes it for a function.
            model.save_pretrained(_output_dir(self.args))

    def whole_model(self) -> LlamaForCausalLM | None:
        """On the first process, the model with all its weights, which FSDP has spread; all processes must call this."""
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if not self.is_world_process_zero():
            return None
        if state_dict is None:
            return self.llama
        whole = LlamaForCausalLM(self.llama.config)
        whole.load_state_dict(state_dict)
        return whole

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Epochs and batches already trained on: all of them when the run resumed is complete."""
        trained = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, *args)
        return (num_epochs, 0) if self.state.global_step >= max_steps else trained

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
        output_dir = _output_dir(self.args)
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
