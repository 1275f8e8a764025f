"""Passes of a plain Llama on a CPU in which no row depends on how many stand beside it (`width_invariant.cpp`).

So drafting token by token, verifying d+1 tokens at once, a prompt read in chunks, and every batch give the same
numbers, bit for bit, in every dtype; and weights are read at the memory's speed. The library is built at first use by
the C++ compiler that torch's own compiler needs, in seconds, and kept on disk. It serves every layer, exit and draft
length.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, C capacity of the cache, K head dimension.
"""

import ctypes
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.fused_layers import FusedLayer, fused_layer, layout
from self_speculation.decoding.large_pages import Arena
from self_speculation.decoding.plain_llama import PlainLlamaKernels, buffers, layers_of, weights_of

SOURCE = Path(__file__).with_suffix(".cpp")


class _Layer(ctypes.Structure):
    """Mirrors `Layer` there."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("attention_norm", "heads", "attention_out", "mlp_norm", "gate_up", "mlp_out", "keys", "values")
    ]


class _Pass(ctypes.Structure):
    """Mirrors `Pass` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "hidden_size", "inner_size", "query_heads")),
        *((name, ctypes.c_int64) for name in ("key_heads", "head_dim", "capacity", "num_layers", "threads")),
        *((name, ctypes.c_double) for name in ("epsilon", "scale")),
        *((name, ctypes.c_void_p) for name in ("positions", "cosines", "sines", "layers", "states", "result")),
    ]


class WidthInvariantKernels(PlainLlamaKernels):
    """Runs the layers and the LM head of one model, whose matrices are moved into one piece of memory."""

    device_type = "cpu"
    # They are what compiling would come to.
    backend = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        move_into_large_pages(model)
        self.layout = layout(model)
        self.layers = (_Layer * len(self.fused))(*map(_weights_of, self.fused))
        self.caches: list[Tensor | None] = []
        self.table: tuple[Tensor, Tensor] | None = None
        name = str(self.dtype).removeprefix("torch.")
        self.run, self.read = (getattr(_library(), f"{function}_{name}") for function in ("run_layers", "read_head"))

    @classmethod
    def why_not_built(cls, model: PreTrainedModel) -> str | None:
        """Why there is no library."""
        try:
            _library()
        # The compiler's errors are of many kinds, and private.
        except Exception as error:
            return f"the passes could not be built by a C++ compiler ({str(error).strip().partition(chr(10))[0]})"
        return None

    def run_layers(
        self, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves the layers (B, T, D), which read and write the cache at the positions."""
        if not layers:
            return hidden_BTD
        self._attach(cache, hidden_BTD)
        config, fused = self.model.config, self.fused[layers.start]
        hidden_BTD, positions_BT, result_BTD = (
            hidden_BTD.contiguous(),
            positions_BT.contiguous(),
            hidden_BTD.new_empty(hidden_BTD.shape),
        )
        cosines_CK, sines_CK = self._rotary(cache.capacity)
        self.run(
            ctypes.byref(
                _Pass(
                    *positions_BT.shape,
                    config.hidden_size,
                    config.intermediate_size,
                    config.num_attention_heads,
                    fused.num_key_heads,
                    fused.head_dim,
                    cache.capacity,
                    len(layers),
                    torch.get_num_threads(),
                    config.rms_norm_eps,
                    fused.head_dim**-0.5,
                    positions_BT.data_ptr(),
                    cosines_CK.data_ptr(),
                    sines_CK.data_ptr(),
                    ctypes.addressof(self.layers) + layers.start * ctypes.sizeof(_Layer),
                    hidden_BTD.data_ptr(),
                    result_BTD.data_ptr(),
                )
            )
        )
        return result_BTD

    def read_head(self, hidden_BTD: Tensor, norm_D: Tensor, head_VD: Tensor) -> Tensor:
        """Logits (B, T, V) of hidden states: a norm with these weights, then the rows of an LM head."""
        hidden_BTD = hidden_BTD.contiguous()
        logits_BTV = hidden_BTD.new_empty(*hidden_BTD.shape[:2], len(head_VD))
        tensors = (hidden_BTD, norm_D, head_VD, logits_BTV)
        self.read(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            ctypes.c_double(self.model.config.rms_norm_eps),
            *map(ctypes.c_int64, (hidden_BTD.shape[:2].numel(), *head_VD.shape, torch.get_num_threads())),
        )
        return logits_BTV

    def _attach(self, cache: PositionAddressedCache, hidden_BTD: Tensor) -> None:
        """Point the layers at a cache, whose tensors change when rows leave a batch or another one begins."""
        if len(self.caches) == 2 * len(cache.keys) and all(
            own is other for own, other in zip(self.caches, (*cache.keys, *cache.values), strict=True)
        ):
            return
        for fused, layer in zip(self.fused, self.layers, strict=True):
            keys, values = buffers(cache, fused, hidden_BTD)
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self.caches = [*cache.keys, *cache.values]

    def _rotary(self, capacity: int) -> tuple[Tensor, Tensor]:
        """The rotary embedding's table, which is kept."""
        if self.table is None or len(self.table[0]) < capacity:
            self.table = self.rotary(capacity)
        return self.table


def move_into_large_pages(model: PreTrainedModel) -> None:
    """Let a model's matrices lie side by side; its parameters stay what they are, elsewhere."""
    layers = [(layer, fused) for layer in layers_of(model) if (fused := fused_layer(layer)) is not None]
    head = model.lm_head.weight
    arena = Arena([head, *(matrix for _, fused in layers for matrix in fused.matrices())])
    for layer, fused in layers:
        fused.move(layer, arena.place)
    head.data = arena.place(head.data)


def _weights_of(layer: FusedLayer) -> _Layer:
    return _Layer(*(weight.data_ptr() for weight in weights_of(layer)), None, None)


@once
def _library() -> Any:
    """The library, built now, earlier, or by another process."""
    from torch._inductor.codecache import CppCodeCache

    with Console(stderr=True).status("Building the passes for this processor: seconds at first, then kept on disk …"):
        return CppCodeCache.load(SOURCE.read_text())
