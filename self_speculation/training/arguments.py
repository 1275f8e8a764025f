"""What a user chooses of LayerSkip's training (section 4.1 of the paper), as flags, and the schedules that follow."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from self_speculation.settings import Settings, setting
from self_speculation.training.choices import (
    CHUNK_TOKENS,
    Curriculum,
    DepthSchedule,
    ExitTarget,
    ExitWeights,
    TimeSchedule,
)

if TYPE_CHECKING:
    from self_speculation.training.early_exit_loss import ExitSchedule
    from self_speculation.training.layer_dropout import DropoutRates


@dataclass
class LayerSkipArguments(Settings):
    """How LayerSkip trains: layer dropout and early-exit loss."""

    p_max: float = setting(0.1, help="Layer-dropout rate of the last layer; 0 turns it off.")
    layer_dropout_schedule: TimeSchedule = setting(
        "exponential",
        help="S(t): exponential (the paper's from scratch), constant (its continual training), or decreasing to zero.",
    )
    layer_dropout_depth: DepthSchedule = setting(
        "exponential",
        help="D(l): exponential (the paper's) or linear from the first layer to the last, or constant.",
    )
    layer_dropout_rescale: bool = setting(
        default=False, help="Divide what a kept layer adds by 1 - p; the paper does not."
    )
    e_scale: float = setting(0.2, help="Scale of the early exits' loss weights; 0 turns them off.")
    early_exit_curriculum: Curriculum = setting(
        "rotational", help="Which exits a step trains; none: all of them at every step."
    )
    rotation_interval: int = setting(4, at_least=1, help="R: a rotational step trains every R-th exit.")
    strict_rotation: bool = setting(
        default=False, help="Rotate the last layer too, instead of training it at every step."
    )
    exit_weights: ExitWeights = setting(
        "paper", help="e(l): the paper's, or uniform (e_scale for every exit, 1 for the last)."
    )
    exit_layers: list[int] = setting(
        default_factory=list, help="Exit layers to train, from 1; all by default. The last is added."
    )
    exit_target: ExitTarget = setting(
        "labels",
        help="What early exits learn: the labels, the last layer's distribution (by KL), or to be accepted by it.",
    )
    acceptance_after: float = setting(
        0.3,
        at_least=0,
        at_most=1,
        help="Share of the steps that acceptance begins with KL; then the loss is the chance's negative logarithm.",
        is_rare=True,
    )
    anchor_weight: float = setting(
        0.0, help="Weight of KL(untouched model || last layer), which keeps the model what it was; 0 turns it off."
    )
    loss_chunk_tokens: int = setting(
        CHUNK_TOKENS, at_least=1, help="Positions whose logits the loss holds at a time.", is_rare=True
    )
    lora_rank: int = setting(
        0, at_least=0, help="Rank of LoRA adapters of the layers' matrices, trained in place of all weights; 0: none."
    )
    lora_alpha: float = setting(16.0, help="An adapter's matrices are multiplied by alpha / rank.")
    lora_from: str | None = setting(
        None,
        help="Folder of an adapter to begin with, of the same --model and sizes; new ones when not given.",
        is_rare=True,
    )
    train_exit_adapter: int | None = setting(
        None,
        at_least=1,
        help="E: leave the model as it is, and train one more layer and a norm that draft behind its first E layers.",
    )
    adapter_vocab: int = setting(
        0,
        at_least=0,
        help="Train the exit adapter over so many tokens alone, the training data's most frequent ones; 0: all.",
        is_rare=True,
    )
    argmax_share: float = setting(
        0.0,
        at_least=0,
        at_most=1,
        help="Share of an exit adapter's loss that is for the last layer's most likely token, not its distribution.",
        is_rare=True,
    )
    keep_states_gb: float = setting(
        0.0,
        at_least=0,
        help="GiB for what the frozen model computes, so that an adapter's later epochs do without it.",
    )
    muon: bool = setting(default=False, help="Optimise the layers' matrices with Muon, and the rest with AdamW.")
    compile_layers: bool = setting(default=False, help="Compile each decoder layer with torch.compile.")

    def __post_init__(self) -> None:
        if not 0 <= self.p_max <= 1:
            raise ValueError(f"--p_max must lie between 0 and 1, not {self.p_max}.")
        if not 0 <= self.e_scale < math.inf:
            raise ValueError(f"--e_scale must be a finite number from 0 up, not {self.e_scale}.")
        if not 0 <= self.anchor_weight < math.inf:
            raise ValueError(f"--anchor_weight must be a finite number from 0 up, not {self.anchor_weight}.")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora_alpha must be a finite number above 0, not {self.lora_alpha}.")
        super().__post_init__()
        if self.lora_rank and self.muon:
            raise ValueError("--muon is for whole matrices, and does not go with --lora_rank.")
        if self.lora_from is not None and not self.lora_rank:
            raise ValueError("--lora_from is an adapter to begin with, and needs --lora_rank.")
        if self.lora_rank and self.train_exit_adapter:
            raise ValueError("--lora_rank changes the model, and does not go with --train_exit_adapter.")
        for flag in ("adapter_vocab", "argmax_share", "keep_states_gb"):
            if getattr(self, flag) and not self.train_exit_adapter:
                raise ValueError(f"--{flag} is for an exit adapter, and needs --train_exit_adapter.")
        if not self.keep_states_gb < math.inf:
            raise ValueError(f"--keep_states_gb must be a finite number, not {self.keep_states_gb}.")
        if self.anchor_weight and self.train_exit_adapter:
            raise ValueError("--anchor_weight is for a model that changes, and does not go with --train_exit_adapter.")

    def dropout_rates(self, num_layers: int, num_steps: int) -> "DropoutRates":
        """p_{l,t} (4.1.1), for a model of `num_layers` layers that is trained for `num_steps` steps.

        None where an exit adapter is trained: the model that teaches it is whole.
        """
        # Imports torch, which the flags do without; as below.
        from self_speculation.training.layer_dropout import DropoutRates

        p_max = self.p_max if self.train_exit_adapter is None else 0.0
        return DropoutRates(
            p_max, num_layers, num_steps, schedule=self.layer_dropout_schedule, depth=self.layer_dropout_depth
        )

    def exit_schedule(self, num_layers: int, num_steps: int) -> "ExitSchedule":
        """ẽ(t, l) (4.1.2), for a model of `num_layers` layers that is trained for `num_steps` steps."""
        from self_speculation.training.early_exit_loss import ExitSchedule

        return ExitSchedule(
            num_layers=num_layers,
            num_steps=num_steps,
            exit_layers=self.exits(num_layers),
            curriculum=self.early_exit_curriculum,
            rotation_interval=self.rotation_interval,
            strict_rotation=self.strict_rotation,
            weights=self.exit_weights,
            e_scale=self.e_scale,
            acceptance_after=self.acceptance_after,
        )

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """The exit layers to train, in order, for a model of `num_layers` layers."""
        if self.train_exit_adapter is not None:
            return (self.train_exit_adapter, num_layers)
        wrong = [exit_layer for exit_layer in self.exit_layers if not 1 <= exit_layer <= num_layers]
        if wrong:
            raise ValueError(f"--exit_layers must lie between 1 and {num_layers}, not {wrong[0]}.")
        return tuple(sorted({*(self.exit_layers or range(1, num_layers + 1)), num_layers}))
