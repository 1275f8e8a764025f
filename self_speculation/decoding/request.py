"""What a strategy is asked, and the steps that it answers with."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.config import GenerationConfig
from self_speculation.decoding.sampling import row_keys
from self_speculation.decoding.stopping import StopReason, StopRule


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts, as token ids, and how to go on from them.

    All are answered at once, or at most `batch_size` of them: then those behind wait until a row has ended. `continues`
    asks that what the cache holds of one prompt and its answer is kept for the next: for conversations.
    """

    prompts: list[list[int]]
    config: GenerationConfig
    stop_rule: StopRule
    logits_processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    continues: bool = False
    batch_size: int | None = None

    @property
    def num_rows(self) -> int:
        """How many prompts are answered at once."""
        return min(len(self.prompts), self.batch_size or len(self.prompts))

    @cached_property
    def row_keys(self) -> list[int]:
        """What the noise of each prompt's row depends on, beside the seed."""
        return row_keys(self.prompts)

    def split(self, size: int) -> "list[GenerationRequest]":
        """Requests of so many prompts each, in order; the last one may be smaller."""
        starts = range(0, len(self.prompts), size)
        return [replace(self, prompts=self.prompts[start : start + size], batch_size=None) for start in starts]

    def all_processors(self) -> LogitsProcessorList:
        """The config's logits processors, then the caller's."""
        ngram_size = self.config.no_repeat_ngram_size
        own = [NoRepeatNGramLogitsProcessor(ngram_size)] if ngram_size else []
        return LogitsProcessorList([*own, *self.logits_processors])

    def limits(self, context: int) -> list[int]:
        """The most tokens of each row, prompt and answer together, in a model of this context."""
        return [min(len(prompt) + self.config.max_new_tokens, context) for prompt in self.prompts]

    def limit_reason(self, row: int, context: int) -> StopReason:
        """Why a row that meets no stop ends: it has `max_new_tokens` new tokens, or fills the model's context."""
        asked_for = len(self.prompts[row]) + self.config.max_new_tokens
        return StopReason.LENGTH if asked_for > context else StopReason.MAX_STEPS


@dataclass(frozen=True)
class RowStep:
    """One row's part of a step: what was drafted, how much of it was accepted, and the tokens it committed.

    All three end at the row's stop. `tokens` are the accepted ones and, unless the stop was in front of it, one of
    the full model's: *recovered* if a draft was rejected, *bonus* if none was. `cell` is what a policy chose for the
    step, where there is one; the row may have had room for a shorter draft.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: int = 0
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason | None = None
    cell: Cell | None = None

    @property
    def is_rejected(self) -> bool:
        """Whether the last token is a recovered one."""
        return self.accepted < min(len(self.drafted), len(self.tokens))


@dataclass(frozen=True)
class GenerationStep:
    """One draft and its verification, for every prompt; None for those that wait still, or have ended.

    The prefill of a row is a step of no tokens, in which the others wait. `seconds` is how long it took, from a
    strategy that knows better than who waits for the step.
    """

    rows: Sequence[RowStep | None]
    seconds: float | None = None
