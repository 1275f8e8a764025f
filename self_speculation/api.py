"""Decoding in three lines, as functions: a model by its name, and answers to prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from self_speculation import loading
from self_speculation.generator_base import GenerationResult, StepStreamer
from self_speculation.llm import LayerSkip


def load(
    model: str | Path = loading.BUNDLED_CHECKPOINT, *, device: str | None = None, dtype: str = "auto", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, in evaluation mode, and its tokenizer; the bundled checkpoint by default.

    Args:
        model: a folder or a name on the hub.
        device: CUDA by default where there is any.
        dtype: `auto`, `float32`, `bfloat16`, `float16` or `float64`. `auto` is the checkpoint's own, but float32 on
            CPUs that are slow in 16 bits.
        options: what else transformers' `from_pretrained` takes, such as `device_map="auto"`.

    Raises:
        ValueError: no such model, no weights, no access, or a model that cannot exit early.
    """
    llm = LayerSkip.from_pretrained(model, device=device, dtype=dtype, **options)
    return llm.model, llm.tokenizer


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str,
    streamer: StepStreamer | BaseStreamer | None = None,
    **settings: Any,
) -> GenerationResult: ...


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    streamer: StepStreamer | BaseStreamer | None = None,
    **settings: Any,
) -> list[GenerationResult]: ...


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    streamer: StepStreamer | BaseStreamer | None = None,
    **settings: Any,
) -> GenerationResult | list[GenerationResult]:
    """Answer one prompt, or several as one ragged batch, by self-speculative decoding (section 4.3).

    Args:
        model: what `load` gave, as is `tokenizer`.
        prompts: one text for one result, or several for as many results.
        streamer: shows the answer to a single prompt while it grows.
        settings: fields of `GenerationConfig`. The exit layer and the draft length that are not given, or `"auto"`, are
            chosen at every step; `generation_strategy` may name another strategy.

    Raises:
        ValueError: a setting is out of its limits, or a prompt is empty or too long for the model.
    """
    return LayerSkip(model, tokenizer).generate(prompts, details=True, streamer=streamer, **settings)
