# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""LayerSkip training (section 4.1 of the paper) on top of transformers' `Trainer`.

Shapes: B batch, T positions, D hidden size, V vocabulary, N = B·T rows.
"""

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from self_speculation.early_exit_loss import (
    CHUNK_TOKENS,
    Curriculum,
    EarlyExitLoss,
    ExitSchedule,
    ExitTarget,
    ExitWeights,
    cross_entropy,
)
from self_speculation.layer_dropout import DepthSchedule, DropoutRates, LayerDropout, TimeSchedule

INCOMPLETE_FOLDER = "incomplete-checkpoint"
BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
# A line break with the indentation after it is one piece, as is a word with the space before it.
CODE_PIECES = r"[\r\n]+[ \t]*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+"


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


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of the decoder layers and AdamW for embeddings, head and norms, as one optimiser.

    Muon's updates are scaled to AdamW's root mean square, so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        layers = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
        chosen = {id(parameter) for parameter in layers}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        self.parts = [
            torch.optim.Muon(layers, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=betas),
        ]
        super().__init__([*layers, *rest], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class LayerSkipTrainer(Trainer):
    """transformers' `Trainer` with layer dropout, the early-exit loss and checkpoints that are whole or absent."""

    def __init__(self, *args: Any, layerskip: LayerSkipArguments, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens that puts `<s>` in front, as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CODE_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )


class PackedTexts(Dataset):
    """Texts as tokens, each closed by the end token, laid end to end and cut into blocks of `block_size` tokens."""

    def __init__(
        self,
        texts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        max_blocks: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("--tokenizer has no end-of-sequence token to close the texts with.")
        ids = [
            token
            for text in tqdm(texts, desc="Tokenising", unit="text", leave=False)
            for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ]
        num_blocks = min(len(ids) // block_size, max_blocks or len(ids))
        if not num_blocks:
            raise ValueError(f"The text has {len(ids)} tokens, fewer than one block of {block_size} (--block_size).")
        self.blocks = torch.tensor(ids[: num_blocks * block_size], dtype=torch.int32).view(num_blocks, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block_T = self.blocks[index].long()
        return {"input_ids": block_T, "labels": block_T}


@torch.inference_mode()
def evaluate_exits(model: LlamaForCausalLM, blocks: PackedTexts, batch_size: int) -> pd.DataFrame:
    """Loss (nats per token) of every exit layer, and how often its argmax is the last layer's, on held-out blocks."""
    model.eval()
    num_layers = model.config.num_hidden_layers
    losses, agreements = torch.zeros(num_layers), torch.zeros(num_layers)
    batches = DataLoader(blocks, batch_size=batch_size)
    for batch in tqdm(batches, desc="Evaluating exits", unit="batch", leave=False):
        ids_BT = batch["input_ids"].to(model.device)
        hidden_states = model.model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
        labels_N = ids_BT[:, 1:].flatten()
        last_N = model.lm_head(hidden_states[-1][:, :-1]).flatten(0, 1).argmax(-1)
        for exit_layer in range(1, num_layers + 1):
            hidden_BTD = hidden_states[exit_layer][:, :-1]
            normed_BTD = hidden_BTD if exit_layer == num_layers else model.model.norm(hidden_BTD)
            logits_NV = model.lm_head(normed_BTD).flatten(0, 1).float()
            losses[exit_layer - 1] += cross_entropy(logits_NV, labels_N).cpu()
            agreements[exit_layer - 1] += (logits_NV.argmax(-1) == last_N).sum().cpu()
    num_tokens = len(blocks) * (blocks.blocks.shape[1] - 1)
    return pd.DataFrame(
        {
            "exit_layer": range(1, num_layers + 1),
            "loss": (losses / num_tokens).tolist(),
            "agreement": (agreements / num_tokens).tolist(),
        }
    )


def plot_exits(table: pd.DataFrame, path: Path) -> None:
    """A picture of `evaluate_exits`: loss and agreement with the last layer over the exit layer."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(table["exit_layer"], table["loss"], marker="o", color="tab:red")
    left.set(xlabel="exit layer", ylabel="loss (nats per token)", title="Loss on held-out text")
    right.plot(table["exit_layer"], table["agreement"], marker="o", color="tab:blue")
    right.set(xlabel="exit layer", ylabel="share of tokens", ylim=(0, 1.02), title="Agreement with the last layer")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
