"""Answers as they were measured: one, the batch that shared its seconds, and a round over all prompts.

All figures are counted from token ids. Prompts are asked in lists, of one by default, and a list is answered as a batch
of its rows. *Throughput* is the tokens of all rows over the list's seconds, counted once, and *latency* is what a row
waits: its own seconds, and these over its own tokens. The decode rate counts the tokens after the first delivery and
the time since then, without what it took to read prompts that came later.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationResult

# How many batches a list is long: with more, less is lost at the end of each, and more where a run is interrupted.
BATCHES_A_LIST = 8


@dataclass(frozen=True)
class Measurement:
    """One answer: its tokens, its times in seconds, and each step's drafted, accepted and committed tokens.

    `request_seconds` are those of its whole list, None if it has none; of the list's steps, `begun_after` were before.
    `cells` are what a policy chose for the steps, where there is one.
    """

    tokens: list[int]
    text: str
    stop_reason: str
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    drafted: list[int]
    accepted: list[int]
    committed: list[int]
    request_seconds: float | None = None
    begun_after: int = 0
    cells: list[Cell] = field(default_factory=list)

    @classmethod
    def of(cls, result: GenerationResult) -> "Measurement":
        """What is kept of an answer."""
        return cls(
            tokens=result.tokens,
            text=result.text,
            stop_reason=str(result.stop_reason),
            prefill_seconds=result.prefill_seconds,
            first_token_seconds=result.first_token_seconds,
            decode_seconds=result.decode_seconds,
            drafted=[len(step.drafted) for step in result.steps],
            accepted=result.accepted_per_step,
            committed=[len(step.tokens) for step in result.steps],
            request_seconds=result.request_seconds,
            begun_after=result.begun_after,
            cells=[step.cell for step in result.steps if step.cell],
        )

    @property
    def seconds(self) -> float:
        """From the prompt to the last token."""
        return self.first_token_seconds + self.decode_seconds

    @property
    def decode_tokens(self) -> int:
        """Tokens after the first delivery."""
        return sum(self.committed[1:])


@dataclass(frozen=True)
class Batch:
    """Answers that were asked for together: rows of one batch, in which prompts that waited came after others."""

    rows: list[Measurement]

    @property
    def seconds(self) -> float:
        """From the prompts to the last row's last token."""
        return max(row.seconds if row.request_seconds is None else row.request_seconds for row in self.rows)

    @property
    def decode_seconds(self) -> float:
        """From the first delivery to the last row's last token, but for what it took to read later prompts."""
        later = {row.begun_after: row.prefill_seconds for row in self.rows if row.begun_after}
        return max(self.seconds - self.rows[0].first_token_seconds - sum(later.values()), 0.0)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def decode_tokens(self) -> int:
        """All rows' tokens after the first delivery of any."""
        return self.num_tokens - sum(sum(row.committed[:1]) for row in self.rows if not row.begun_after)

    @property
    def steps(self) -> int:
        """Steps after the first delivery: rows step together, until the last of them ends."""
        return max(max(row.begun_after + len(row.committed) for row in self.rows) - 1, 0)

    @property
    def drafting_passes(self) -> int:
        """Drafts made after the first delivery, by one pass for all rows each."""
        drafted = itertools.zip_longest(*([0] * row.begun_after + row.drafted for row in self.rows), fillvalue=0)
        return sum(map(max, itertools.islice(drafted, 1, None)))


def list_size(batch_size: int, num_prompts: int, num_ranks: int = 1) -> int:
    """How many prompts are asked for together, so that batches stay full and every rank has a list to answer."""
    batches = min(BATCHES_A_LIST, -(-num_prompts // (batch_size * num_ranks)))
    return 1 if batch_size == 1 else batch_size * batches


@dataclass
class Round:
    """One strategy's answers to all prompts, once, in lists of `list_size`; the last one may be shorter."""

    measurements: list[Measurement] = field(default_factory=list)
    list_size: int = 1

    @property
    def batches(self) -> list[Batch]:
        """The answers, by list."""
        starts = range(0, len(self.measurements), self.list_size)
        return [Batch(self.measurements[start : start + self.list_size]) for start in starts]

    def total(self, value: Callable[[Measurement], float]) -> float:
        """The sum of a figure over the answers."""
        return sum(map(value, self.measurements))

    def batch_total(self, value: Callable[[Batch], float]) -> float:
        """The sum of a figure over the batches: what rows share, like time, counts once."""
        return sum(map(value, self.batches))

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included: throughput."""
        return ratio(self.batch_total(lambda b: b.num_tokens), self.batch_total(lambda b: b.seconds))

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first deliveries over the time since then: throughput."""
        return ratio(self.batch_total(lambda b: b.decode_tokens), self.batch_total(lambda b: b.decode_seconds))

    @property
    def decode_seconds_per_token(self) -> float:
        """What a row waits for each of its tokens after its first delivery: latency."""
        return ratio(self.total(lambda m: m.decode_seconds), self.total(lambda m: m.decode_tokens))


def ratio(over: float, under: float) -> float:
    """A quotient; 0 where there is nothing to divide by."""
    return over / under if under else 0.0
