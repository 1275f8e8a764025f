"""Llama's decoder layers with their weights side by side: one product for q, k and v, one for gate and up.

The fused matrices are the storage, and the model's parameters become views of them: memory stays the same, and the
model stays an ordinary one. What moves the parameters (`.to()`, loading with `assign=True`) breaks the views, so
`fuse` looks at them before every generation. Layers that are not plain (quantised, adapted, hooked, replaced) are left
to transformers.

Shapes: B batch, T positions of this pass, W visible keys, D hidden size, H query heads, G query heads for each of the
key-value heads, K head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

# The longest call whose queries are folded: there it saves time, and its mask is small.
MOST_FOLDED = 64
PLAIN_MODULES = {LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, nn.Linear, SiLUActivation}


class KeyValueAccess(Protocol):
    """What one pass over some positions (B, T) may read and write."""

    @property
    def positions_BT(self) -> Tensor:  # noqa: N802 (a shape)
        """The positions."""

    def mask(self, window: int | None = None) -> Tensor | None:
        """The keys that each position sees, (B, 1, T, W); None where `sdpa` is right by itself."""

    def whole_mask(self, window: int | None = None) -> Tensor:
        """The same where `sdpa` is not asked."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, T, K) of a layer; returns those that its queries read, (B, H, W, K)."""


@dataclass(frozen=True)
class SharedInputs:
    """What all layers of a pass share: rotary cosines and signed sines (B, T, 1, K), and the mask.

    `mask_B1TW` has the visible keys; None at prefill, where attention is causal by itself. For short calls it is
    `folded` too: added to the scores, (B, 1, G·T, W), for the queries that share a key head stand in one row.
    """

    cos_BT1K: Tensor
    sin_BT1K: Tensor
    mask_B1TW: Tensor | None
    folded: Tensor | None

    @classmethod
    def of(cls, rotary: tuple[Tensor, Tensor], mask_B1TW: Tensor | None, num_groups: int) -> "SharedInputs":
        """From the rotary embedding's cosines and sines (B, T, K) and the mask of visible keys."""
        cos_BTK, sin_BTK = rotary
        first, second = sin_BTK.chunk(2, dim=-1)
        folded = None
        if mask_B1TW is not None and mask_B1TW.shape[2] <= MOST_FOLDED:
            hidden = torch.full((), float("-inf"), dtype=cos_BTK.dtype, device=cos_BTK.device)
            folded = torch.where(mask_B1TW, 0.0, hidden).repeat(1, 1, num_groups, 1)
        return cls(cos_BTK[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None], mask_B1TW, folded)

    def rotate(self, heads_BTHK: Tensor) -> Tensor:
        """Rotary position embedding: each half of a head is the other's partner."""
        partner_BTHK = heads_BTHK.roll(heads_BTHK.shape[-1] // 2, dims=-1)
        return torch.addcmul(heads_BTHK * self.cos_BT1K, partner_BTHK, self.sin_BT1K)


class FusedLayer:
    """One decoder layer; `heads` and `gate_up` are the fused matrices."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_groups = attention.num_key_value_groups
        self.num_key_heads = attention.k_proj.out_features // attention.head_dim
        self.heads = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _side_by_side(mlp.gate_proj, mlp.up_proj)
        self.attention_out = attention.o_proj.weight
        self.mlp_out = mlp.down_proj.weight
        self.attention_norm = layer.input_layernorm
        self.mlp_norm = layer.post_attention_layernorm

    def is_of(self, layer: LlamaDecoderLayer) -> bool:
        """Whether the layer's parameters still are what is stored here."""
        attention, mlp = layer.self_attn, layer.mlp
        return (
            _lie_in(self.heads, attention.q_proj, attention.k_proj, attention.v_proj)
            and _lie_in(self.gate_up, mlp.gate_proj, mlp.up_proj)
            and self.attention_out is attention.o_proj.weight
            and self.mlp_out is mlp.down_proj.weight
            and self.attention_norm is layer.input_layernorm
            and self.mlp_norm is layer.post_attention_layernorm
        )

    def matrices(self) -> list[Tensor]:
        """All that a pass multiplies with."""
        return [self.heads, self.attention_out, self.gate_up, self.mlp_out]

    def move(self, layer: LlamaDecoderLayer, place: Callable[[Tensor], Tensor]) -> None:
        """Let the layer's matrices lie where `place` copies them; their parameters go with them."""
        attention, mlp = layer.self_attn, layer.mlp
        self.heads = _split(place(self.heads), attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _split(place(self.gate_up), mlp.gate_proj, mlp.up_proj)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.data = place(linear.weight.data)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied model has parameters of its own, which are not fused yet."""

    def __call__(self, hidden_BTD: Tensor, shared: SharedInputs, access: KeyValueAccess) -> Tensor:
        """What leaves the layer (B, T, D)."""
        heads_BTHK = linear(_norm(self.attention_norm, hidden_BTD), self.heads).unflatten(-1, (-1, self.head_dim))
        num_rotated = heads_BTHK.shape[2] - self.num_key_heads
        rotated_BTHK = shared.rotate(heads_BTHK[:, :, :num_rotated])
        query_BTHK, key_BTHK = rotated_BTHK.tensor_split((num_rotated - self.num_key_heads,), dim=2)
        value_BTHK = heads_BTHK[:, :, num_rotated:]
        keys, values = access.update(key_BTHK.transpose(1, 2), value_BTHK.transpose(1, 2), self.index)
        attended_BTD = self._attend(query_BTHK, keys, values, shared)
        hidden_BTD = hidden_BTD + linear(attended_BTD, self.attention_out)
        gate, up = linear(_norm(self.mlp_norm, hidden_BTD), self.gate_up).chunk(2, dim=-1)
        return hidden_BTD + linear(F.silu(gate) * up, self.mlp_out)

    def _attend(self, query_BTHK: Tensor, keys: Tensor, values: Tensor, shared: SharedInputs) -> Tensor:
        """Attention (B, T, H·K); no key is repeated for the queries that share it."""
        mask = shared.folded
        if mask is None:
            attended = F.scaled_dot_product_attention(
                query_BTHK.transpose(1, 2),
                keys,
                values,
                attn_mask=shared.mask_B1TW,
                is_causal=shared.mask_B1TW is None,
                enable_gqa=self.num_groups > 1,
            )
            return attended.transpose(1, 2).flatten(2)
        batch_size, length = query_BTHK.shape[:2]
        query = query_BTHK.unflatten(2, (-1, self.num_groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if is_summed(query_BTHK):
            attended = _attend_by_sums(query, keys, values, mask)
        else:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        attended = attended.unflatten(2, (self.num_groups, length)).permute(0, 3, 1, 2, 4)
        return attended.reshape(batch_size, length, -1)


def linear(x_BTD: Tensor, weight_OD: Tensor) -> Tensor:
    """x Wᵀ, (B, T, O)."""
    if not is_summed(x_BTD):
        return F.linear(x_BTD, weight_OD)
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    return (x_BTD[..., None, :].to(wide) * weight_OD.to(wide)).sum(-1).to(x_BTD.dtype)


def is_summed(x_BTX: Tensor) -> bool:
    """Whether products are written as sums of products: for one position in a graph that is compiled.

    The compiler fuses the sums with what stands around them, and they read each weight once. On a CPU a call of the
    library that multiplies matrices takes several times as long to begin.
    """
    return torch.compiler.is_compiling() and x_BTX.shape[:2] == (1, 1)


def _attend_by_sums(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries (B, H, G, K) to keys and values (B, H, W, K)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query, keys, values = query.to(wide), keys.to(wide), values.to(wide)
    scores = (query[..., None, :] * keys[:, :, None]).sum(-1) * query.shape[-1] ** -0.5 + mask
    return (scores.softmax(-1)[..., None] * values[:, :, None]).sum(-2).to(mask.dtype)


def fuse(model: nn.Module) -> None:
    """Fuse every plain layer that is not fused, or whose parameters were moved since; an exit adapter's too."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    for layer in layers:
        fused = fused_layer(layer)
        if not _is_plain(layer):
            layer.fused = None
        elif fused is None or not fused.is_of(layer):
            layer.fused = FusedLayer(layer)


def layout(model: nn.Module) -> list[object]:
    """What may change about a model between two answers: kinds of modules, their hooks, and where their weights lie.

    While it stays the same, nothing needs to be looked at again; to compare it takes a small part of the time.
    """
    found: list[object] = []
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        found += (type(module), _is_changed(module))
        found += [_place(weight) for weight in module._parameters.values() if weight is not None]
        waiting += [child for child in module._modules.values() if child is not None]
    return found


def _place(weight: Tensor) -> tuple[object, ...]:
    """Where a weight lies; of one that is more than a tensor, which one it is."""
    if type(weight) is not nn.Parameter:
        return (id(weight),)
    return weight.data_ptr(), weight.dtype, weight.stride()


def fused_layer(layer: nn.Module) -> FusedLayer | None:
    """The layer's fused form, if it has one."""
    return vars(layer).get("fused")


def weight_version(weight: Tensor) -> int:
    """How often the weight was changed in place; tensors made in inference mode do not count."""
    return 0 if weight.is_inference() else weight._version


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer is as transformers made it: no other kinds of modules, no biases, no hooks."""
    for module in layer.modules():
        if type(module) not in PLAIN_MODULES or _is_changed(module):
            return False
    weights = dict(layer.named_parameters())
    dtypes = {weight.dtype for weight in weights.values()}
    return (
        len(dtypes) == 1
        and dtypes.pop().is_floating_point
        and all(name.endswith("weight") and not weight.is_meta for name, weight in weights.items())
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether more is done than the module's kind does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@torch.inference_mode(False)
def _side_by_side(*linears: nn.Linear) -> Tensor:
    """The weights as one matrix, of which each becomes a view; one that can be trained, wherever this is called."""
    return _split(torch.cat([linear.weight.data for linear in linears]), *linears)


def _split(fused: Tensor, *linears: nn.Linear) -> Tensor:
    """Make the weights views of the fused matrix, one below the other; returns the matrix."""
    first = 0
    for linear in linears:
        linear.weight.data = fused[first : first + linear.out_features]
        first += linear.out_features
    return fused


def _lie_in(fused: Tensor, *linears: nn.Linear) -> bool:
    """Whether the weights are the fused matrix's rows, in order."""
    pointer = fused.data_ptr()
    for linear in linears:
        if linear.weight.data_ptr() != pointer:
            return False
        pointer += linear.weight.nbytes
    return True


def _norm(norm: LlamaRMSNorm, hidden_BTD: Tensor) -> Tensor:
    return F.rms_norm(hidden_BTD, norm.weight.shape, norm.weight, norm.variance_epsilon)
