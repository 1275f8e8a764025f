"""What kernels of our own for a plain Llama have in common, on whichever device they run.

In their passes no row depends on how many stand beside it, so drafting token by token, verifying d+1 tokens at once, a
prompt read in chunks, and every batch give the same numbers, bit for bit, in every dtype.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, C capacity of the cache, K head dimension.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.fused_layers import FusedLayer, fuse, fused_layer, layout
from self_speculation.exit_adapter import ExitAdapter
from self_speculation.families import family_of

# The model's attribute that holds its kernels.
ATTRIBUTE = "width_invariant"
# The family that they are written for.
FAMILY = "llama"
# Each with the type in which its sums are taken.
WIDE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


class PlainLlamaKernels(ABC):
    """Runs the layers and the LM head of one model, on devices of one type.

    Raises:
        ValueError: the model is not plain enough, or what the kernels are built with is missing.
    """

    device_type: ClassVar[str]
    backend: ClassVar[str | None]

    def __init__(self, model: PreTrainedModel) -> None:
        fuse(model)
        reason = self.why_not(model)
        if reason is not None:
            raise ValueError(f"--exact True: {reason}.")
        self.model = model
        self.dtype = model.model.norm.weight.dtype
        self.layout = layout(model)
        self.fused = sorted(filter(None, map(fused_layer, layers_of(model))), key=lambda layer: layer.index)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The model's kernels: made once, and anew when its weights were moved since, or its modules are others."""
        known = vars(model).get(ATTRIBUTE)
        if not isinstance(known, cls) or known.layout != layout(model):
            known = vars(model)[ATTRIBUTE] = cls(model)
        return known

    @classmethod
    def why_not(cls, model: PreTrainedModel) -> str | None:
        """Why a model, whose layers were fused, cannot be run by these kernels, in half a sentence; None if it can."""
        return _why_not_plain(model, cls.device_type) or cls.why_not_built(model)

    @classmethod
    @abstractmethod
    def why_not_built(cls, model: PreTrainedModel) -> str | None:
        """Why the kernels cannot be built here, in half a sentence; None if they can, and are."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is copied, or sent to another process, has weights elsewhere, and no kernels yet."""
        return type(None), ()

    @abstractmethod
    def run_layers(
        self, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves the layers (B, T, D), which read and write the cache at the positions."""

    @abstractmethod
    def read_head(self, hidden_BTD: Tensor, norm_D: Tensor, head_VD: Tensor) -> Tensor:
        """Logits (B, T, V) of hidden states: a norm with these weights, then the rows of an LM head."""

    def run_adapter(
        self, adapter: ExitAdapter, exit_states_BTD: Tensor, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves an exit adapter's layer (B, T, D), the one after the model's last."""
        last = self.model.config.num_hidden_layers
        return self.run_layers(exit_states_BTD, range(last, last + 1), positions_BT, cache)

    def logits(self, hidden_BTD: Tensor, norm: nn.Module, draft_head: DraftHead | None = None) -> Tensor:
        """Logits (B, T, V) of hidden states: a norm, then the LM head, or the one that drafts."""
        head_VD: Tensor = self.model.lm_head.weight if draft_head is None else draft_head.rows_ND
        logits_BTV = self.read_head(hidden_BTD, norm.get_parameter("weight"), head_VD)
        return logits_BTV if draft_head is None else draft_head.spread(logits_BTV)

    def rotary(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (C, K) of the rotary embedding for all positions, in the type of the sums, on the CPU."""
        sample, positions_1C = torch.empty(0, dtype=WIDE[self.dtype]), torch.arange(capacity)[None]
        cosines_1CK, sines_1CK = self.model.model.rotary_emb(sample, position_ids=positions_1C)
        return cosines_1CK[0].contiguous(), sines_1CK[0].contiguous()


def buffers(cache: PositionAddressedCache, layer: FusedLayer, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, for as many rows as there are hidden states of."""
    like = hidden_BTD.new_empty(len(hidden_BTD), layer.num_key_heads, 0, layer.head_dim)
    return cache.buffers(layer.index, like, like)


def weights_of(layer: FusedLayer) -> list[Tensor]:
    """All that a pass reads, in its order."""
    return [
        layer.attention_norm.weight,
        layer.heads,
        layer.attention_out,
        layer.mlp_norm.weight,
        layer.gate_up,
        layer.mlp_out,
    ]


def layers_of(model: PreTrainedModel) -> list[Any]:
    """The model's decoder layers, and its exit adapter's."""
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def _why_not_plain(model: PreTrainedModel, device_type: str) -> str | None:
    if model.config.model_type != FAMILY:
        return f"{family_of(model).name} models have no passes whose width does not matter, only Llama models have"
    head, norm = model.lm_head, model.model.norm
    weights = [
        norm.weight,
        head.weight,
        *(parameter for layer in model.model.layers for parameter in layer.parameters()),
    ]
    devices = {weight.device for weight in weights}
    if len(devices) > 1 or devices.pop().type != device_type:
        where = "on the CPU as a whole, or on one CUDA device,"
        return f"only a model that is {where} has passes whose width does not matter"
    is_plain = type(norm) is LlamaRMSNorm and type(head) is nn.Linear and head.bias is None
    if not is_plain or any(fused_layer(layer) is None for layer in layers_of(model)):
        return "this model has other modules than a plain Llama's, or hooks"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= WIDE.keys():
        return f"this model's weights are not all of one of {', '.join(map(str, WIDE))}".replace("torch.", "")
    if not all(weight.is_contiguous() for weight in weights):
        return "this model has a weight that does not lie in one piece"
    return None
