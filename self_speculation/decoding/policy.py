"""Which exit layer and draft length the next step takes: a pure object that sees counts and costs only.

A token drafted at exit E is accepted with a probability α(E), which is estimated from the counts of accepted drafts and
of drafts that ended a step, the older the less. A step with d drafts is expected to give τ = (1 − α^(d+1)) / (1 − α)
tokens (Leviathan et al. 2023, equation 1), and its seconds have been measured. The choice is the cell of the most
tokens a second; with d = 0 that is autoregressive decoding. What is not chosen is tried now and then, as long as little
time is lost by it.

Drafts that cost nothing (`decoding/lookup.py`) are one more choice where there are any: cells of exit 0, whose α is
known by the length of the match.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.lookup import NOTHING, FreeDraft

# How much an earlier draft counts for each that came after it, and for each step without any at its exit: what was
# learnt long ago says little, though as much as so many drafts.
MEMORY, LEAST_KEPT = 0.98, 6.0
# The estimate before anything was drafted, at the exit to begin with and at others, and how many drafts it is worth;
# how many one is worth that was measured.
PRIOR, PRIOR_OF_OTHERS, PRIOR_DRAFTS = 0.6, 0.4, 2.0
MEASURED_DRAFTS = 10.0
# The same for drafts that cost nothing, by the least length of their match.
PRIOR_OF_FREE = {3: 0.4, 5: 0.6, 9: 0.8}
# A cell is left only for one that is better by this factor.
HYSTERESIS = 1.02
# Below one, where the sum that gives τ has a value.
MOST_CERTAIN = 1 - 1e-9
# The share of the time that trying other cells may lose.
MOST_LOST = 0.016


@dataclass
class Acceptance:
    """What is known of an exit's drafts: accepted ones and those at which a draft ended, both forgotten slowly.

    `weight` is how many drafts the prior is worth.
    """

    prior: float = PRIOR_OF_OTHERS
    accepted: float = 0.0
    stopped: float = 0.0
    weight: float = PRIOR_DRAFTS

    @property
    def rate(self) -> float:
        """α, with a prior, so that it is a number from the beginning."""
        return (self.accepted + self.prior * self.weight) / (self.accepted + self.stopped + self.weight)

    def add(self, drafted: int, accepted: int, steps_without: int = 0) -> None:
        """A row's drafts in one step, after so many steps that had none."""
        kept = MEMORY ** min(drafted, accepted + 1)
        if steps_without:
            kept *= max(MEMORY**steps_without, LEAST_KEPT / max(self.accepted + self.stopped, LEAST_KEPT))
        self.accepted = self.accepted * kept + accepted
        self.stopped = self.stopped * kept + (accepted < drafted)


class Expected(NamedTuple):
    """A cell, and what it is expected to give each row in a second."""

    cell: Cell
    tokens_per_second: float


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
    steps: int = 0
    # The last step with drafts of each exit.
    last: dict[int, int] = field(default_factory=dict)
    free: dict[int, Acceptance] = field(
        default_factory=lambda: {match: Acceptance(prior) for match, prior in PRIOR_OF_FREE.items()}
    )
    # Of each exit, the best of all its cells with what it is expected to give, until more is known of the exit.
    bests: dict[int, "Expected"] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.known.setdefault(self.first, Acceptance(PRIOR))

    def taught_by(self, other: "Policy | None") -> "Policy":
        """This policy with what another one knows, which is learnt on by both; their menus may differ."""
        if other is None:
            return self
        known = {exit_layer: known for exit_layer, known in other.known.items() if exit_layer in self._menu}
        current = other.current if other.current in self.seconds else None
        return replace(other, seconds=self.seconds, first=self.first, known=known, current=current)

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        """The cell of the next step, which has room for so many drafts."""
        best = self._best(most_drafts)
        self.current = best.cell
        num_free = min(len(free.tokens), most_drafts)
        if FREE in self._menu and num_free:
            gratis = self._best_at(FREE, num_free, self._known_of(free).rate)
            if gratis.tokens_per_second > best.tokens_per_second:
                return gratis.cell
        return self._trial(best) if most_drafts >= self._shortest else best.cell

    def _best(self, most_drafts: int) -> "Expected":
        """The best of the exits' own cells; the current one, where that is as good."""
        bests = (self._best_of(exit_layer, most_drafts) for exit_layer in self.known)
        best = max(bests, key=attrgetter("tokens_per_second"))
        if self.current is None or self.current.num_speculations > most_drafts or self.current == best.cell:
            return best
        current = Expected(self.current, self.tokens_per_second(self.current))
        return best if best.tokens_per_second >= HYSTERESIS * current.tokens_per_second else current

    def _best_of(self, exit_layer: int, most_drafts: int) -> "Expected":
        """An exit's best cell; looked for once, where its longest draft has room."""
        if most_drafts < self._longest:
            return self._best_at(exit_layer, most_drafts, self.known[exit_layer].rate)
        if exit_layer not in self.bests:
            self.bests[exit_layer] = self._best_at(exit_layer, most_drafts, self.known[exit_layer].rate)
        return self.bests[exit_layer]

    def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING) -> None:
        """What a step gave: each row's drafts, and how many of them were accepted."""
        self.elapsed += self.seconds[cell]
        self.steps += 1
        if cell.exit_layer == FREE:
            self._known_of(free).add(drafted[0], accepted[0])
            return
        if self.current is not None and cell != self.current:
            tokens = sum(accepted) / max(len(accepted), 1) + 1
            self.lost += max(self.seconds[cell] - tokens / self.tokens_per_second(self.current), 0.0)
        known = self.known.setdefault(cell.exit_layer, Acceptance())
        self.bests.pop(cell.exit_layer, None)
        for row_drafted, row_accepted in zip(drafted, accepted, strict=True):
            if row_drafted:
                steps_without = self.steps - self.last.get(cell.exit_layer, self.steps) - 1
                known.add(row_drafted, row_accepted, max(steps_without, 0))
                self.last[cell.exit_layer] = self.steps

    def tokens_per_second(self, cell: Cell) -> float:
        """What a cell is expected to give each row."""
        known = self.known.get(cell.exit_layer)
        return self._rate(cell, PRIOR_OF_OTHERS if known is None else known.rate)

    def _rate(self, cell: Cell, alpha: float) -> float:
        alpha = min(alpha, MOST_CERTAIN)
        return (1 - alpha ** (cell.num_speculations + 1)) / (1 - alpha) / self.seconds[cell]

    def _known_of(self, free: FreeDraft) -> Acceptance:
        return self.free[max(match for match in self.free if match <= free.match)]

    @cached_property
    def _menu(self) -> dict[int, list[tuple[Cell, float]]]:
        """By exit, its cells and their seconds."""
        menu: dict[int, list[tuple[Cell, float]]] = {}
        for cell, seconds in self.seconds.items():
            menu.setdefault(cell.exit_layer, []).append((cell, seconds))
        return menu

    @cached_property
    def _trials(self) -> dict[int, list[Cell]]:
        """By the exit that drafts, FREE where none does: the shortest draft at each of the others."""
        exits = [exit_layer for exit_layer in self._menu if exit_layer != FREE]
        return {
            drafting: [Cell(exit_layer, self._shortest) for exit_layer in exits if exit_layer != drafting]
            for drafting in (FREE, *exits)
        }

    @cached_property
    def _shortest(self) -> int:
        """The menu's shortest draft of an exit."""
        return min(cell.num_speculations for cell in self.seconds if cell.exit_layer != FREE and cell.num_speculations)

    @cached_property
    def _longest(self) -> int:
        """The menu's longest draft."""
        return max(cell.num_speculations for cell in self.seconds)

    def _best_at(self, exit_layer: int, most_drafts: int, alpha: float) -> "Expected":
        """An exit's own best cell: the sum that gives τ, but for its denominator, over the seconds."""
        alpha = min(alpha, MOST_CERTAIN)
        room = (
            ((1 - alpha ** (cell[1] + 1)) / seconds, cell)
            for cell, seconds in self._menu[exit_layer]
            if cell[1] <= most_drafts
        )
        most, best = max(room)
        return Expected(best, most / (1 - alpha))

    def _trial(self, best: "Expected") -> Cell:
        """A shortest draft at another exit, or at any where nothing is drafted, if it may be lost."""
        trials = self._trials[best.cell.exit_layer if best.cell.num_speculations else FREE]
        if not trials:
            return best.cell
        trial = trials[self.turn % len(trials)]
        loss = self.seconds[trial] - 1 / best.tokens_per_second
        if self.lost + loss > MOST_LOST * self.elapsed:
            return best.cell
        self.turn += 1
        return trial
