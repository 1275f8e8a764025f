"""What a user asks of generation."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from self_speculation.settings import Settings, setting

# Every step searches the whole answer for them.
MAX_STOP_WORD = 10_000
# Each takes room in the cache; drafts that pay are a hundred times shorter.
MOST_SPECULATIONS = 1000
# torch keeps seeds in 64 bits, with a sign.
MOST_SEED = 2**63 - 1


@dataclass
class GenerationConfig(Settings):
    """What a user asks of generation."""

    max_new_tokens: int = setting(512, help="Most new tokens.", at_least=0, flag="max_steps")
    exit_layer: int | None = setting(
        None,
        help="E: layers that draft (1 to L). Default: auto, chosen at every step (early exit: as recommended).",
        at_least=1,
        or_auto=True,
    )
    num_speculations: int | None = setting(
        None,
        help="d: tokens drafted a step. Default: auto, likewise.",
        at_least=0,
        at_most=MOST_SPECULATIONS,
        or_auto=True,
    )
    generation_strategy: str = setting(
        "autoregressive",
        help="autoregressive, early_exit, self_speculative or adaptive (E and d anew at each step); or transformers' "
        "own hf_generate, hf_static (its cache, compiled) or hf_early_exit.",
    )
    sample: bool = setting(True, help="Sample; False takes the most probable token.")
    sampling: Literal["leviathan", "coupled"] | None = setting(
        None,
        help="leviathan: drafts are accepted by u < p/q. coupled: answers are, token for token, those of "
        "autoregressive decoding with the same seed. Default: coupled where E or d is auto, so that seeds repeat.",
    )
    temperature: float = setting(0.6, help="Divides the logits when sampling.")
    top_k: int = setting(0, help="Sample from the k most probable tokens; 0: from all.", at_least=0)
    top_p: float = setting(0.9, help="Sample from the smallest set of at least this probability.")
    no_repeat_ngram_size: int | None = setting(None, help="No n-gram of this size occurs twice.", at_least=1)
    stop_words: list[str] | None = setting(None, help="Strings that end the answer.")
    stop_token_ids: list[int] | None = setting(None, help="Token ids that end the answer.", is_rare=True)
    prefill_chunk: int | None = setting(
        None,
        help="Most prompt tokens read in one pass, to bound memory; all by default.",
        at_least=1,
        is_rare=True,
    )
    compile: Literal["none", "default", "max"] = setting(
        "none",
        help="Compile the step: seconds for a plain Llama on a CPU, and exact; else a minute at first. max also tunes.",
    )
    exact: bool = setting(
        False, help="Output is autoregressive decoding's, bit for bit, in any dtype and batch (plain Llamas)."
    )
    draft_vocab: int | None = setting(
        None,
        help="Draft with the N most frequent tokens only; verification knows all, so the output is the same.",
        at_least=1,
    )
    policy_memory: Literal["prompt", "run"] = setting(
        "prompt", help="How long adaptive decoding remembers what was accepted.", is_rare=True
    )
    seed: int = setting(42, help="Seed of every random draw.", at_least=0, at_most=MOST_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.temperature <= 0:
            raise ValueError(f"--temperature must be positive, not {self.temperature}; --sample False is greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must lie above 0 and be at most 1, not {self.top_p}.")
        self._check_stop_words(self.stop_words or [])

    @staticmethod
    def _check_stop_words(words: list[str]) -> None:
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"--stop_words must be a list of strings, not {words!r:.60}.")
        if "" in words:
            raise ValueError("--stop_words must not be empty strings.")
        longest = max(map(len, words), default=0)
        if longest > MAX_STOP_WORD:
            raise ValueError(f"--stop_words must have at most {MAX_STOP_WORD} characters each, not {longest}.")

    def generation(self, **changes: Any) -> "GenerationConfig":
        """A script's own config as generation knows it, with changes."""
        values = {item.name: getattr(self, item.name) for item in fields(GenerationConfig)}
        return GenerationConfig(**values | changes)
