"""Which exit layer and draft length the next step takes: a pure object that sees counts and costs only.

A token drafted at exit E is accepted with a probability α(E), an estimate (`decoding/acceptance_estimate.py`). A step
with d drafts is expected to give τ = (1 − α^(d+1)) / (1 − α) tokens (Leviathan et al. 2023, equation 1), and its
seconds have been measured. The choice is the cell of the most tokens a second; with d = 0 that is autoregressive
decoding. Another exit is tried where it would be better if luck has it, and taken where it is better even if luck is
against it: the less is known of it, the more luck there may be. Little time may be lost by trials.

Drafts that cost nothing (`decoding/lookup.py`) are one more choice where there are any: cells of exit 0, whose α is
known by the length of the match.

Where it is known how sure a draft is of each token (`decoding/confidence.py`), it may go on past d or stop before: one
token more pays while the chance that it will be accepted is worth its seconds. Where that says nothing of what will be
accepted, as on random text, drafts have d tokens, and are asked now and then.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import ClassVar, NamedTuple

from self_speculation.decoding.acceptance_estimate import PRIOR, PRIOR_OF_OTHERS, UNKNOWN, Acceptance, Graded
from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.lookup import NOTHING, FreeDraft

# The estimate of α for drafts that cost nothing, by the least length of their match.
PRIOR_OF_FREE = {3.0: 0.4, 5.0: 0.6, 9.0: 0.8}
# The same for drafts of an exit, by the least probability that it gives them.
PRIOR_OF_SURE = {0.0: 0.4, 0.3: 0.6, 0.6: 0.8, 0.85: 0.93}
# Where it says nothing how sure drafts are, they are asked in every so many steps.
ASKED_EVERY = 8
# Another exit is thought of in every so many steps: to think takes time, too.
TRIED_EVERY = 4
# Below one, where the sum that gives τ has a value.
MOST_CERTAIN = 1 - 1e-9
# The share of the time that trying other cells may lose.
MOST_LOST = 0.012


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
    # The exit that was the best when drafts last paid; the first one, before.
    home: int = FREE
    elapsed: float = 0.0
    # What trials of each exit have lost.
    lost: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    # The last step with drafts of each exit.
    last: dict[int, int] = field(default_factory=dict)
    free: Graded = field(default_factory=lambda: Graded(PRIOR_OF_FREE))
    # Whether drafts may stop where they are not sure. Of each exit, what is known by how sure it was.
    stops: ClassVar[bool] = True
    sure: dict[int, Graded] = field(default_factory=dict)
    # Whether that says anything.
    telling: dict[int, bool] = field(default_factory=dict)
    # Of each exit, the best of all its cells with what it is expected to give, by luck as it is or bad, until more is
    # known of the exit.
    bests: dict[tuple[int, bool], Expected] = field(default_factory=dict, init=False)
    # The best of those, as was last thought.
    best: Expected | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.known.setdefault(self.first, Acceptance(PRIOR))
        if self.home not in self.known:
            self.home = self.first

    def taught_by(self, other: "Policy | None") -> "Policy":
        """This policy with what another one knows, which is learnt on by both; their menus may differ."""
        if other is None:
            return self
        known = {exit: known.of_earlier_prompts() for exit, known in other.known.items() if exit in self._menu}
        return replace(other, seconds=self.seconds, first=self.first, known=known)

    @property
    def current(self) -> Cell | None:
        """The best cell, as was last thought; some steps try another one."""
        return self.best.cell if self.best else None

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        """The cell of the next step, which has room for so many drafts."""
        best = self.best = self._best(most_drafts)
        if best.cell.num_speculations:
            self.home = best.cell.exit_layer
        num_free = min(len(free.tokens), most_drafts)
        if FREE in self._menu and num_free:
            gratis = self._best_at(FREE, num_free, self.free.at(free.match).rate)
            if gratis.tokens_per_second > best.tokens_per_second:
                return gratis.cell
        return self._trial(best, most_drafts) if most_drafts >= self._shortest else best.cell

    def _best(self, most_drafts: int) -> Expected:
        """The best of the exits' own cells. Where drafts pay, another exit must be better even if it has bad luck."""
        own = self._best_of(self.home, most_drafts)
        drafts_pay = own.cell.num_speculations > 0
        others = (self._best_of(other, most_drafts, drafts_pay) for other in self.known if other != self.home)
        best = max(others, key=attrgetter("tokens_per_second"), default=own)
        return best if best.tokens_per_second > own.tokens_per_second else own

    def _best_of(self, exit_layer: int, most_drafts: int, has_bad_luck: bool = False) -> Expected:
        """An exit's best cell; looked for once, where its longest draft has room."""
        if most_drafts >= self._longest and (exit_layer, has_bad_luck) in self.bests:
            return self.bests[exit_layer, has_bad_luck]
        known = self.known[exit_layer]
        best = self._best_at(exit_layer, most_drafts, known.with_bad_luck() if has_bad_luck else known.rate)
        if most_drafts >= self._longest:
            self.bests[exit_layer, has_bad_luck] = best
        return best

    def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING) -> None:
        """What a step gave: each row's drafts, and how many of them were accepted."""
        seconds = self._seconds_of(cell)
        self.elapsed += seconds
        self.steps += 1
        if cell.exit_layer == FREE:
            self.free.at(free.match).add(drafted[0], accepted[0])
            return
        if self._is_trial(cell):
            tokens = sum(accepted) / max(len(accepted), 1) + 1
            loss = max(seconds - tokens / self.tokens_per_second(self.current or cell), 0.0)
            self.lost[cell.exit_layer] = self.lost.get(cell.exit_layer, 0.0) + loss
        known = self.known.setdefault(cell.exit_layer, Acceptance())
        self.forget_best(cell.exit_layer)
        for row_drafted, row_accepted in zip(drafted, accepted, strict=True):
            if row_drafted:
                steps_without = self.steps - self.last.get(cell.exit_layer, self.steps) - 1
                known.add(row_drafted, row_accepted, max(steps_without, 0))
                self.last[cell.exit_layer] = self.steps

    def forget_best(self, exit_layer: int) -> None:
        """More is known of an exit, so its best cell is to be looked for again."""
        for has_bad_luck in (False, True):
            self.bests.pop((exit_layer, has_bad_luck), None)

    def _is_trial(self, cell: Cell) -> bool:
        """Whether a step drafted otherwise than at the exit that is thought the best."""
        if self.current is None or not cell.num_speculations:
            return False
        return not self.current.num_speculations or cell.exit_layer != self.current.exit_layer

    def asks(self, exit_layer: int) -> bool:
        """Whether an exit is to be asked how sure it is of its drafts, by which they stop."""
        return self.telling.get(exit_layer, True) or self.steps % ASKED_EVERY == 0

    def goes_on(self, exit_layer: int, confidences: Sequence[float]) -> bool:
        """Whether one token more pays, after drafts that an exit was so sure of."""
        known = self.sure.setdefault(exit_layer, Graded(PRIOR_OF_SURE))
        chance = math.prod(known.at(confidence).rate for confidence in confidences)
        best = self.best.tokens_per_second if self.best else self.tokens_per_second(Cell(exit_layer, 1))
        return chance * self.known.get(exit_layer, UNKNOWN).rate >= self.draft_seconds(exit_layer) * best

    def observe_confidences(self, exit_layer: int, confidences: Sequence[float], accepted: int) -> None:
        """How sure an exit was of the drafts of a row, of which so many were accepted."""
        known = self.sure.setdefault(exit_layer, Graded(PRIOR_OF_SURE))
        for place, confidence in enumerate(confidences[: accepted + 1]):
            known.at(confidence).add(1, int(place < accepted))
        if self.steps % ASKED_EVERY == 0:
            self.telling[exit_layer] = known.tells_apart()

    def draft_seconds(self, exit_layer: int) -> float:
        """What one token more of a draft costs."""
        (first, least), (last, most) = self._drafting[exit_layer][0], self._drafting[exit_layer][-1]
        return (most - least) / max(last.num_speculations - first.num_speculations, 1)

    def _seconds_of(self, cell: Cell) -> float:
        """What a step cost, whose draft may have stopped at any length."""
        if cell in self.seconds:
            return self.seconds[cell]
        first, least = self._drafting[cell.exit_layer][0]
        return least + (cell.num_speculations - first.num_speculations) * self.draft_seconds(cell.exit_layer)

    def tokens_per_second(self, cell: Cell) -> float:
        """What a cell is expected to give each row."""
        known = self.known.get(cell.exit_layer)
        return self._rate(cell, PRIOR_OF_OTHERS if known is None else known.rate)

    def _rate(self, cell: Cell, alpha: float) -> float:
        alpha = min(alpha, MOST_CERTAIN)
        return (1 - alpha ** (cell.num_speculations + 1)) / (1 - alpha) / self.seconds[cell]

    @cached_property
    def _menu(self) -> dict[int, list[tuple[Cell, float]]]:
        """By exit, its cells and their seconds."""
        menu: dict[int, list[tuple[Cell, float]]] = {}
        for cell, seconds in self.seconds.items():
            menu.setdefault(cell.exit_layer, []).append((cell, seconds))
        return menu

    @cached_property
    def _drafting(self) -> dict[int, list[tuple[Cell, float]]]:
        """The same of cells that draft with an exit."""
        menu = {exit_layer: [pair for pair in pairs if pair[0][1]] for exit_layer, pairs in self._menu.items()}
        return {exit_layer: pairs for exit_layer, pairs in menu.items() if pairs and exit_layer != FREE}

    @cached_property
    def _others(self) -> dict[int, list[int]]:
        """By the exit that drafts, FREE where none does, all others."""
        return {one: [other for other in self._drafting if other != one] for one in (FREE, *self._drafting)}

    @cached_property
    def _shortest(self) -> int:
        """The menu's shortest draft of an exit."""
        return min(cell.num_speculations for cell in self.seconds if cell.exit_layer != FREE and cell.num_speculations)

    @cached_property
    def _longest(self) -> int:
        """The menu's longest draft."""
        return max(cell.num_speculations for cell in self.seconds)

    def _best_at(self, exit_layer: int, most_drafts: int, alpha: float) -> Expected:
        """An exit's own best cell."""
        return _best_of_cells(self._menu[exit_layer], most_drafts, alpha)

    def _trial(self, best: Expected, most_drafts: int) -> Cell:
        """A draft of another exit (of any, where nothing is drafted) that luck may make the best, if little is lost.

        Every exit may lose as much, lest those that lose little leave nothing to others.
        """
        turn, waiting = divmod(self.steps, TRIED_EVERY)
        others = self._others[best.cell.exit_layer if best.cell.num_speculations else FREE]
        if waiting or not others:
            return best.cell
        exit_layer = others[turn % len(others)]
        left = MOST_LOST * self.elapsed / len(others) - self.lost.get(exit_layer, 0.0)
        if left <= 0:
            return best.cell
        known, pairs = self.known.get(exit_layer, UNKNOWN), self._drafting[exit_layer]
        lucky = known.with_luck(self.steps - self.last.get(exit_layer, self.steps))
        if _best_of_cells(pairs, most_drafts, lucky).tokens_per_second <= best.tokens_per_second:
            return best.cell
        trial = _best_of_cells(pairs, most_drafts, (known.rate + lucky) / 2).cell
        loss = self.seconds[trial] * (1 - self._rate(trial, known.rate) / best.tokens_per_second)
        return trial if loss <= left else best.cell


def _best_of_cells(pairs: list[tuple[Cell, float]], most_drafts: int, alpha: float) -> Expected:
    """Of cells and their seconds the best: the sum that gives τ, but for its denominator, over the seconds."""
    alpha = min(alpha, MOST_CERTAIN)
    best, most = pairs[0][0], 0.0
    for cell, seconds in pairs:
        if cell[1] <= most_drafts:
            rate = (1 - alpha ** (cell[1] + 1)) / seconds
            if rate > most:
                best, most = cell, rate
    return Expected(best, most / (1 - alpha))
