"""A model cut at a layer (section 4.2 of the paper).

`run_layers` runs any of its layers, `exit_logits` the final norm and LM head that all exits share; `forward_adapter`
runs an exit adapter, where a model has one. This is the only file that knows how transformers calls a decoder layer.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.decoding.cache import Uncached
from self_speculation.decoding.fused_layers import KeyValueAccess, SharedInputs, fused_layer, is_summed, linear
from self_speculation.exit_adapter import ExitAdapter
from self_speculation.families import LayerKind, embed, family_of, logits_function

if TYPE_CHECKING:
    from self_speculation.decoding.draft_head import DraftHead


class KeyValueStore(Protocol):
    """Where keys and values come from: the cache, or nothing but the pass itself."""

    def access(self, positions_BT: Tensor) -> KeyValueAccess:
        """What a pass over these positions may read and write."""


def check_exit_layer(exit_layer: int | None, model: PreTrainedModel) -> int:
    """The exit layer, if the model has it."""
    num_layers = model.config.num_hidden_layers
    if exit_layer is None or not 1 <= exit_layer <= num_layers:
        raise ValueError(f"--exit_layer must lie between 1 and {num_layers}, the model's layers, not {exit_layer}.")
    return exit_layer


def token_device(model: PreTrainedModel) -> torch.device:
    """Where tokens live: with the embeddings, or on the CPU while those are offloaded."""
    device = model.model.embed_tokens.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def num_caches(model: PreTrainedModel) -> int:
    """How many layers cache keys and values: the model's, and its exit adapter's."""
    return len(model.model.layers) + sum(isinstance(module, ExitAdapter) for module in model.children())


def run_layers(
    model: PreTrainedModel, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: KeyValueStore
) -> Tensor:
    """Run the given layers over hidden states at the given positions, reading and writing the cache."""
    modules = [(layer, model.model.layers[layer]) for layer in layers]
    return _run(model, hidden_BTD, modules, positions_BT, cache) if modules else hidden_BTD


def _run(
    model: PreTrainedModel,
    hidden_BTD: Tensor,
    layers: Sequence[tuple[int, nn.Module]],
    positions_BT: Tensor,
    cache: KeyValueStore,
) -> Tensor:
    """Run layers one after the other, each of which comes with the number of one of the model's layers of its kind."""
    access, kind_of = cache.access(positions_BT), family_of(model).kind
    inputs: dict[LayerKind, dict[str, Any]] = {}
    shared: dict[LayerKind, SharedInputs] = {}
    for number, layer in layers:
        kind, fused = kind_of(model.config, number), fused_layer(layer)
        if kind not in inputs:
            inputs[kind] = _inputs(model, kind, hidden_BTD, access)
        own = inputs[kind]
        if fused is None:
            hidden_BTD = layer(hidden_BTD, **own)
            continue
        if kind not in shared:
            shared[kind] = SharedInputs.of(own["position_embeddings"], own["attention_mask"], fused.num_groups)
        hidden_BTD = fused(hidden_BTD, shared[kind], access)
    return hidden_BTD


def _inputs(model: PreTrainedModel, kind: LayerKind, hidden_BTD: Tensor, access: KeyValueAccess) -> dict[str, Any]:
    """What layers of a kind take in a pass, besides hidden states."""
    named = {} if kind.rotary is None else {"layer_type": kind.rotary}
    if family_of(model).attention == "sdpa":
        mask_B1TW = access.mask(kind.window)
    else:  # Others add their mask to the scores, and are not causal by themselves.
        hidden = torch.full((), float("-inf"), dtype=hidden_BTD.dtype, device=access.positions_BT.device)
        mask_B1TW = torch.where(access.whole_mask(kind.window), 0.0, hidden)
    return {
        "attention_mask": mask_B1TW,
        "position_ids": access.positions_BT,
        "past_key_values": access,
        "use_cache": True,
        "position_embeddings": model.model.rotary_emb(hidden_BTD, position_ids=access.positions_BT, **named),
    }


def exit_logits(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states that leave any layer: the final norm and the LM head."""
    return head_logits(model, model.model.norm(hidden_BTD))


def head_logits(model: PreTrainedModel, normed_BTD: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states behind a norm: the LM head, and what the model's family does to its product."""
    head = model.lm_head
    is_plain = type(head) is nn.Linear and head.bias is None
    product_BTV = linear(normed_BTD, head.weight) if is_summed(normed_BTD) and is_plain else head(normed_BTD)
    return logits_function(model)(product_BTV)


def forward_adapter(
    model: PreTrainedModel,
    adapter: ExitAdapter,
    exit_states_BTD: Tensor,
    positions_BT: Tensor,
    cache: KeyValueStore,
) -> Tensor:
    """What the LM head reads of an exit adapter (B, T, D), from the exit states; its keys and values are cached."""
    return adapter.norm(run_adapter_layer(model, adapter, exit_states_BTD, positions_BT, cache))


def run_adapter_layer(
    model: PreTrainedModel,
    adapter: ExitAdapter,
    exit_states_BTD: Tensor,
    positions_BT: Tensor,
    cache: KeyValueStore,
) -> Tensor:
    """What leaves an exit adapter's layer (B, T, D), before its norm."""
    return _run(model, exit_states_BTD, [(adapter.exit_layer, adapter.layer)], positions_BT, cache)


@dataclass(frozen=True)
class TorchKernels:
    """The layers as torch runs them, written or compiled, on every device."""

    model: PreTrainedModel
    backend: str = "inductor"

    def run_layers(self, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: KeyValueStore) -> Tensor:
        """What leaves the layers (B, T, D)."""
        return run_layers(self.model, hidden_BTD, layers, positions_BT, cache)

    def run_adapter(
        self, adapter: ExitAdapter, exit_states_BTD: Tensor, positions_BT: Tensor, cache: KeyValueStore
    ) -> Tensor:
        """What leaves an exit adapter's layer (B, T, D)."""
        return run_adapter_layer(self.model, adapter, exit_states_BTD, positions_BT, cache)

    def logits(self, hidden_BTD: Tensor, norm: nn.Module, draft_head: "DraftHead | None" = None) -> Tensor:
        """Logits (B, T, V)."""
        normed_BTD = norm(hidden_BTD)
        return head_logits(self.model, normed_BTD) if draft_head is None else draft_head.logits(normed_BTD)


def forward_exits(model: PreTrainedModel, tokens_BT: Tensor, exit_layers: Sequence[int]) -> Iterator[Tensor]:
    """Hidden states (B, T, D) at each of the exit layers, which ascend: one pass without a cache, as far as the last.

    Rows start at position 0 and are padded on the right.
    """
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    hidden_BTD = embed(model, tokens_BT)
    for first, last in itertools.pairwise([0, *exit_layers]):
        hidden_BTD = run_layers(model, hidden_BTD, range(first, last), positions_BT, Uncached())
        yield hidden_BTD
