"""Answers as they were measured: one, the batch that shared its seconds, and a round over all prompts.

All figures are counted from token ids. Prompts are answered in batches, of one by default. A batch's seconds are those
of all its rows together, and each row has them in its measurement: *throughput* is the tokens of all rows over the
batch's seconds, counted once, and *latency* is what a row waits: the seconds until its whole batch is done, and these
over the row's own tokens. The decode rate counts the tokens after the first delivery and the time since then.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationResult


@dataclass(frozen=True)
class Measurement:
    """One answer: its tokens, each step's drafted, accepted and committed tokens, and its batch's times in seconds.

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
    """Answers that were given together, in the same seconds."""

    rows: list[Measurement]

    @property
    def seconds(self) -> float:
        """From the prompts to the last row's last token."""
        return max(row.seconds for row in self.rows)

    @property
    def decode_seconds(self) -> float:
        """From the first delivery to the last row's last token."""
        return max(row.decode_seconds for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def decode_tokens(self) -> int:
        """All rows' tokens after the first delivery."""
        return sum(row.decode_tokens for row in self.rows)

    @property
    def steps(self) -> int:
        """Steps after the first delivery: rows step together, until the last of them ends."""
        return max(len(row.committed[1:]) for row in self.rows)

    @property
    def drafting_passes(self) -> int:
        """Drafts made after the first delivery, by one pass for all rows each."""
        drafted = itertools.zip_longest(*(row.drafted[1:] for row in self.rows), fillvalue=0)
        return sum(map(max, drafted))


@dataclass
class Round:
    """One strategy's answers to all prompts, once, in batches of `batch_size`; the last one may be smaller."""

    measurements: list[Measurement] = field(default_factory=list)
    batch_size: int = 1

    @property
    def batches(self) -> list[Batch]:
        """The answers, by batch."""
        starts = range(0, len(self.measurements), self.batch_size)
        return [Batch(self.measurements[start : start + self.batch_size]) for start in starts]

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
        """What a row waits for each of its tokens after the first delivery, until its whole batch is done: latency."""
        return ratio(self.total(lambda m: m.decode_seconds), self.total(lambda m: m.decode_tokens))


def ratio(over: float, under: float) -> float:
    """A quotient; 0 where there is nothing to divide by."""
    return over / under if under else 0.0
