"""Losses at the LM head, a chunk of rows at a time, whose gradients are taken in the forward pass.

At a real vocabulary the head weighs as much as many layers, and logits more than all hidden states. So each exit's
logits are computed once, and live until their gradient has gone back through the head. In the order of this file: the
losses with their gradients, what is summed, the sum over exits and rows, the head, and one chunk.

Shapes: D hidden size, V vocabulary, K rows with labels, C a chunk of them. p is the last layer's distribution, q the
distribution of the exit at hand, r the untouched model's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from self_speculation.families import AS_IT_IS, LogitsFunction

# From log q and p, each (C, V): the summed loss, and its gradient with respect to the logits in the place of log q.
TaughtLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(log_q_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Σ CE(g(x), Y) = −Σ log q(Y), and its gradient with respect to the logits: q − 1 at Y, q elsewhere."""
    gradient_CV = log_q_CV.exp()
    gradient_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
    return F.nll_loss(log_q_CV, labels_C, reduction="sum"), gradient_CV


def distillation_cross_entropy(log_q_CV: Tensor, p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Σ CE(p, q) = −Σ p · log q, and its gradient with respect to the logits, q − p: those of KL(p ‖ q) too."""
    loss = -torch.einsum("cv,cv->", p_CV, log_q_CV)
    return loss, log_q_CV.exp_().sub_(p_CV)


def partly_argmax(log_q_CV: Tensor, p_CV: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Σ CE(p', q) with p' = (1 − s) · p + s · [v is p's argmax], and its gradient, q − p'.

    The share s is for what greedy decoding takes.
    """
    chosen_C1 = p_CV.argmax(-1, keepdim=True)
    log_q_of_chosen = log_q_CV.gather(-1, chosen_C1).sum()
    loss, gradient_CV = distillation_cross_entropy(log_q_CV, p_CV)
    gradient_CV.add_(p_CV, alpha=share).scatter_add_(-1, chosen_C1, p_CV.new_full(chosen_C1.shape, -share))
    return (1 - share) * loss - share * log_q_of_chosen, gradient_CV


def acceptance_loss(log_q_CV: Tensor, p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """−Σ log α with α = Σ_v min(p, q), the chance that a token drawn from q is accepted (arXiv 2602.23881).

    Its gradient with respect to the logits is q · (β − [q < p]) / α, where β is what q has where q < p.
    """
    q_CV = log_q_CV.exp_()
    smaller_CV = torch.minimum(p_CV, q_CV)
    alpha_C1 = smaller_CV.sum(-1, keepdim=True).clamp_min(torch.finfo(q_CV.dtype).tiny)
    below_CV = smaller_CV.masked_fill_(q_CV >= p_CV, 0)
    beta_C1 = below_CV.sum(-1, keepdim=True)
    return -alpha_C1.log().sum(), q_CV.mul_(beta_C1).sub_(below_CV).div_(alpha_C1)


def divergence(log_p_CV: Tensor, log_r_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Σ KL(r ‖ p) of what is trained from what was, and its gradient with respect to p's logits, p − r."""
    loss = F.kl_div(log_p_CV, log_r_CV, reduction="sum", log_target=True)
    return loss, log_p_CV.exp().sub_(log_r_CV.exp_())


@dataclass(frozen=True)
class AnchorRows:
    """The untouched model's normed states at the labelled rows, its head, and the weight of KL(r ‖ p)."""

    weight: float
    normed_KD: Tensor
    head_VD: Tensor


@dataclass(frozen=True)
class ExitSums:
    """What `SummedExitLoss` sums.

    The first exit learns the labels, with an anchor also r; the others learn its p by `taught`, or without it the
    labels as well. `weights` are the exits' ẽ(t, l), `logits` is what the model does to the head's product.
    """

    weights: tuple[float, ...]
    taught: TaughtLoss | None
    chunk_tokens: int
    anchor: AnchorRows | None = None
    logits: LogitsFunction = AS_IT_IS


class SummedExitLoss(torch.autograd.Function):
    """Σ_l ẽ(t, l) · Σ_k CE(g(x_{l+1}), Y) over exits and labelled rows; called inside the model's `forward`.

    The backward pass merely multiplies the gradients that are left: of the head's weights and of the exits' normed
    states.
    """

    @staticmethod
    def forward(ctx: Any, sums: ExitSums, labels_K: Tensor, head_VD: Tensor, *exits_KD: Tensor) -> Tensor:
        """The loss, in float32 at least; products with the head are in autocast's dtype, if it is on."""
        head = _Head(head_VD, sums.logits, is_trained=ctx.needs_input_grad[2])
        anchor_head = _Head(sums.anchor.head_VD, sums.logits, is_trained=False) if sums.anchor else None
        gradients_KD = [torch.zeros_like(exit_KD) for exit_KD in exits_KD]
        total = torch.zeros((), dtype=head.exact, device=head_VD.device)
        with torch.autocast(head_VD.device.type, enabled=False):
            for start in range(0, len(labels_K), sums.chunk_tokens):
                rows = slice(start, start + sums.chunk_tokens)
                log_r_CV = anchor_head.log_q(sums.anchor.normed_KD[rows])[0] if sums.anchor and anchor_head else None
                chunk = _Chunk(sums, head, labels_K[rows], log_r_CV)
                for number, (exit_KD, gradient_KD) in enumerate(zip(exits_KD, gradients_KD, strict=True)):
                    total += chunk.add(number, exit_KD[rows], gradient_KD[rows])
        ctx.save_for_backward(head.gradient_VD, *gradients_KD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the incoming one."""
        return None, None, *(None if own is None else own * incoming for own in ctx.saved_tensors)


class _Head:
    """An LM head in the dtype of its products, and the gradient of its weights, in float32 at least."""

    def __init__(self, weight_VD: Tensor, logits: LogitsFunction, is_trained: bool) -> None:
        self.logits = logits
        device = weight_VD.device.type
        is_cast = weight_VD.dtype == torch.float32 and torch.is_autocast_enabled(device)
        self.weight_VD = weight_VD.to(torch.get_autocast_dtype(device)) if is_cast else weight_VD
        self.exact = torch.promote_types(weight_VD.dtype, torch.float32)
        self.gradient_VD = torch.zeros_like(weight_VD, dtype=self.exact) if is_trained else None

    def log_q(self, normed_CD: Tensor) -> tuple[Tensor, Tensor | float]:
        """log softmax of the logits, (C, V), and the logits' slope, by which gradients go back to the product."""
        logits_CV = self.logits((normed_CD.to(self.weight_VD.dtype) @ self.weight_VD.T).to(self.exact))
        return logits_CV.log_softmax(-1), self.logits.slope(logits_CV)

    def back(self, weight: float, gradient_CV: Tensor, normed_CD: Tensor) -> Tensor:
        """Adds an exit's weighted gradient to that of the weights, and gives that of its normed states, (C, D)."""
        gradient_CV = gradient_CV.to(self.weight_VD.dtype)
        if self.gradient_VD is not None:
            normed_CD = normed_CD.to(gradient_CV.dtype)
            if self.gradient_VD.dtype == gradient_CV.dtype:
                self.gradient_VD.addmm_(gradient_CV.T, normed_CD, alpha=weight)
            else:  # No product of 16-bit numbers can be added to float32 at once.
                self.gradient_VD.add_(gradient_CV.T @ normed_CD, alpha=weight)
        return weight * (gradient_CV @ self.weight_VD)


class _Chunk:
    """Some rows: the exits go through it one after the other, the first of which teaches the others."""

    def __init__(self, sums: ExitSums, head: _Head, labels_C: Tensor, log_r_CV: Tensor | None) -> None:
        self.sums = sums
        self.head = head
        self.labels_C = labels_C
        self.log_r_CV = log_r_CV
        self.p_CV: Tensor | None = None

    def add(self, number: int, normed_CD: Tensor, into_CD: Tensor) -> Tensor:
        """The weighted loss of an exit; the gradient of its normed states is put where it belongs."""
        weight, (log_q_CV, slope_CV) = self.sums.weights[number], self.head.log_q(normed_CD)
        loss, gradient_CV = self._learn(log_q_CV)
        loss = weight * loss
        if self.sums.anchor and self.log_r_CV is not None:
            drift, own_CV = divergence(log_q_CV, self.log_r_CV)
            self.log_r_CV = None  # The last layer alone is anchored.
            loss += self.sums.anchor.weight * drift
            gradient_CV.mul_(weight).add_(own_CV, alpha=self.sums.anchor.weight)
            weight = 1.0
        if self.sums.taught and self.p_CV is None:
            self.p_CV = log_q_CV.exp_()
        if isinstance(slope_CV, Tensor) or slope_CV != 1:
            gradient_CV.mul_(slope_CV)
        if weight:
            into_CD.copy_(self.head.back(weight, gradient_CV, normed_CD))
        return loss

    def _learn(self, log_q_CV: Tensor) -> tuple[Tensor, Tensor]:
        """The unweighted loss, by the first exit's distribution where it teaches, and its gradient."""
        if self.sums.taught and self.p_CV is not None:
            return self.sums.taught(log_q_CV, self.p_CV)
        return cross_entropy(log_q_CV, self.labels_C)
