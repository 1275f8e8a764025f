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
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.fused_layers import FusedLayer, fuse, fused_layer
from self_speculation.decoding.large_pages import Arena
from self_speculation.exit_adapter import ExitAdapter
from self_speculation.families import family_of

SOURCE = Path(__file__).with_suffix(".cpp")
# The model's attribute that holds its kernels.
ATTRIBUTE = "width_invariant"
# The family that the library is written for.
FAMILY = "llama"
# Each with the type in which its sums are taken.
WIDE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


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


class WidthInvariantKernels:
    """Runs the layers and the LM head of one model, whose matrices are moved into one piece of memory.

    Raises:
        ValueError: the model is not plain enough, or there is no C++ compiler.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        fuse(model)
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"--exact True: {reason}.")
        self.model = model
        self.dtype = model.model.norm.weight.dtype
        move_into_large_pages(model)
        self.pointers = _pointers(model)
        self.fused = sorted(filter(None, map(fused_layer, _layers(model))), key=lambda layer: layer.index)
        self.layers = (_Layer * len(self.fused))(*map(_weights_of, self.fused))
        self.caches: list[Tensor | None] = []
        self.rotary: tuple[Tensor, Tensor] | None = None
        name = str(self.dtype).removeprefix("torch.")
        self.run, self.read = (getattr(_library(), f"{function}_{name}") for function in ("run_layers", "read_head"))

    @classmethod
    def of(cls, model: PreTrainedModel) -> "WidthInvariantKernels":
        """The model's kernels: made once, and anew when its weights were moved since."""
        known = vars(model).get(ATTRIBUTE)
        if known is None or known.pointers != _pointers(model):
            known = vars(model)[ATTRIBUTE] = cls(model)
        return known

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is copied, or sent to another process, has weights elsewhere, and no kernels yet."""
        return type(None), ()

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

    def run_adapter(
        self, adapter: ExitAdapter, exit_states_BTD: Tensor, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves an exit adapter's layer (B, T, D), the one after the model's last."""
        last = self.model.config.num_hidden_layers
        return self.run_layers(exit_states_BTD, range(last, last + 1), positions_BT, cache)

    def logits(self, hidden_BTD: Tensor, norm: nn.Module, draft_head: DraftHead | None = None) -> Tensor:
        """Logits (B, T, V) of hidden states: a norm, then the LM head, or the one that drafts."""
        head_VD: Tensor = self.model.lm_head.weight if draft_head is None else draft_head.rows_ND
        hidden_BTD, weight_D = hidden_BTD.contiguous(), norm.get_parameter("weight")
        logits_BTV = hidden_BTD.new_empty(*hidden_BTD.shape[:2], len(head_VD))
        self.read(
            *map(
                ctypes.c_void_p, (hidden_BTD.data_ptr(), weight_D.data_ptr(), head_VD.data_ptr(), logits_BTV.data_ptr())
            ),
            ctypes.c_double(self.model.config.rms_norm_eps),
            *map(ctypes.c_int64, (hidden_BTD.shape[:2].numel(), *head_VD.shape, torch.get_num_threads())),
        )
        return logits_BTV if draft_head is None else draft_head.spread(logits_BTV)

    def _attach(self, cache: PositionAddressedCache, hidden_BTD: Tensor) -> None:
        """Point the layers at a cache, whose tensors change when rows leave a batch or another one begins."""
        if len(self.caches) == 2 * len(cache.keys) and all(
            own is other for own, other in zip(self.caches, (*cache.keys, *cache.values), strict=True)
        ):
            return
        for fused, layer in zip(self.fused, self.layers, strict=True):
            like = hidden_BTD.new_empty(len(hidden_BTD), fused.num_key_heads, 0, fused.head_dim)
            keys, values = cache.buffers(fused.index, like, like)
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self.caches = [*cache.keys, *cache.values]

    def _rotary(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (C, K) of the rotary embedding for all positions, in the type of the sums."""
        if self.rotary is None or len(self.rotary[0]) < capacity:
            sample, positions_1C = torch.empty(0, dtype=WIDE[self.dtype]), torch.arange(capacity)[None]
            cosines_1CK, sines_1CK = self.model.model.rotary_emb(sample, position_ids=positions_1C)
            self.rotary = cosines_1CK[0].contiguous(), sines_1CK[0].contiguous()
        return self.rotary


def move_into_large_pages(model: PreTrainedModel) -> None:
    """Let a model's matrices lie side by side; its parameters stay what they are, elsewhere."""
    layers = [(layer, fused) for layer in _layers(model) if (fused := fused_layer(layer)) is not None]
    head = model.lm_head.weight
    arena = Arena([head, *(matrix for _, fused in layers for matrix in fused.matrices())])
    for layer, fused in layers:
        fused.move(layer, arena.place)
    head.data = arena.place(head.data)


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model, whose layers were fused, cannot be run by these kernels, in half a sentence; None if it can."""
    if model.config.model_type != FAMILY:
        return f"{family_of(model).name} models have no passes whose width does not matter, only Llama models have"
    head, norm = model.lm_head, model.model.norm
    weights = [
        norm.weight,
        head.weight,
        *(parameter for layer in model.model.layers for parameter in layer.parameters()),
    ]
    if any(weight.device.type != "cpu" for weight in weights):
        return "only a model that is on the CPU as a whole has passes whose width does not matter"
    is_plain = type(norm) is LlamaRMSNorm and type(head) is nn.Linear and head.bias is None
    if not is_plain or any(fused_layer(layer) is None for layer in _layers(model)):
        return "this model has other modules than a plain Llama's, or hooks"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= WIDE.keys():
        return f"this model's weights are not all of one of {', '.join(map(str, WIDE))}".replace("torch.", "")
    if not all(weight.is_contiguous() for weight in weights):
        return "this model has a weight that does not lie in one piece"
    try:
        _library()
    # The compiler's errors are of many kinds, and private.
    except Exception as error:
        return f"the passes could not be built by a C++ compiler ({str(error).strip().partition(chr(10))[0]})"
    return None


def _layers(model: PreTrainedModel) -> list[Any]:
    """The model's decoder layers, and its exit adapter's."""
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def _pointers(model: PreTrainedModel) -> list[int]:
    return [weight.data_ptr() for weight in model.parameters()]


def _weights_of(layer: FusedLayer) -> _Layer:
    weights = (
        layer.attention_norm.weight,
        layer.heads,
        layer.attention_out,
        layer.mlp_norm.weight,
        layer.gate_up,
        layer.mlp_out,
    )
    return _Layer(*(weight.data_ptr() for weight in weights), None, None)


@once
def _library() -> Any:
    """The library, built now, earlier, or by another process."""
    from torch._inductor.codecache import CppCodeCache

    with Console(stderr=True).status("Building the passes for this processor: seconds at first, then kept on disk …"):
        return CppCodeCache.load(SOURCE.read_text())
