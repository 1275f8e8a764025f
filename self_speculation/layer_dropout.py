# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""Layer dropout (section 4.1.1 of the paper): a dropped sample skips the whole layer.

    x_{l+1,t} = x_{l,t} + M(p_{l,t}) · f_l(x_{l,t}),    p_{l,t} = S(t) · D(l) · p_max

Shapes: B batch, T positions, D hidden size, K rows of the batch that are kept.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

TimeSchedule = Literal["exponential", "constant"]


def depth_scale(layer: int, num_layers: int) -> float:
    """D(l) = exp(l · ln 2 / (L−1)) − 1: 0 at the first layer, 1 at the last."""
    return math.expm1(layer * math.log(2) / max(num_layers - 1, 1))


def time_scale(step: int, num_steps: int, schedule: TimeSchedule) -> float:
    """S(t): 1 for continual training, exp(t · ln 2 / (T−1)) − 1 from scratch."""
    return 1.0 if schedule == "constant" else math.expm1(step * math.log(2) / max(num_steps - 1, 1))


@dataclass(frozen=True)
class DropoutRates:
    """p_{l,t} for every layer l and step t."""

    p_max: float
    num_layers: int
    num_steps: int
    schedule: TimeSchedule

    def at(self, layer: int, step: int) -> float:
        """p_{l,t} = S(t) · D(l) · p_max, a probability."""
        scale = time_scale(step, self.num_steps, self.schedule) * depth_scale(layer, self.num_layers)
        return scale * self.p_max


def kept_rows(batch_size: int, rate: float, key: tuple[int, ...]) -> list[int]:
    """The samples that a layer does not drop, M(p) = 1: a pure function of the key.

    The key is (seed, step, micro-batch, layer), so that all ranks, a resumed run and the second forward of gradient
    checkpointing drop the same samples.
    """
    draws = random.Random(repr(key))
    return [row for row in range(batch_size) if draws.random() >= rate]


class LayerDropout:
    """Layer dropout over a list of decoder layers, attached to their `forward` and removable again.

    Parameter names, `save_pretrained` and gradient checkpointing see the layers unchanged. The trainer sets `step`
    and `micro_batch` before each forward pass.
    """

    def __init__(self, layers: Sequence[nn.Module], rates: DropoutRates, seed: int) -> None:
        self.layers = list(layers)
        self.rates = rates
        self.seed = seed
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

    def _kept_rows(self, batch_size: int, layer: int) -> list[int]:
        rate = self.rates.at(layer, self.step)
        return kept_rows(batch_size, rate, (self.seed, self.step, self.micro_batch, layer))

    def _dropping(self, layer: nn.Module, index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @torch.compiler.disable(recursive=False)
        @wraps(forward)
        def forward_kept_rows(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batch_size = hidden_BTD.shape[0]
            rows = self._kept_rows(batch_size, index) if layer.training else range(batch_size)
            if len(rows) == batch_size:
                return forward(hidden_BTD, *args, **kwargs)
            if not rows:
                return hidden_BTD + _zero_through(layer)
            index_K = torch.tensor(rows, device=hidden_BTD.device)
            args, kwargs = _select_rows((args, kwargs), index_K, batch_size)
            return hidden_BTD.index_copy(0, index_K, forward(hidden_BTD[index_K], *args, **kwargs))

        return forward_kept_rows


def _zero_through(layer: nn.Module) -> Tensor:
    """A zero that depends on every parameter, so that DDP finds a gradient where the whole batch is dropped."""
    return sum(parameter.sum() * 0.0 for parameter in layer.parameters())


def _select_rows(value: Any, index_K: Tensor, batch_size: int) -> Any:
    """The kept rows of every tensor with a batch dimension, in nested tuples and dicts."""
    if isinstance(value, Tensor):
        return value[index_K] if value.dim() and value.shape[0] == batch_size > 1 else value
    if isinstance(value, tuple):
        return tuple(_select_rows(item, index_K, batch_size) for item in value)
    if isinstance(value, dict):
        return {key: _select_rows(item, index_K, batch_size) for key, item in value.items()}
    return value
