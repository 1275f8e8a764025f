"""How likely an exit's drafts are to be accepted, α: estimated from counts of accepted drafts and of refused ones.

Counts are forgotten, since text changes: half of them after 34 drafts. While text stays the same, more of them would
tell more, so they are kept in a second, longer memory, too. The estimate lies between those of both, the nearer to the
one that has lately foretold better what was accepted.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# How much an earlier draft counts for each that came after it, in the short memory and in the long one, and for each
# step without any at its exit: what was learnt long ago says little, though as much as so many drafts.
MEMORY, LONG_MEMORY, LEAST_KEPT = 0.98, 0.995, 6.0
# The estimate before anything was drafted, at the exit to begin with and at others, and how many drafts it is worth;
# how many one is worth that was measured.
PRIOR, PRIOR_OF_OTHERS, PRIOR_DRAFTS = 0.6, 0.4, 2.0
MEASURED_DRAFTS = 10.0
# How much the drafts of earlier prompts count for at the beginning of another one, which may be of another kind.
EARLIER_DRAFTS = 4.0
# How many standard deviations of its estimate an exit may be better than it seems, and how many worse; and the least
# variance of a draft.
LUCK, BAD_LUCK, LEAST_VARIANCE = 2.0, 1.0, 0.05
# How many drafts show whether some are accepted more often than others, and by how much.
ENOUGH, LEAST_SPREAD = 8, 0.1
# A memory's estimate is held to lie so far from 0 and 1, and neither memory is ever trusted alone.
LEAST_CHANCE, MOST_ODDS = 1e-3, 3.0


@dataclass
class Counts:
    """Accepted drafts, and those at which a draft ended."""

    accepted: float = 0.0
    stopped: float = 0.0

    @property
    def drafts(self) -> float:
        """All of them."""
        return self.accepted + self.stopped

    def add(self, accepted: int, stopped: int, kept: float) -> None:
        """So many more, of which those before are worth a share."""
        self.accepted = self.accepted * kept + accepted
        self.stopped = self.stopped * kept + stopped

    def rate(self, prior: float, weight: float) -> float:
        """α, with a prior that is worth some drafts, so that it is a number from the beginning."""
        return (self.accepted + prior * weight) / (self.accepted + self.stopped + weight)


@dataclass
class Acceptance:
    """What is known of an exit's drafts. `weight` is how many drafts the prior is worth.

    `odds` is the logarithm of how much likelier the long memory held what came true than the short one did; what came
    true long ago counts less.
    """

    prior: float = PRIOR_OF_OTHERS
    weight: float = PRIOR_DRAFTS
    short: Counts = field(default_factory=Counts)
    long: Counts = field(default_factory=Counts)
    odds: float = 0.0

    @property
    def rate(self) -> float:
        """α: both memories' estimates, each as far as it is to be trusted."""
        long = self.long.rate(self.prior, self.weight)
        return long + (self.short.rate(self.prior, self.weight) - long) / (1 + math.exp(self.odds))

    def with_luck(self, steps_without: int) -> float:
        """How high α may well be, after so many steps without drafts, which make what is known worth less."""
        return self.rate + LUCK * self._deviation(self.short.drafts * MEMORY**steps_without)

    def with_bad_luck(self) -> float:
        """How low α may well be."""
        return max(self.rate - BAD_LUCK * self._deviation(self.long.drafts), 0.0)

    def _deviation(self, drafts: float) -> float:
        """The standard deviation of an estimate from so many drafts and the prior."""
        alpha = self.rate
        return math.sqrt(max(alpha * (1 - alpha), LEAST_VARIANCE) / (drafts + self.weight))

    def of_earlier_prompts(self) -> "Acceptance":
        """The same for a prompt that may be of another kind: less is sure, and the short memory is worth few drafts."""
        share = min(1.0, EARLIER_DRAFTS / max(self.short.drafts, EARLIER_DRAFTS))
        short = Counts(self.short.accepted * share, self.short.stopped * share)
        weight, odds = min(self.weight, EARLIER_DRAFTS), min(self.odds, 0.0)
        return replace(self, weight=weight, short=short, long=replace(self.long), odds=odds)

    def add(self, drafted: int, accepted: int, steps_without: int = 0) -> None:
        """A row's drafts in one step, after so many steps that had none."""
        judged = min(drafted, accepted + 1)
        stopped = judged - accepted
        short, long = MEMORY**judged, LONG_MEMORY**judged
        odds = self.odds * long + self._foretold(accepted, stopped)
        self.odds = min(max(odds, -MOST_ODDS), MOST_ODDS)
        if steps_without:
            short *= max(MEMORY**steps_without, LEAST_KEPT / max(self.short.drafts, LEAST_KEPT))
        self.short.add(accepted, stopped, short)
        self.long.add(accepted, stopped, long)

    def _foretold(self, accepted: int, stopped: int) -> float:
        """How much better the long memory has foretold that."""
        short, long = self._chance(self.short), self._chance(self.long)
        better = accepted * math.log(long / short) if accepted else 0.0
        return better + math.log((1 - long) / (1 - short)) if stopped else better

    def _chance(self, counts: Counts) -> float:
        """A memory's estimate, which holds nothing for impossible."""
        return min(max(counts.rate(self.prior, self.weight), LEAST_CHANCE), 1 - LEAST_CHANCE)


UNKNOWN = Acceptance()


class Graded:
    """What is known of drafts that differ by a value: an acceptance for all from each of some least values on."""

    def __init__(self, priors: Mapping[float, float]) -> None:
        self.least = sorted(priors)
        self.grades = [Acceptance(priors[least]) for least in self.least]

    def at(self, value: float) -> Acceptance:
        """What is known of drafts of such a value."""
        return self.grades[bisect_right(self.least, value) - 1]

    def tells_apart(self) -> bool:
        """Whether α differs by the value: its standard deviation over the drafts; true until there were enough."""
        drafts = sum(grade.short.drafts for grade in self.grades)
        if drafts < ENOUGH:
            return True
        mean = sum(grade.short.accepted for grade in self.grades) / drafts
        squares = sum(grade.short.drafts * (grade.rate - mean) ** 2 for grade in self.grades)
        return squares >= LEAST_SPREAD**2 * drafts
