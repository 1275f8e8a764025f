"""A Llama model cut at a layer (section 4.2 of the paper).

`run_layers` runs any of its layers, `exit_logits` the final norm and LM head that all exits share; `forward_adapter`
runs an exit adapter, where a model has one. This is the only file that knows how transformers calls a decoder layer.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from self_speculation.decoding.cache import Uncached
from self_speculation.decoding.fused_layers import KeyValueAccess, SharedInputs, fused_layer, is_summed, linear
from self_speculation.exit_adapter import ExitAdapter

if TYPE_CHECKING:
    from self_speculation.decoding.draft_head import DraftHead

ROPE_PER_CALL = ("dynamic", "longrope")


class KeyValueStore(Protocol):
    """Where keys and values come from: the cache, or nothing but the pass itself."""

    def access(self, positions_BT: Tensor) -> KeyValueAccess:
        """What a pass over these positions may read and write."""


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose layers could not be cut and cached by position; switch its attention to `sdpa`.

    Raises:
        ValueError: another family than Llama, or rotary frequencies that depend on the longest position of a call.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"--model is a {type(model).__name__}: only Llama models (LlamaForCausalLM) can exit early.")
    rope_type = (model.config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in ROPE_PER_CALL:
        raise ValueError(
            f"--model uses {rope_type!r} RoPE scaling, whose frequencies change with the length of each call; "
            "drafting and verification would disagree."
        )
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")


def check_exit_layer(exit_layer: int | None, model: LlamaForCausalLM) -> int:
    """The exit layer, if the model has it."""
    num_layers = model.config.num_hidden_layers
    if exit_layer is None or not 1 <= exit_layer <= num_layers:
        raise ValueError(f"--exit_layer must lie between 1 and {num_layers}, the model's layers, not {exit_layer}.")
    return exit_layer


def token_device(model: LlamaForCausalLM) -> torch.device:
    """Where tokens live: with the embeddings, or on the CPU while those are offloaded."""
    device = model.model.embed_tokens.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def num_caches(model: LlamaForCausalLM) -> int:
    """How many layers cache keys and values: the model's, and its exit adapter's."""
    return len(model.model.layers) + sum(isinstance(module, ExitAdapter) for module in model.children())


def embed(model: LlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    """x_0 (B, T, D) of the tokens."""
    return model.model.embed_tokens(tokens_BT)


def run_layers(
    model: LlamaForCausalLM, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: KeyValueStore
) -> Tensor:
    """Run the given layers over hidden states at the given positions, reading and writing the cache."""
    modules = [model.model.layers[layer] for layer in layers]
    return _run(model, hidden_BTD, modules, positions_BT, cache) if modules else hidden_BTD


def _run(
    model: LlamaForCausalLM, hidden_BTD: Tensor, layers: list[nn.Module], positions_BT: Tensor, cache: KeyValueStore
) -> Tensor:
    access = cache.access(positions_BT)
    position_embeddings = model.model.rotary_emb(hidden_BTD, position_ids=positions_BT)
    num_heads = model.config.num_attention_heads
    num_groups = num_heads // (model.config.num_key_value_heads or num_heads)
    shared = SharedInputs.of(position_embeddings, access.mask_B1TW, num_groups)
    for layer in layers:
        fused = fused_layer(layer)
        if fused is not None:
            hidden_BTD = fused(hidden_BTD, shared, access)
            continue
        hidden_BTD = layer(
            hidden_BTD,
            attention_mask=access.mask_B1TW,
            position_ids=positions_BT,
            past_key_values=access,
            use_cache=True,
            position_embeddings=position_embeddings,
        )
    return hidden_BTD


def exit_logits(model: LlamaForCausalLM, hidden_BTD: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states that leave any layer: the final norm and the LM head."""
    return head_logits(model, model.model.norm(hidden_BTD))


def head_logits(model: LlamaForCausalLM, normed_BTD: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states behind a norm: the LM head alone."""
    if is_summed(normed_BTD) and type(model.lm_head) is nn.Linear and model.lm_head.bias is None:
        return linear(normed_BTD, model.lm_head.weight)
    return model.lm_head(normed_BTD)


def forward_adapter(
    model: LlamaForCausalLM,
    adapter: ExitAdapter,
    exit_states_BTD: Tensor,
    positions_BT: Tensor,
    cache: KeyValueStore,
) -> Tensor:
    """What the LM head reads of an exit adapter (B, T, D), from the exit states; its keys and values are cached."""
    return adapter.norm(run_adapter_layer(model, adapter, exit_states_BTD, positions_BT, cache))


def run_adapter_layer(
    model: LlamaForCausalLM,
    adapter: ExitAdapter,
    exit_states_BTD: Tensor,
    positions_BT: Tensor,
    cache: KeyValueStore,
) -> Tensor:
    """What leaves an exit adapter's layer (B, T, D), before its norm."""
    return _run(model, exit_states_BTD, [adapter.layer], positions_BT, cache)


@dataclass(frozen=True)
class TorchKernels:
    """The layers as torch runs them, written or compiled, on every device."""

    model: LlamaForCausalLM

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


def forward_exits(model: LlamaForCausalLM, tokens_BT: Tensor, exit_layers: Sequence[int]) -> Iterator[Tensor]:
    """Hidden states (B, T, D) at each of the exit layers, which ascend: one pass without a cache, as far as the last.

    Rows start at position 0 and are padded on the right.
    """
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    hidden_BTD = embed(model, tokens_BT)
    for first, last in itertools.pairwise([0, *exit_layers]):
        hidden_BTD = run_layers(model, hidden_BTD, range(first, last), positions_BT, Uncached())
        yield hidden_BTD
