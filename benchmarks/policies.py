"""Rivals of our policy: what others choose an exit layer and a draft length by, in the same steps.

`Del` follows DEL (arXiv 2504.05598): every exit is scored at every step by what it would have drafted in the places
that were decided (shadow tokens), and the choice is the (E, d) of the most tokens for each layer that runs.
`PlusMinusOne` stays at its exit, and drafts one token more after a draft that was accepted whole, one less otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from self_speculation.decoding.acceptance_estimate import Acceptance
from self_speculation.decoding.adaptive_step import AdaptiveStep
from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.cell import DRAFTS, FREE, Cell
from self_speculation.decoding.kernels import Kernels
from self_speculation.decoding.late_adapter import KernelsAround
from self_speculation.decoding.lookup import NOTHING, FreeDraft
from self_speculation.decoding.policy import Expected, Policy
from self_speculation.decoding.session import EagerStep, Step
from self_speculation.decoding.step import StepOutcome, StepPlan
from self_speculation.generator_base import GenerationRequest
from self_speculation.self_speculation_generator import AdaptiveStrategy


class WithoutLookup(Policy):
    """Our policy without drafts that cost nothing."""

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        """The cell of the next step."""
        return super().choose(most_drafts)


class WithoutStops(Policy):
    """Our policy whose drafts have the length that was chosen, however sure they are."""

    stops = False


class PlusMinusOne(WithoutLookup):
    """One exit; d grows by one after a draft that was accepted whole, and shrinks by one, to no less than one."""

    stops = False
    drafts: int = 4

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        """The longest draft of the menu that is not longer than d."""
        return Cell(self.first, max(length for length in DRAFTS if length <= min(self.drafts, most_drafts)))

    def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING) -> None:
        """What a step gave."""
        is_whole = list(drafted) == list(accepted)
        self.drafts = min(max(self.drafts + (1 if is_whole else -1), 1), max(DRAFTS))

    def taught_by(self, other: Policy | None) -> Policy:
        """The same controller goes on."""
        return self if other is None else other


class Scored(WithoutLookup):
    """Our policy where every exit is scored at every step, so that nothing needs to be tried."""

    stops = False
    is_scored: bool = True

    def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING) -> None:
        """Scores say all, where there are any."""
        if not self.is_scored:
            super().observe(cell, drafted, accepted, free)

    def score(self, exit_layer: int, drafted: int, accepted: int) -> None:
        """So many tokens would have been drafted, and so many of them accepted."""
        first = self.known[self.first]
        known = self.known.setdefault(exit_layer, Acceptance(first.prior, first.weight))
        known.add(drafted, accepted)
        self.forget_best(exit_layer)

    def _trial(self, best: Expected, most_drafts: int) -> Cell:
        return best.cell


@dataclass
class Del(Scored):
    """Tokens per layer: a draft costs its E layers, verification the L layers once, and heads nothing."""

    num_layers: int = 0

    def __post_init__(self) -> None:
        self.seconds = {
            cell: float(cell.num_speculations * cell.exit_layer + self.num_layers)
            for cell in self.seconds
            if cell.exit_layer != FREE
        }
        super().__post_init__()


class Watching(KernelsAround):
    """Kernels that run layers up to each exit in turn, and keep what leaves there while a step is made."""

    def __init__(self, kernels: Kernels, exits: list[int]) -> None:
        super().__init__(kernels)
        self.exits = exits
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.is_watching = False

    def run_layers(
        self, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves the layers (B, T, D)."""
        if not self.is_watching:
            return self.kernels.run_layers(hidden_BTD, layers, positions_BT, cache)
        ends = [exit_layer for exit_layer in self.exits if layers.start < exit_layer <= layers.stop]
        first = layers.start
        for end in [*ends, *([layers.stop] if layers.stop not in ends else [])]:
            hidden_BTD = self.kernels.run_layers(hidden_BTD, range(first, end), positions_BT, cache)
            first = end
            if end in self.exits:
                self.seen.setdefault(end, []).append((positions_BT, hidden_BTD))
        return hidden_BTD

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What leaves at the exits from now on is kept."""
        self.seen.clear()
        self.is_watching = True
        try:
            yield
        finally:
            self.is_watching = False


class ScoredStep(AdaptiveStep):
    """A step of one row after which every exit is scored: by the tokens that it would have chosen in the same places.

    Drafting leaves states behind at shallower exits, verification at deeper ones; their heads are what it costs.
    """

    watch: Watching

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft, verify, commit, score."""
        with self.watch.watching():
            outcome = super().__call__(num_speculations)
        [row] = outcome.unpack()
        decided = row.decided[: row.accepted + 1]
        for exit_layer, seen in self.watch.seen.items():
            states_1TD = torch.cat([hidden_BTD for _, hidden_BTD in seen], dim=1)[:, : len(decided)]
            plan, norm = self.passes.plan, self.passes.model.model.norm
            chosen = self.watch.logits(states_1TD, norm, plan.draft_head).argmax(-1)[0].tolist()
            for own, token in zip(chosen, decided, strict=True):
                self.policy.score(exit_layer, 1, int(own == token))  # type: ignore[attr-defined]
        return outcome


class ScoringStrategy(AdaptiveStrategy):
    """Adaptive decoding by a policy that is told how every exit of its menu would have done; greedy, one row.

    Behind an exit adapter there is one exit, whose own drafts say all.
    """

    def _step(self, request: GenerationRequest, plan: StepPlan) -> Step:
        step = super()._step(request, plan)
        if not isinstance(step, AdaptiveStep) or plan.adapter is not None:
            step.policy.is_scored = False  # type: ignore[attr-defined]
            return step
        watch = Watching(step.passes.kernels, sorted(step.exits))
        exits: dict[int, Step] = {exit_layer: _watched(own, watch) for exit_layer, own in step.exits.items()}
        scored = ScoredStep(exits, _watched(step.resting, watch), step.policy)
        scored.lookup, scored.watch = None, watch
        return scored


def _watched(step: Step, watch: Watching) -> EagerStep:
    return EagerStep(replace(step.passes, kernels=watch), step.rows)
