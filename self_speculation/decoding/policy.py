"""Which exit layer and draft length the next step takes: a pure object that sees counts and costs only.

A token drafted at exit E is accepted with a probability α(E), which is estimated from the counts of accepted drafts and
of drafts that ended a step, the older the less. A step with d drafts is expected to give τ = (1 − α^(d+1)) / (1 − α)
tokens (Leviathan et al. 2023, equation 1), and its seconds have been measured. The choice is the cell of the most
tokens a second; with d = 0 that is autoregressive decoding. What is not chosen is tried now and then, as long as little
time is lost by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from self_speculation.decoding.cell import Cell

# How much an earlier draft counts for each that came after it.
MEMORY = 0.98
# The estimate before anything was drafted, at the exit to begin with and at others, and how many drafts it is worth.
PRIOR, PRIOR_OF_OTHERS, PRIOR_DRAFTS = 0.6, 0.4, 2.0
# A cell is left only for one that is better by this factor.
HYSTERESIS = 1.02
# Below one, where the sum that gives τ has a value.
MOST_CERTAIN = 1 - 1e-9
# The share of the time that trying other cells may lose.
MOST_LOST = 0.016


@dataclass
class Acceptance:
    """What is known of an exit's drafts: accepted ones and those at which a draft ended, both forgotten slowly."""

    prior: float = PRIOR_OF_OTHERS
    accepted: float = 0.0
    stopped: float = 0.0

    @property
    def rate(self) -> float:
        """α, with a prior, so that it is a number from the beginning."""
        return (self.accepted + self.prior * PRIOR_DRAFTS) / (self.accepted + self.stopped + PRIOR_DRAFTS)

    def add(self, drafted: int, accepted: int) -> None:
        """A row's drafts in one step."""
        kept = MEMORY ** min(drafted, accepted + 1)
        self.accepted = self.accepted * kept + accepted
        self.stopped = self.stopped * kept + (accepted < drafted)


@dataclass
class Policy:
    """Chooses a cell before each step, and learns from what came of it.

    `seconds` are those of a step in every cell of the menu, which has d = 0 at the exit `first`; that is the exit to
    begin with.
    """

    seconds: Mapping[Cell, float]
    first: int
    known: dict[int, Acceptance] = field(default_factory=dict)
    current: Cell | None = None
    elapsed: float = 0.0
    lost: float = 0.0
    turn: int = 0

    def __post_init__(self) -> None:
        self.known.setdefault(self.first, Acceptance(PRIOR))

    def taught_by(self, other: "Policy | None") -> "Policy":
        """This policy with what another one knows, which is learnt on by both."""
        return self if other is None else replace(other, seconds=self.seconds, first=self.first)

    def choose(self, most_drafts: int) -> Cell:
        """The cell of the next step, which has room for so many drafts."""
        menu = [cell for cell in self.seconds if cell.num_speculations <= most_drafts]
        best = max((cell for cell in menu if cell.exit_layer in self.known), key=self.tokens_per_second)
        if self.current in menu and self.tokens_per_second(best) < HYSTERESIS * self.tokens_per_second(self.current):
            best = self.current
        self.current = best
        trial = self._trial(menu, best)
        return best if trial is None else trial

    def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """What a step gave: each row's drafts, and how many of them were accepted."""
        self.elapsed += self.seconds[cell]
        if self.current is not None and cell != self.current:
            tokens = sum(accepted) / max(len(accepted), 1) + 1
            self.lost += max(self.seconds[cell] - tokens / self.tokens_per_second(self.current), 0.0)
        known = self.known.setdefault(cell.exit_layer, Acceptance())
        for row_drafted, row_accepted in zip(drafted, accepted, strict=True):
            if row_drafted:
                known.add(row_drafted, row_accepted)

    def tokens_per_second(self, cell: Cell) -> float:
        """What a cell is expected to give each row."""
        alpha = min(self.known.get(cell.exit_layer, Acceptance()).rate, MOST_CERTAIN)
        return (1 - alpha ** (cell.num_speculations + 1)) / (1 - alpha) / self.seconds[cell]

    def _trial(self, menu: list[Cell], best: Cell) -> Cell | None:
        """A draft of one token at another exit, or at the same one where nothing is drafted: if it may be lost."""
        drafting = best.exit_layer if best.num_speculations else None
        others = [cell for cell in menu if cell.num_speculations == 1 and cell.exit_layer != drafting]
        if not others:
            return None
        trial = others[self.turn % len(others)]
        loss = self.seconds[trial] - 1 / self.tokens_per_second(best)
        if self.lost + loss > MOST_LOST * self.elapsed:
            return None
        self.turn += 1
        return trial
