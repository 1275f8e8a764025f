"""What a checkpoint's `generation_config.json` says about logits: honoured or refused, and never silently ignored.

Sampling's own values there (do_sample, temperature, top_k, top_p) are defaults that the flags decide.
"""

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig as CheckpointConfig
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

# In transformers' order. Each looks at logits and the tokens before them, and at nothing else.
PROCESSORS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "sequence_bias": SequenceBiasLogitsProcessor,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    "bad_words_ids": NoBadWordsLogitsProcessor,
    "suppress_tokens": SuppressTokensLogitsProcessor,
}
# Those that look at an answer's beginning or its end, that need a second pass, or that are another search.
REFUSED = (
    "begin_suppress_tokens",
    "constraints",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "watermarking_config",
)
# Filters that have no flag; without effect on greedy decoding.
REFUSED_WHEN_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "typical_p")
# Values that change nothing, where they are not 0, None or empty.
NEUTRAL = dict.fromkeys(
    ("encoder_repetition_penalty", "guidance_scale", "num_beams", "repetition_penalty", "typical_p"), 1
)


def default_processors(config: CheckpointConfig | None) -> LogitsProcessorList:
    """The processors that the checkpoint asks for; None is a model without such a file.

    Raises:
        ValueError: a value is of no use to its processor.
    """
    processors = LogitsProcessorList()
    for name, make in PROCESSORS.items():
        if _is_set(config, name):
            try:
                processors.append(make(getattr(config, name)))
            except (ValueError, TypeError) as error:
                raise _refusal(config, name, f"cannot be used ({error})") from error
    return processors


def check_defaults(config: CheckpointConfig | None, sample: bool) -> None:
    """Refuse what decoding by steps cannot honour.

    Raises:
        ValueError: names the file, the value, and a way out.
    """
    for name in (*REFUSED, *(REFUSED_WHEN_SAMPLING if sample else ())):
        if _is_set(config, name):
            raise _refusal(config, name, "is not supported")


def ignore_defaults(config: CheckpointConfig | None) -> None:
    """Take out all that is honoured or refused here."""
    for name in (*PROCESSORS, *REFUSED, *REFUSED_WHEN_SAMPLING):
        if config is not None:
            setattr(config, name, None)


def _is_set(config: CheckpointConfig | None, name: str) -> bool:
    value = getattr(config, name, None)
    return bool(value) and value != NEUTRAL.get(name)


def _refusal(config: CheckpointConfig | None, name: str, reason: str) -> ValueError:
    value = f"{getattr(config, name)!r:.60}"
    return ValueError(
        f"--model: its generation_config.json has {name} {value}, which {reason}; take it out there, or give "
        "--ignore_generation_config True."
    )
