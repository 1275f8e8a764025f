"""The families of decoders that can be cut at a layer, and in what they differ outside their layers.

A family is four hooks: which keys the queries of a layer see, which rotary embedding the layer takes, a factor on the
embeddings, and a function on the logits. All else (norms of queries and keys, biases, fused projections, multipliers
of residuals) is inside the layers, which run as transformers wrote them.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

ROPE_PER_CALL = ("dynamic", "longrope")
# Any family's configuration.
Config = Any


@dataclass(frozen=True)
class LogitsFunction:
    """What becomes of the LM head's product x: y = x / s, softly capped by c as y = c · tanh(x / (s · c))."""

    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, product_V: Tensor) -> Tensor:
        """y of x, any shape; in the dtype of x, by the same operations as transformers'."""
        if self.divisor != 1:
            product_V = product_V / self.divisor
        return product_V if self.cap is None else torch.tanh(product_V / self.cap) * self.cap

    def slope(self, logits_V: Tensor) -> Tensor | float:
        """dy/dx, from y."""
        return (1.0 if self.cap is None else 1 - (logits_V / self.cap) ** 2) / self.divisor


AS_IT_IS = LogitsFunction()


class LayerKind(NamedTuple):
    """Layers of one kind share mask and rotary embedding.

    A query at position i sees the keys at i − `window` < j ≤ i, or without one all at j ≤ i. `rotary` is the name of
    the embedding, where a model has several.
    """

    window: int | None = None
    rotary: str | None = None


def all_alike(config: Config, layer: int) -> LayerKind:
    """Every layer sees the whole prefix."""
    return LayerKind()


def all_windowed(config: Config, layer: int) -> LayerKind:
    """Every layer has the window, if there is one."""
    return LayerKind(config.sliding_window)


def windowed_by_type(config: Config, layer: int) -> LayerKind:
    """Some layers have the window, others see the whole prefix. (SmolLM3's layers know which of them do not rotate.)"""
    return LayerKind(config.sliding_window if config.layer_types[layer] == "sliding_attention" else None)


def rotated_by_type(config: Config, layer: int) -> LayerKind:
    """Layers with the window have a rotary embedding of their own."""
    return LayerKind(windowed_by_type(config, layer).window, config.layer_types[layer])


def unscaled(config: Config) -> float:
    """Embeddings as they are; Gemma's are scaled by transformers' own module."""
    return 1.0


def multiplied(config: Config) -> float:
    """Granite's factor."""
    return config.embedding_multiplier


def unchanged(config: Config) -> LogitsFunction:
    """Logits as the LM head gives them."""
    return AS_IT_IS


def capped(config: Config) -> LogitsFunction:
    """Gemma's soft cap, if there is one."""
    return LogitsFunction(cap=config.final_logit_softcapping)


def divided(config: Config) -> LogitsFunction:
    """Granite's scaling."""
    return LogitsFunction(divisor=config.logits_scaling)


@dataclass(frozen=True)
class Family:
    """A family's name in sentences, its hooks, and transformers' attention that can do what its layers ask for."""

    name: str
    kind: Callable[[Config, int], LayerKind] = all_alike
    embedding_factor: Callable[[Config], float] = unscaled
    logits: Callable[[Config], LogitsFunction] = unchanged
    attention: str = "sdpa"


# By what configurations call them.
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", all_windowed),
    "qwen2": Family("Qwen2", windowed_by_type),
    "qwen3": Family("Qwen3", windowed_by_type),
    "gemma": Family("Gemma"),
    # Attention has a soft cap, too, which `sdpa` cannot apply.
    "gemma2": Family("Gemma 2", windowed_by_type, logits=capped, attention="eager"),
    "gemma3_text": Family("Gemma 3 (text)", rotated_by_type, logits=capped),
    "phi3": Family("Phi-3", all_windowed),
    "olmo2": Family("OLMo 2"),
    "smollm3": Family("SmolLM3", windowed_by_type),
    "granite": Family("Granite", embedding_factor=multiplied, logits=divided),
}
NAMES = ", ".join(family.name for family in FAMILIES.values())


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether it is transformers' causal language model of one of the families, and so can be cut at a layer."""
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    return model.config.model_type in FAMILIES and known is not None and isinstance(model, known)


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model that can be cut at a layer."""
    return FAMILIES[model.config.model_type]


def embed(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """x_0 (B, T, D) of the tokens."""
    hidden_BTD: Tensor = model.model.embed_tokens(tokens_BT)
    factor = family_of(model).embedding_factor(model.config)
    return hidden_BTD if factor == 1 else hidden_BTD * factor


def logits_function(model: PreTrainedModel) -> LogitsFunction:
    """What the model does to its LM head's product."""
    return family_of(model).logits(model.config)


def another_family(model: PreTrainedModel) -> ValueError:
    """The refusal of a model that cannot be cut at a layer."""
    return ValueError(f"--model is a {type(model).__name__}; families that can exit early: {NAMES}.")


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose layers could not be cut and cached by position; choose the attention of the others.

    Raises:
        ValueError: another family, attention to what follows, or rotary frequencies that depend on the longest
            position of a call.
    """
    if not is_decoder(model):
        raise another_family(model)
    if getattr(model.config, "use_bidirectional_attention", False):
        raise ValueError("--model attends to the tokens that follow, too, and so cannot write one after the other.")
    for rope_type in rope_types(model.config):
        if rope_type in ROPE_PER_CALL:
            raise ValueError(
                f"--model uses {rope_type!r} RoPE scaling, whose frequencies change with the length of each call; "
                "drafting and verification would disagree."
            )
    choose_attention(model)


def choose_attention(model: PreTrainedModel) -> None:
    """Switch the attention of a model that can be cut to the one that is right for its family."""
    attention = family_of(model).attention
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)


def rope_types(config: Config) -> set[str]:
    """The kinds of rotary embedding that a model has: one, or one for each type of layer."""
    parameters = config.rope_parameters or {}
    each = [own for own in parameters.values() if isinstance(own, dict)] or [parameters]
    return {own.get("rope_type", "default") for own in each}
