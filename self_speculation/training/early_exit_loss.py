"""Early-exit loss (section 4.1.2 of the paper).

    J(X, Y, t) = Σ_l ẽ(t, l) · CE(g(x_{l+1}), Y),    ẽ(t, l) = C(t, l) · e(l) / Σ_i C(t, i) · e(i)

In the order of this file: the weights e(l), the curricula C(t, l), their product ẽ(t, l), the exits' output g(x), CE
with its gradient, its sum over exits and rows, and the loss J. g is the model's own final norm and LM head, shared by
all exits. Layers are numbered l = 0 … L−1; an exit layer E means "run the first E layers", so exit E reads x_E and has
l = E−1. t is the training step, of T.

Shapes: B batch, T positions, D hidden size, V vocabulary, N = B·T rows, K those with labels, C a chunk of those.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from self_speculation.training.labels import IGNORED_LABEL, next_labels

Curriculum = Literal["rotational", "gradual", "none"]
ExitWeights = Literal["paper", "uniform"]
ExitTarget = Literal["labels", "last_layer"]

# Positions whose logits are held at a time.
CHUNK_TOKENS = 512


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
    """ẽ(t, l): which exits are trained at a step, and with what weight."""

    num_layers: int
    num_steps: int
    exit_layers: tuple[int, ...]
    curriculum: Curriculum = "rotational"
    rotation_interval: int = 4
    strict_rotation: bool = False
    weights: ExitWeights = "paper"
    e_scale: float = 1.0

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


def exit_logits(model: LlamaForCausalLM, hidden_ND: Tensor, is_normed: bool) -> Tensor:
    """g(x), (N, V): the model's final norm and LM head; transformers' x_L is normed already, the others are not."""
    return model.lm_head(hidden_ND if is_normed else model.model.norm(hidden_ND))


def cross_entropy(log_q_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Σ CE(g(x), Y) = −Σ log q(Y), and its gradient with respect to the logits: q − 1 at Y, q elsewhere."""
    gradient_CV = log_q_CV.exp()
    gradient_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
    return F.nll_loss(log_q_CV, labels_C, reduction="sum"), gradient_CV


def distillation_cross_entropy(log_q_CV: Tensor, p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Σ CE(g(x), p) = −Σ p · log q with the last layer's p, and its gradient with respect to the logits: q − p.

    What held log q holds the gradient afterwards.
    """
    loss = -torch.einsum("cv,cv->", p_CV, log_q_CV)
    return loss, log_q_CV.exp_().sub_(p_CV)


@dataclass(frozen=True)
class ExitSums:
    """What `SummedExitLoss` sums: the exits' weights ẽ(t, l), and whether the first exit is what the others learn."""

    weights: tuple[float, ...]
    first_teaches: bool
    chunk_tokens: int


class SummedExitLoss(torch.autograd.Function):
    """Σ_l ẽ(t, l) · Σ_k CE(g(x_{l+1}), Y) over the labelled rows, whose gradients are taken in the forward pass.

    Each exit's logits are computed once, and live until their gradient has gone through the head: the backward pass
    merely multiplies what is left, gradients of the head's weights and of the exits' normed states. The last layer's
    distribution is computed once for a chunk of rows, for its own loss and as the teacher of all exits.
    """

    @staticmethod
    def forward(ctx: Any, sums: ExitSums, labels_K: Tensor, head_VD: Tensor, *exits_KD: Tensor) -> Tensor:
        """The loss, in float32 at least; products with the head are in autocast's dtype, if it is on."""
        device, head = head_VD.device.type, _Head(head_VD, ctx.needs_input_grad[2])
        gradients_KD = [torch.empty_like(exit_KD) for exit_KD in exits_KD]
        with torch.autocast(device, enabled=False):
            rows = zip(
                *(tensor.split(sums.chunk_tokens) for tensor in (labels_K, *exits_KD, *gradients_KD)), strict=True
            )
            losses = [_chunk_loss(sums, head, labels_C, states) for labels_C, *states in rows]
        ctx.save_for_backward(head.gradient_VD, *gradients_KD)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the incoming one."""
        return None, None, *(None if own is None else own * incoming for own in ctx.saved_tensors)


class _Head:
    """The LM head in the dtype of its products, and the gradient of its weights, in float32 at least."""

    def __init__(self, weight_VD: Tensor, is_trained: bool) -> None:
        device = weight_VD.device.type
        is_cast = weight_VD.dtype == torch.float32 and torch.is_autocast_enabled(device)
        self.weight_VD = weight_VD.to(torch.get_autocast_dtype(device)) if is_cast else weight_VD
        self.exact = torch.promote_types(weight_VD.dtype, torch.float32)
        self.gradient_VD = torch.zeros_like(weight_VD, dtype=self.exact) if is_trained else None

    def log_q(self, normed_CD: Tensor) -> Tensor:
        """log softmax of the logits, (C, V)."""
        return (normed_CD.to(self.weight_VD.dtype) @ self.weight_VD.T).to(self.exact).log_softmax(-1)

    def back(self, weight: float, gradient_CV: Tensor, normed_CD: Tensor) -> Tensor:
        """Adds an exit's weighted gradient to that of the weights, and gives that of its normed states, (C, D)."""
        gradient_CV = gradient_CV.to(self.weight_VD.dtype)
        if self.gradient_VD is not None:
            self.gradient_VD.add_(gradient_CV.T @ normed_CD.to(gradient_CV.dtype), alpha=weight)
        return weight * (gradient_CV @ self.weight_VD)


def _chunk_loss(sums: ExitSums, head: _Head, labels_C: Tensor, states: list[Tensor]) -> Tensor:
    """The weighted loss of all exits at some rows; `states` are theirs, and where the gradients go, each (C, D)."""
    total, p_CV = labels_C.new_zeros((), dtype=head.exact), None
    count = len(sums.weights)
    for weight, normed_CD, into_CD in zip(sums.weights, states[:count], states[count:], strict=True):
        log_q_CV = head.log_q(normed_CD)
        if p_CV is not None:
            loss, gradient_CV = distillation_cross_entropy(log_q_CV, p_CV)
        else:
            loss, gradient_CV = cross_entropy(log_q_CV, labels_C)
            p_CV = log_q_CV.exp_() if sums.first_teaches else None
        total += weight * loss
        into_CD.copy_(head.back(weight, gradient_CV, normed_CD))
        del log_q_CV, gradient_CV  # Before the next exit's are made.
    return total


class EarlyExitLoss:
    """The loss J of section 4.1.2, computed inside the model's `forward` while it trains with labels; removable again.

    Inside, because DDP and FSDP prepare the shared norm and head around that call. Only labelled positions reach norm
    and head, and the logits of one exit at `chunk_tokens` of them live at a time, with those of the last layer where
    it teaches. The trainer sets `step`.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
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
            hidden_states = self.model.model(*args, **kwargs).hidden_states
            return CausalLMOutput(loss=self.loss(hidden_states, labels, num_items_in_batch))

        return forward_with_early_exit_loss

    def loss(
        self, hidden_states: tuple[Tensor, ...], labels_BT: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """J(X, Y, t) = Σ_l ẽ(t, l) · CE(g(x_{l+1}), Y): the weighted, summed cross-entropies, per labelled token.

        `hidden_states` are x_0 … x_L as transformers returns them, each (B, T, D), x_L already normed.
        """
        labels_N = next_labels(labels_BT)
        labelled_K = (labels_N != IGNORED_LABEL).nonzero().flatten()
        weights, last = self.schedule.at(self.step), self.schedule.num_layers
        teaches = self.target == "last_layer" and set(weights) != {last}
        # The last layer comes first, to teach the others; a teacher that is not trained itself weighs nothing.
        exits = sorted({*weights, last} if teaches else weights, reverse=True)
        states = [self._normed(hidden_states[exit_layer], exit_layer, labelled_K) for exit_layer in exits]
        sums = ExitSums(tuple(weights.get(exit_layer, 0.0) for exit_layer in exits), teaches, self.chunk_tokens)
        if not sums.weights[0]:
            states[0] = states[0].detach()
        total = SummedExitLoss.apply(sums, labels_N[labelled_K], self.model.lm_head.weight, *states)
        return total / (len(labelled_K) if num_items_in_batch is None else num_items_in_batch)

    def _normed(self, hidden_BTD: Tensor, exit_layer: int, labelled_K: Tensor) -> Tensor:
        """What the head reads at the labelled positions, (K, D)."""
        hidden_KD = hidden_BTD.flatten(0, 1)[labelled_K]
        return hidden_KD if exit_layer == self.schedule.num_layers else self.model.model.norm(hidden_KD)
