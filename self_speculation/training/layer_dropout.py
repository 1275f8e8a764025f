"""Layer dropout (section 4.1.1 of the paper): a dropped sample skips the whole layer.

    x_{l+1,t} = x_{l,t} + M(p_{l,t}) · f_l(x_{l,t}),    p_{l,t} = S(t) · D(l) · p_max

In the order of this file: D(l), S(t), the rates p_{l,t}, the draws M(p), and the layers with dropout. Layers are
numbered l = 0 … L−1; t is the training step, of T. Beside the paper's S(t) and D(l) stand those of its first author's
later work (arXiv 2609.05275), and its 1/(1−p).

Shapes: B batch, T positions, D hidden size, K rows of the batch that are kept.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from self_speculation.training.choices import DepthSchedule, TimeSchedule


def depth_scale(layer: int, num_layers: int, schedule: DepthSchedule = "exponential") -> float:
    """D(l) of section 4.1.1: exp(l · ln 2 / (L−1)) − 1, from 0 at the first layer to 1 at the last.

    The later work's is l/(L−1), "linear"; "constant" is 1 for every layer.
    """
    if schedule == "constant":
        return 1.0
    share = layer / max(num_layers - 1, 1)
    return share if schedule == "linear" else math.expm1(share * math.log(2))


def time_scale(step: int, num_steps: int, schedule: TimeSchedule) -> float:
    """S(t) of section 4.1.1: 1 for continual training, exp(t · ln 2 / (T−1)) − 1 from scratch.

    The later work's is 1 − t/(T−1), "decreasing".
    """
    if schedule == "constant":
        return 1.0
    share = step / max(num_steps - 1, 1)
    return 1.0 - share if schedule == "decreasing" else math.expm1(share * math.log(2))


@dataclass(frozen=True)
class DropoutRates:
    """p_{l,t} of section 4.1.1, for every layer l and step t; p_max is the rate that the last layer can reach."""

    p_max: float
    num_layers: int
    num_steps: int
    schedule: TimeSchedule
    depth: DepthSchedule = "exponential"

    def at(self, layer: int, step: int) -> float:
        """p_{l,t} = S(t) · D(l) · p_max, a probability."""
        scale = time_scale(step, self.num_steps, self.schedule) * depth_scale(layer, self.num_layers, self.depth)
        return scale * self.p_max


def kept_rows(batch_size: int, rate: float, key: tuple[int, ...]) -> list[int]:
    """The samples whose draw M(p) is 1, which the layer does not drop: a pure function of the key.

    The key is (seed, step, micro-batch, layer), so that all ranks, a resumed run and the second forward of gradient
    checkpointing drop the same samples.
    """
    draws = random.Random(repr(key))
    return [row for row in range(batch_size) if draws.random() >= rate]


class LayerDropout:
    """Layer dropout (section 4.1.1) over a list of decoder layers, attached to their `forward`; removable again.

    Parameter names, `save_pretrained` and gradient checkpointing see the layers unchanged. The trainer sets `step`
    and `micro_batch` before each forward pass. With `rescale`, what a kept sample's layer adds is divided by 1 − p, so
    that its expectation is that of the whole model.
    """

    def __init__(self, layers: Sequence[nn.Module], rates: DropoutRates, seed: int, rescale: bool = False) -> None:
        self.layers = list(layers)
        self.rates = rates
        self.seed = seed
        self.rescale = rescale
        self.step = 0
        self.micro_batch = 0

    def attach(self) -> None:
        """Put the dropout in front of every layer's `forward`."""
        for index, layer in enumerate(self.layers):
            layer.forward = self._dropping(layer, index, layer.forward)

    def remove(self) -> None:
        """Give every layer its class's `forward` back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def _dropping(self, layer: nn.Module, index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`forward` with M(p) in front: x_{l+1,t} = x_{l,t} + M(p_{l,t}) · f_l(x_{l,t})."""

        @torch.compiler.disable(recursive=False)
        @wraps(forward)
        def forward_kept_rows(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            rate = self.rates.at(index, self.step) if layer.training else 0.0
            batch_size = hidden_BTD.shape[0]
            rows = kept_rows(batch_size, rate, (self.seed, self.step, self.micro_batch, index))
            if len(rows) == batch_size:
                return self._rescaled(hidden_BTD, forward(hidden_BTD, *args, **kwargs), rate)
            if not rows:
                return hidden_BTD + _zero_through(layer)
            index_K = torch.tensor(rows, device=hidden_BTD.device)
            args, kwargs = _select_rows((args, kwargs), index_K, batch_size)
            kept_KTD = hidden_BTD[index_K]
            out_KTD = self._rescaled(kept_KTD, forward(kept_KTD, *args, **kwargs), rate)
            return hidden_BTD.index_copy(0, index_K, out_KTD)

        return forward_kept_rows

    def _rescaled(self, hidden_BTD: Tensor, out_BTD: Tensor, rate: float) -> Tensor:
        """x + f(x)/(1−p), from x and the layer's x + f(x)."""
        return torch.lerp(hidden_BTD, out_BTD, 1 / (1 - rate)) if self.rescale and rate else out_BTD


def _zero_through(layer: nn.Module) -> Tensor | int:
    """A zero that depends on every parameter that learns: DDP finds a gradient where the whole batch is dropped."""
    return sum(parameter.sum() * 0.0 for parameter in layer.parameters() if parameter.requires_grad)


def _select_rows(value: Any, index_K: Tensor, batch_size: int) -> Any:
    """The kept rows of every tensor with a batch dimension, in nested tuples and dicts."""
    if isinstance(value, Tensor):
        return value[index_K] if value.dim() and value.shape[0] == batch_size > 1 else value
    if isinstance(value, tuple):
        return tuple(_select_rows(item, index_K, batch_size) for item in value)
    if isinstance(value, dict):
        return {key: _select_rows(item, index_K, batch_size) for key, item in value.items()}
    return value
