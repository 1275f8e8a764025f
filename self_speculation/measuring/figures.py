"""What a strategy's rounds come to: its times with their spread, its counts, and its speed-up over another's.

Every figure says whether it is a total, which weighs long answers more, or a mean. A field's name is the key under
which result files have it; where a figure does not apply, it is None here and absent there, or null if that says more.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from self_speculation.decoding.cell import Cell
from self_speculation.measuring.choices import Choice, ChosenStep
from self_speculation.measuring.measurements import Measurement, Round, ratio


class Spread(NamedTuple):
    """The least and the greatest of a figure."""

    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(min(values), max(values))


@dataclass(frozen=True)
class Times:
    """The figures that change from round to round."""

    tokens_per_second: float
    decode_tokens_per_second: float
    mean_tokens_per_second: float
    mean_decode_tokens_per_second: float
    decode_seconds_per_token: float
    mean_first_token_seconds: float
    mean_batch_seconds: float
    seconds: float
    # None where prefill and first tokens come as one.
    mean_prefill_seconds: float | None = None

    @classmethod
    def of(cls, one: Round) -> "Times":
        """A round's. The speeds are of all its tokens, or means over its batches."""
        samples, batches = one.measurements, one.batches
        return cls(
            tokens_per_second=one.tokens_per_second,
            decode_tokens_per_second=one.decode_tokens_per_second,
            mean_tokens_per_second=mean(ratio(b.num_tokens, b.seconds) for b in batches),
            mean_decode_tokens_per_second=mean(ratio(b.decode_tokens, b.decode_seconds) for b in batches),
            decode_seconds_per_token=one.decode_seconds_per_token,
            mean_first_token_seconds=mean(m.first_token_seconds for m in samples),
            mean_batch_seconds=mean(b.seconds for b in batches),
            seconds=one.batch_total(lambda b: b.seconds),
            mean_prefill_seconds=mean(m.prefill_seconds for m in samples) or None,
        )

    def as_json(self) -> dict[str, float]:
        """The figures that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Counts:
    """The figures that follow from the tokens alone; rates are None without drafts."""

    samples: int
    tokens: int
    steps: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    mean_acceptance_rate: float | None
    tokens_per_step: float
    mean_tokens_per_step: float
    acceptance_by_position: list[float]

    @classmethod
    def of(cls, one: Round) -> "Counts":
        """A round's."""
        answers = one.measurements
        tokens, steps = sum(len(m.tokens) for m in answers), sum(len(m.committed) for m in answers)
        drafted, accepted = sum(sum(m.drafted) for m in answers), sum(sum(m.accepted) for m in answers)
        rates = [sum(m.accepted) / sum(m.drafted) for m in answers if sum(m.drafted)]
        return cls(
            samples=len(answers),
            tokens=tokens,
            steps=steps,
            drafted=drafted,
            accepted=accepted,
            acceptance_rate=accepted / drafted if drafted else None,
            mean_acceptance_rate=mean(rates) if rates else None,
            tokens_per_step=ratio(tokens, steps),
            mean_tokens_per_step=mean(ratio(len(m.tokens), len(m.committed)) for m in answers),
            acceptance_by_position=acceptance_by_position(answers),
        )


@dataclass(frozen=True)
class Totals:
    """A strategy's figures: each time's median over the rounds, least and greatest; the counts of the first round."""

    times: Times
    least: Times
    greatest: Times
    counts: Counts

    @classmethod
    def of(cls, rounds: list[Round]) -> "Totals":
        """Of at least one round; all have the same answers."""
        times = [Times.of(one).as_json() for one in rounds]
        values = {name: [one[name] for one in times] for name in times[0]}

        def chosen(choose: Callable[[list[float]], float]) -> Times:
            return Times(**{name: choose(own) for name, own in values.items()})

        return cls(chosen(statistics.median), chosen(min), chosen(max), Counts.of(rounds[0]))

    def as_json(self) -> dict[str, Any]:
        """Each time, then NAME_spread, then the counts."""
        times: dict[str, Any] = {}
        for name, value in self.times.as_json().items():
            times |= {name: value, f"{name}_spread": [getattr(self.least, name), getattr(self.greatest, name)]}
        return times | asdict(self.counts)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Totals":
        """What `as_json` made, whatever else stands beside it."""
        names = [item.name for item in fields(Times) if item.name in values]
        least, greatest = (Times(**{name: values[f"{name}_spread"][end] for name in names}) for end in (0, 1))
        counts = Counts(**{item.name: values[item.name] for item in fields(Counts)})
        return cls(Times(**{name: values[name] for name in names}), least, greatest, counts)


@dataclass(frozen=True)
class SpeedUp:
    """Tokens a second, end to end, over a baseline's: round by round, and batch by batch in all rounds.

    At batch 1 a batch is a sample, and the figures' names say so.
    """

    speedup: float
    speedup_spread: Spread
    decode_speedup: float
    sample_speedup_median: float
    sample_speedup_spread: Spread

    @classmethod
    def of(cls, rounds: list[Round], baseline: list[Round]) -> "SpeedUp":
        """Of the same prompts, in the same batches."""
        pairs = list(zip(rounds, baseline, strict=True))
        ratios = [ratio(own.tokens_per_second, other.tokens_per_second) for own, other in pairs]
        decode = [ratio(own.decode_tokens_per_second, other.decode_tokens_per_second) for own, other in pairs]
        samples = [
            ratio(ours.num_tokens * theirs.seconds, theirs.num_tokens * ours.seconds)
            for own, other in pairs
            for ours, theirs in zip(own.batches, other.batches, strict=True)
        ]
        return cls(
            speedup=statistics.median(ratios),
            speedup_spread=Spread.of(ratios),
            decode_speedup=statistics.median(decode),
            sample_speedup_median=statistics.median(samples),
            sample_speedup_spread=Spread.of(samples),
        )

    def as_json(self) -> dict[str, Any]:
        """The figures, by name."""
        return asdict(self) | {
            "speedup_spread": list(self.speedup_spread),
            "sample_speedup_spread": list(self.sample_speedup_spread),
        }


@dataclass(frozen=True)
class Comparison:
    """A strategy's totals, and its speed-up over a baseline."""

    totals: Totals
    speedup: SpeedUp

    @classmethod
    def of(cls, rounds: list[Round], baseline: list[Round]) -> "Comparison":
        """Of the same prompts, in the same batches."""
        return cls(Totals.of(rounds), SpeedUp.of(rounds, baseline))

    def as_json(self) -> dict[str, Any]:
        """Both, side by side."""
        return self.totals.as_json() | self.speedup.as_json()


def measured_steps(measurements: Iterable[Measurement]) -> list[ChosenStep]:
    """The steps of answers for which a policy chose; nothing where none did."""
    return [
        ChosenStep(Cell(*cell), *counts)
        for one in measurements
        for cell, *counts in zip(one.cells, one.drafted, one.accepted, one.committed, strict=False)
    ]


def acceptance_by_position(measurements: list[Measurement]) -> list[float]:
    """For the first, second, … token of a draft: how often it was accepted when it was drafted."""
    steps = [pair for m in measurements for pair in zip(m.drafted, m.accepted, strict=True)]
    longest = max((drafted for drafted, _ in steps), default=0)
    return [
        ratio(sum(accepted > position for _, accepted in steps), sum(drafted > position for drafted, _ in steps))
        for position in range(longest)
    ]


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; 0 of nothing."""
    values = list(values)
    return statistics.mean(values) if values else 0.0


def rounded(value: Any) -> Any:
    """The same with numbers of six digits, as much as anyone reads."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class StrategyFigures:
    """All that is known of a strategy. None where it does not apply, and then absent in files.

    `drafting` has exit layer and draft length, as results tell them; `sampling`, by which rule it sampled, if it did;
    `preparing_seconds` are those before the first answer, for building and compiling, if it was measured here;
    `ideal_decode_speedup` is what its drafts' acceptance and the cost of passes allow; `judged`, how many tokens are
    the full model's; `choices`, what its policy chose in all rounds.
    """

    comparison: Comparison
    speedup_over: str
    drafting: dict[str, int | str | None]
    peak_memory_bytes: int | None
    sampling: str | None = None
    preparing_seconds: float | None = None
    bandwidth_share: float | None = None
    ideal_decode_speedup: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    judged: dict[str, int] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)

    @property
    def share_of_ideal(self) -> float | None:
        """How much of the ideal was reached."""
        ideal = self.ideal_decode_speedup
        return None if ideal is None else self.comparison.speedup.decode_speedup / ideal

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        ideal = {"ideal_decode_speedup": self.ideal_decode_speedup, "share_of_ideal": self.share_of_ideal}
        return (
            self.comparison.totals.as_json()
            | ({} if self.peak_memory_bytes is None else {"peak_memory_bytes": self.peak_memory_bytes})
            | ({} if self.preparing_seconds is None else {"preparing_seconds": self.preparing_seconds})
            | ({} if self.bandwidth_share is None else {"bandwidth_share": self.bandwidth_share})
            | {"speedup_over": self.speedup_over}
            | self.comparison.speedup.as_json()
            | self.drafting
            | ({} if self.sampling is None else {"sampling": self.sampling})
            | self.scores
            | ({} if self.ideal_decode_speedup is None else ideal)
            | self.judged
            | ({"choices": [choice.as_json() for choice in self.choices]} if self.choices else {})
        )
