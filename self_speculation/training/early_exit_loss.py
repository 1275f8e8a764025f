"""Early-exit loss (section 4.1.2 of the paper).

    J(X, Y, t) = Σ_l ẽ(t, l) · CE(g(x_{l+1}), Y),    ẽ(t, l) = C(t, l) · e(l) / Σ_i C(t, i) · e(i)

In the order of this file: the weights e(l), the curricula C(t, l), their product ẽ(t, l), the exits' output g(x), and
the loss J, whose sums over rows and exits are in `chunked_loss`. g is the model's own final norm and LM head, shared by
all exits. Layers are numbered l = 0 … L−1; an exit layer E means "run the first E layers", so exit E reads x_E and has
l = E−1. t is the training step, of T.

Shapes: B batch, T positions, D hidden size, V vocabulary, N = B·T rows, K those with labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from self_speculation.families import logits_function
from self_speculation.training.anchor import Anchor
from self_speculation.training.choices import CHUNK_TOKENS, Curriculum, ExitTarget, ExitWeights
from self_speculation.training.chunked_loss import (
    AnchorRows,
    ExitSums,
    SummedExitLoss,
    TaughtLoss,
    acceptance_loss,
    distillation_cross_entropy,
)
from self_speculation.training.labels import IGNORED_LABEL, next_labels


def paper_weight(layer: int, num_layers: int, e_scale: float) -> float:
    """e(l) of section 4.1.2: e_scale · Σ_{i=0..l} i for l < L−1; e(L−1) = (L−1) + e_scale · Σ_{i=0..L−2} i."""
    if layer < num_layers - 1:
        return e_scale * layer * (layer + 1) / 2
    return (num_layers - 1) + e_scale * (num_layers - 2) * (num_layers - 1) / 2


def uniform_weight(layer: int, num_layers: int, e_scale: float) -> float:
    """e(l) = e_scale for l < L−1 and 1 for the last layer: for shallow models, whose first exits e(l) starves."""
    return e_scale if layer < num_layers - 1 else 1.0


def rotational_curriculum(index: int, step: int, interval: int) -> bool:
    """C_rot,R(t, l) of section 4.1.2: every R-th exit is enabled, shifted by one each step.

    `index` is the exit's place in the list of exits: l itself where all layers are exits.
    """
    return index % interval == step % interval


def gradual_curriculum(index: int, step: int, num_exits: int, num_steps: int) -> bool:
    """C_grad(t, l) of section 4.1.2: exits are enabled from the last one down, one more every T/(2L) steps.

    All of them are from T/2 on. `index` is the exit's place in the list of exits, whose length takes the place of L.
    """
    return index >= num_exits - 1 - 2 * num_exits * step // num_steps


@dataclass(frozen=True)
class ExitSchedule:
    """ẽ(t, l): which exits are trained at a step, and with what weight.

    `acceptance_after`: the share of the steps after which early exits that shall be accepted learn by that loss.
    """

    num_layers: int
    num_steps: int
    exit_layers: tuple[int, ...]
    curriculum: Curriculum = "rotational"
    rotation_interval: int = 4
    strict_rotation: bool = False
    weights: ExitWeights = "paper"
    e_scale: float = 1.0
    acceptance_after: float = 0.0

    def taught(self, target: ExitTarget, step: int) -> TaughtLoss | None:
        """The loss by which early exits learn from the last layer at a step; None: they learn the labels.

        −log Σ min(p, q) says little while q is far from p, so KL comes first.
        """
        if target == "labels":
            return None
        is_accepted = target == "acceptance" and step >= self.acceptance_after * self.num_steps
        return acceptance_loss if is_accepted else distillation_cross_entropy

    def enabled(self, index: int, step: int) -> bool:
        """C(t, l) for the exit at `index` in `exit_layers`; the last layer is always on unless rotation is strict."""
        if self.exit_layers[index] == self.num_layers and not self.strict_rotation:
            return True
        if self.curriculum == "rotational":
            return rotational_curriculum(index, step, self.rotation_interval)
        if self.curriculum == "gradual":
            return gradual_curriculum(index, step, len(self.exit_layers), self.num_steps)
        return True

    def weight(self, exit_layer: int) -> float:
        """e(l), the paper's or uniform, of the layer l = E−1 that an exit comes after."""
        scale = paper_weight if self.weights == "paper" else uniform_weight
        return scale(exit_layer - 1, self.num_layers, self.e_scale)

    def at(self, step: int) -> dict[int, float]:
        """Exit layer → ẽ(t, l) = C(t, l) · e(l) / Σ_i C(t, i) · e(i), where it is not zero; the weights sum to 1.

        Where all of them weigh nothing (e(0) = 0, alone in a strict rotation), the last layer is trained.
        """
        enabled = [exit_layer for index, exit_layer in enumerate(self.exit_layers) if self.enabled(index, step)]
        raw = {exit_layer: self.weight(exit_layer) for exit_layer in enabled}
        total = sum(raw.values())
        if not total:
            return {self.num_layers: 1.0}
        return {exit_layer: value / total for exit_layer, value in raw.items() if value > 0}


def exit_logits(model: PreTrainedModel, hidden_ND: Tensor, is_normed: bool) -> Tensor:
    """g(x), (N, V): the model's final norm and LM head; transformers' x_L is normed already, the others are not."""
    return head_logits(model, hidden_ND if is_normed else model.model.norm(hidden_ND))


def head_logits(model: PreTrainedModel, normed_ND: Tensor) -> Tensor:
    """Logits (N, V) of normed states: the LM head, and what the model's family does to its product."""
    return logits_function(model)(model.lm_head(normed_ND))


class EarlyExitLoss:
    """The loss J of section 4.1.2, computed inside the model's `forward` while it trains with labels; removable again.

    Inside, because DDP and FSDP prepare the shared norm and head around that call. Only labelled positions reach norm
    and head, and the logits of one exit at `chunk_tokens` of them live at a time, with the last layer's
    distribution where it teaches. The trainer sets `step`. With an `anchor`, J has w · KL(untouched model ‖ last layer)
    beside the exits' losses.
    """

    anchor: Anchor | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: ExitSchedule,
        target: ExitTarget,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.target = target
        self.chunk_tokens = chunk_tokens
        self.step = 0

    def attach(self) -> None:
        """Replace the model's `forward` for calls in training mode that bring labels."""
        self.model.forward = self._with_loss(self.model.forward)

    def remove(self) -> None:
        """Give the model its class's `forward` back."""
        self.model.__dict__.pop("forward", None)

    def _with_loss(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def forward_with_early_exit_loss(
            *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
        ) -> Any:
            if labels is None or not self.model.training:
                return forward(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
            kwargs |= {"output_hidden_states": True, "use_cache": False}
            untouched_BTD = self.anchor.states(*args, **kwargs) if self.anchor else None
            hidden_states = self.model.model(*args, **kwargs).hidden_states
            return CausalLMOutput(loss=self.loss(hidden_states, labels, num_items_in_batch, untouched_BTD))

        return forward_with_early_exit_loss

    def loss(
        self,
        hidden_states: tuple[Tensor, ...],
        labels_BT: Tensor,
        num_items_in_batch: Tensor | int | None,
        untouched_BTD: Tensor | None = None,
    ) -> Tensor:
        """J(X, Y, t) = Σ_l ẽ(t, l) · CE(g(x_{l+1}), Y): the weighted, summed cross-entropies, per labelled token.

        `hidden_states` are x_0 … x_L as transformers returns them, each (B, T, D), x_L already normed; `untouched_BTD`
        is the anchor's x_L.
        """
        labels_N = next_labels(labels_BT)
        labelled_K = (labels_N != IGNORED_LABEL).nonzero().flatten()
        weights, last = self.schedule.at(self.step), self.schedule.num_layers
        taught = self.schedule.taught(self.target, self.step) if set(weights) != {last} else None
        anchor = self._anchor_rows(untouched_BTD, labelled_K)
        # The last layer comes first, to teach the others; a teacher that is not trained itself weighs nothing.
        exits = sorted({*weights, last} if taught or anchor else weights, reverse=True)
        states = [self._normed(hidden_states[exit_layer], exit_layer, labelled_K) for exit_layer in exits]
        if taught and not anchor and last not in weights:
            states[0] = states[0].detach()
        own = tuple(weights.get(exit_layer, 0.0) for exit_layer in exits)
        sums = ExitSums(own, taught, self.chunk_tokens, anchor, logits_function(self.model))
        total = SummedExitLoss.apply(sums, labels_N[labelled_K], self.model.lm_head.weight, *states)
        return total / (len(labelled_K) if num_items_in_batch is None else num_items_in_batch)

    def _normed(self, hidden_BTD: Tensor, exit_layer: int, labelled_K: Tensor) -> Tensor:
        """What the head reads at the labelled positions, (K, D)."""
        if exit_layer == self.schedule.num_layers:
            return hidden_BTD.flatten(0, 1)[labelled_K]
        # What the norm keeps for its gradients would be several times its output, for each exit: it is made again.
        normed_KD: Tensor = checkpoint(
            self._norm_rows, hidden_BTD, labelled_K, use_reentrant=False, preserve_rng_state=False
        )
        return normed_KD

    def _norm_rows(self, hidden_BTD: Tensor, labelled_K: Tensor) -> Tensor:
        return self.model.model.norm(hidden_BTD.flatten(0, 1)[labelled_K])

    def _anchor_rows(self, untouched_BTD: Tensor | None, labelled_K: Tensor) -> AnchorRows | None:
        if self.anchor is None or untouched_BTD is None:
            return None
        return AnchorRows(self.anchor.weight, untouched_BTD.flatten(0, 1)[labelled_K], self.anchor.head)
