"""LayerSkip: early-exit training and lossless self-speculative decoding (arXiv 2404.16710).

>>> from self_speculation import LayerSkip
>>> llm = LayerSkip.from_pretrained()
>>> llm.generate("def add(a, b):", max_new_tokens=64, sample=False)

Names are imported when they are asked for, so that training does not load what only decoding needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from self_speculation.api import generate, load
    from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
    from self_speculation.chat import Chat
    from self_speculation.generator_base import (
        GenerationConfig,
        GenerationResult,
        GenerationStrategy,
        HuggingfaceLlamaGenerator,
    )
    from self_speculation.llm import LayerSkip
    from self_speculation.loading import ModelArguments
    from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
    from self_speculation.speculative_streamer import PlainTextStreamer, SpeculativeTextStreamer
    from self_speculation.transformers_generate import layerskip_generate

__version__ = "0.2.0"
__all__ = [
    "AutoregressiveStrategy",
    "Chat",
    "EarlyExitStrategy",
    "GenerationConfig",
    "GenerationResult",
    "GenerationStrategy",
    "HuggingfaceLlamaGenerator",
    "LayerSkip",
    "ModelArguments",
    "PlainTextStreamer",
    "SelfSpeculativeStrategy",
    "SpeculativeTextStreamer",
    "__version__",
    "generate",
    "layerskip_generate",
    "load",
]

_HOMES = {
    "AutoregressiveStrategy": "autoregressive_generator",
    "Chat": "chat",
    "EarlyExitStrategy": "autoregressive_generator",
    "GenerationConfig": "generator_base",
    "GenerationResult": "generator_base",
    "GenerationStrategy": "generator_base",
    "HuggingfaceLlamaGenerator": "generator_base",
    "LayerSkip": "llm",
    "ModelArguments": "loading",
    "PlainTextStreamer": "speculative_streamer",
    "SelfSpeculativeStrategy": "self_speculation_generator",
    "SpeculativeTextStreamer": "speculative_streamer",
    "generate": "api",
    "layerskip_generate": "transformers_generate",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
