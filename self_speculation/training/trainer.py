"""LayerSkip training (section 4.1 of the paper) on top of transformers' `Trainer`."""

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from self_speculation.training.early_exit_loss import (
    CHUNK_TOKENS,
    Curriculum,
    EarlyExitLoss,
    ExitSchedule,
    ExitTarget,
    ExitWeights,
)
from self_speculation.training.exit_measures import exit_metrics, num_labels, scoring
from self_speculation.training.layer_dropout import DepthSchedule, DropoutRates, LayerDropout, TimeSchedule
from self_speculation.training.muon import MuonWithAdamW

INCOMPLETE_FOLDER = "incomplete-checkpoint"


@dataclass
class LayerSkipArguments:
    """How LayerSkip trains: layer dropout and early-exit loss."""

    p_max: float = field(default=0.1, metadata={"help": "Layer-dropout rate of the last layer; 0 turns it off."})
    layer_dropout_schedule: TimeSchedule = field(
        default="exponential",
        metadata={
            "help": "S(t): exponential (the paper's from scratch), constant (its continual training), or "
            "decreasing to zero."
        },
    )
    layer_dropout_depth: DepthSchedule = field(
        default="exponential",
        metadata={"help": "D(l): exponential (the paper's) or linear from the first layer to the last, or constant."},
    )
    layer_dropout_rescale: bool = field(
        default=False, metadata={"help": "Divide what a kept layer adds by 1 - p; the paper does not."}
    )
    e_scale: float = field(default=0.2, metadata={"help": "Scale of the early exits' loss weights; 0 turns them off."})
    early_exit_curriculum: Curriculum = field(
        default="rotational", metadata={"help": "Which exits a step trains; none: all of them at every step."}
    )
    rotation_interval: int = field(default=4, metadata={"help": "R: a rotational step trains every R-th exit."})
    strict_rotation: bool = field(
        default=False, metadata={"help": "Rotate the last layer too, instead of training it at every step."}
    )
    exit_weights: ExitWeights = field(
        default="paper", metadata={"help": "e(l): the paper's, or uniform (e_scale for every exit, 1 for the last)."}
    )
    exit_layers: list[int] = field(
        default_factory=list, metadata={"help": "Exit layers to train, from 1; all by default. The last is added."}
    )
    exit_target: ExitTarget = field(
        default="labels", metadata={"help": "What early exits learn: the labels, or the last layer's distribution."}
    )
    loss_chunk_tokens: int = field(
        default=CHUNK_TOKENS,
        metadata={"help": "Positions whose logits the loss holds at a time."},
    )
    muon: bool = field(
        default=False, metadata={"help": "Optimise the layers' matrices with Muon, and the rest with AdamW."}
    )
    compile_layers: bool = field(default=False, metadata={"help": "Compile each decoder layer with torch.compile."})

    def __post_init__(self) -> None:
        if not 0 <= self.p_max <= 1:
            raise ValueError(f"--p_max must lie between 0 and 1, not {self.p_max}.")
        if not 0 <= self.e_scale < math.inf:
            raise ValueError(f"--e_scale must be a finite number from 0 up, not {self.e_scale}.")
        if self.rotation_interval < 1:
            raise ValueError(f"--rotation_interval must be at least 1, not {self.rotation_interval}.")
        if self.loss_chunk_tokens < 1:
            raise ValueError(f"--loss_chunk_tokens must be at least 1, not {self.loss_chunk_tokens}.")

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """The exit layers to train, in order, for a model of `num_layers` layers."""
        wrong = [exit_layer for exit_layer in self.exit_layers if not 1 <= exit_layer <= num_layers]
        if wrong:
            raise ValueError(f"--exit_layers must lie between 1 and {num_layers}, not {wrong[0]}.")
        return tuple(sorted({*(self.exit_layers or range(1, num_layers + 1)), num_layers}))


class LayerSkipTrainer(Trainer):
    """transformers' `Trainer` with layer dropout, the early-exit loss, and checkpoints that are whole or absent.

    Its evaluation has the measures of every exit layer, like `eval_exit_3_agreement`.
    """

    def __init__(self, *args: Any, layerskip: LayerSkipArguments, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=exit_metrics, **kwargs)
        self.layerskip = layerskip
        self.is_saving = False
        layers = self.model.model.layers
        num_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if num_steps < 1:
            raise ValueError("--max_steps must be at least 1, or negative for --num_train_epochs to decide.")
        rates = DropoutRates(
            layerskip.p_max,
            len(layers),
            num_steps,
            layerskip.layer_dropout_schedule,
            layerskip.layer_dropout_depth,
        )
        schedule = ExitSchedule(
            num_layers=len(layers),
            num_steps=num_steps,
            exit_layers=layerskip.exits(len(layers)),
            curriculum=layerskip.early_exit_curriculum,
            rotation_interval=layerskip.rotation_interval,
            strict_rotation=layerskip.strict_rotation,
            weights=layerskip.exit_weights,
            e_scale=layerskip.e_scale,
        )
        self.dropout = LayerDropout(layers, rates, self.args.seed, layerskip.layer_dropout_rescale)
        self.early_exit_loss = EarlyExitLoss(self.model, schedule, layerskip.exit_target, layerskip.loss_chunk_tokens)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own optimiser, or Muon with AdamW."""
        if self.optimizer is None and self.layerskip.muon:
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonWithAdamW(self.model, self.args.learning_rate, self.args.weight_decay, betas)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tell the dropout and the loss where training is; then the Trainer's forward and backward pass."""
        step = self.state.global_step
        self.dropout.micro_batch = self.dropout.micro_batch + 1 if step == self.dropout.step else 0
        self.dropout.step = self.early_exit_loss.step = step
        return super().training_step(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the model has its own `forward` again."""
        if self.layerskip.compile_layers:
            for layer in self.dropout.layers:
                layer.forward = torch.compile(layer.forward)
        self.dropout.attach()
        self.early_exit_loss.attach()
        self.dropout.step = -1  # No step yet: the first one begins with micro-batch 0.
        try:
            return super().train(*args, **kwargs)
        finally:
            self.dropout.remove()
            self.early_exit_loss.remove()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The measures of the last layer and of every exit, on all processes together."""
        with scoring(self.model, self.layerskip.loss_chunk_tokens):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of the measures for each row, and how many tokens they are sums over."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, model(**inputs).logits, num_labels(inputs["labels"])

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
