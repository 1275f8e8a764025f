"""How fast the answers of a task were decoded, and how that compares with autoregressive decoding."""

from dataclasses import dataclass, fields

from self_speculation.generator_base import GenerationResult


@dataclass
class SpeedFigures:
    """How fast the answers of a task were; with a baseline, also how fast and how equal autoregressive decoding was.

    Times are end to end, prefill and decoding of whole batches, and of several processes the sum. `baseline_ties`
    answers are not equal, but every token of theirs is the full model's up to rounding.
    """

    answers: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    baseline_tokens: int = 0
    baseline_seconds: float = 0.0
    baseline_equal: int = 0
    baseline_ties: int = 0

    def add(self, results: list[GenerationResult], seconds: float) -> None:
        """Count a batch of answers."""
        self.answers += len(results)
        self.seconds += seconds
        for result in results:
            self.tokens += len(result.tokens)
            self.steps += len(result.steps)
            self.drafted += result.num_drafted
            self.accepted += result.num_accepted

    def add_baseline(
        self, results: list[GenerationResult], baseline: list[GenerationResult], seconds: float
    ) -> list[int]:
        """Count the same batch, decoded autoregressively; returns the rows whose answers are not equal."""
        self.baseline_seconds += seconds
        self.baseline_tokens += sum(len(result.tokens) for result in baseline)
        pairs = enumerate(zip(results, baseline, strict=True))
        unequal = [row for row, (ours, other) in pairs if ours.tokens != other.tokens]
        self.baseline_equal += len(results) - len(unequal)
        return unequal

    def __add__(self, other: "SpeedFigures") -> "SpeedFigures":
        return SpeedFigures(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def summary(self) -> dict[str, float]:
        """What a report shows of it."""
        found = {
            "answers": self.answers,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_step": self.tokens / max(self.steps, 1),
        }
        if self.drafted:
            found["acceptance_rate"] = self.accepted / self.drafted
        if self.baseline_seconds:
            found["autoregressive_tokens_per_second"] = self.baseline_tokens / self.baseline_seconds
            found["speedup"] = self.baseline_seconds / self.seconds
            found["equal_answers"] = self.baseline_equal
            found["equal_up_to_rounding"] = self.baseline_equal + self.baseline_ties
        return found
