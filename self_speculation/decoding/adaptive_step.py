"""A step whose exit layer and draft length a policy chooses, and what such steps cost.

Between steps every layer has cached exactly `tokens[:-1]` of each row, so each step may take another E and another d;
d = 0 is autoregressive decoding.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, N numbers of an outcome.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.confidence import ConfidentRule
from self_speculation.decoding.early_exit import num_caches, token_device
from self_speculation.decoding.kernels import forward_remainder
from self_speculation.decoding.late_adapter import LateAdapterKernels
from self_speculation.decoding.lookup import NOTHING, FreeDraft, Lookup
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.prefill import prefill
from self_speculation.decoding.request import RowStep
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import DraftedToken, EagerPasses, Passes, StepOutcome, speculative_step
from self_speculation.decoding.verification import VerificationRule
from self_speculation.families import embed

# The draft lengths to choose from, where no others are recommended or given.
DRAFTS = (0, 1, 2, 3, 4, 6, 8)
# How often a step is timed for its cost, after once that does not count.
TIMED = 5


@dataclass(frozen=True)
class FreePasses:
    """Passes whose drafts cost nothing: tokens (of the only row) that are given. All layers read them at once."""

    own: EagerPasses
    tokens: list[int]

    @property
    def rule(self) -> VerificationRule:
        """How tokens are chosen and drafts judged."""
        return self.own.rule

    def draft(self, rows: Rows, ahead: int) -> DraftedToken:
        """The given token; what it leaves behind is the embedding of the one before it."""
        position_B1 = rows.positions(1) + ahead
        token_B1 = torch.full_like(position_B1, self.tokens[ahead])
        state_B1D = embed(self.own.model, rows.read(position_B1))
        rows.write(position_B1 + 1, token_B1)
        return DraftedToken(state_B1D, self.rule.certain(token_B1, self.own.model.config.vocab_size))

    def verify(self, rows: Rows, positions_BT: Tensor, exit_states: list[Tensor]) -> Tensor:
        """The full model's logits (B, T, V); the exit adapter's cache, too, must hold these tokens."""
        plan, kernels = self.own.plan, self.own.kernels
        last_B1D = embed(self.own.model, rows.read(positions_BT[:, -1:]))
        hidden_BTD = torch.cat([*exit_states, last_B1D], dim=1)
        hidden_BTD = kernels.run_layers(hidden_BTD, range(plan.exit_layer), positions_BT, rows.cache)
        if plan.adapter is not None:
            kernels.run_adapter(plan.adapter, hidden_BTD, positions_BT, rows.cache)
        remainder = range(plan.exit_layer, plan.num_layers)
        hidden_BTD = forward_remainder(kernels, hidden_BTD, remainder, positions_BT, rows.cache)
        return self.own.processed(rows, kernels.logits(hidden_BTD, self.own.model.model.norm), positions_BT)


class AdaptiveStep:
    """A step that asks its policy for E and d, and tells it what came of them. It has passes for every exit.

    A single row may also take drafts that cost nothing. `passes` are of steps that draft nothing at their exit; there
    an exit adapter may wait. Where the exits' rule tells how sure a draft is, the policy may stop it.
    """

    is_fixed = False

    def __init__(self, exits: dict[int, EagerPasses], passes: EagerPasses, rows: Rows, policy: Policy) -> None:
        self.exits = exits
        self.passes = passes
        self.rows = rows
        self.policy = policy
        self.lookup = Lookup() if takes_free_drafts(rows) else None
        self.free, self.cell = NOTHING, Cell(policy.first, 0)
        self.confidences: list[float] = []

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft, verify, commit: at most d tokens."""
        self.free = self._free_draft(num_speculations)
        self.cell = self.policy.choose(num_speculations, self.free)
        self.confidences = []
        passes, rule = self._passes(), self.exits[self.policy.first].rule
        if self.cell.exit_layer == FREE or not self.cell.num_speculations or not isinstance(rule, ConfidentRule):
            return speculative_step(passes, self.rows, self.cell.num_speculations)._replace(cell=self.cell)
        outcome = speculative_step(passes, self.rows, num_speculations, partial(self._is_enough, rule))
        self.cell = self.cell._replace(num_speculations=len(self.confidences))
        return outcome._replace(cell=self.cell)

    def _is_enough(self, rule: ConfidentRule) -> bool:
        """Whether one token more of this draft does not pay."""
        self.confidences.append(rule.confidence())
        return not self.policy.goes_on(self.cell.exit_layer, self.confidences)

    def _passes(self) -> Passes:
        """The passes of the cell that was chosen; an adapter that is to draft reads first what it has missed."""
        if self.cell.exit_layer == FREE:
            return FreePasses(self.passes, self.free.tokens)
        if not self.cell.num_speculations:
            return self.passes
        adapter, kernels = self.passes.plan.adapter, self.passes.kernels
        if adapter is not None and isinstance(kernels, LateAdapterKernels):
            kernels.catch_up(adapter, self.rows.cache)
        return self.exits[self.cell.exit_layer]

    def observe(self, steps: Sequence[RowStep]) -> None:
        """Tell the policy what came of the last step, and the lookup what the row's tokens are now."""
        drafted, accepted = [len(step.drafted) for step in steps], [step.accepted for step in steps]
        self.policy.observe(self.cell, drafted, accepted, self.free)
        if self.confidences:
            self.policy.observe_confidences(self.cell.exit_layer, self.confidences[: drafted[0]], accepted[0])
        if self.lookup is not None:
            self.lookup.extend(steps[0].tokens)
        kernels = self.passes.kernels
        if isinstance(kernels, LateAdapterKernels) and self.cell.exit_layer == FREE:
            kernels.keep(accepted[0] + 1)

    def _free_draft(self, most: int) -> FreeDraft:
        if self.lookup is None:
            return NOTHING
        if not self.lookup.tokens:
            self.lookup.extend(self.rows.tokens_BC[0, : int(self.rows.lengths_B[0])].tolist())
        return self.lookup.draft(most)


def resting(passes: EagerPasses) -> EagerPasses:
    """The passes, for steps that draft nothing at their exit: an adapter that they have waits."""
    return passes if passes.plan.adapter is None else replace(passes, kernels=LateAdapterKernels(passes.kernels))


def takes_free_drafts(rows: Rows) -> bool:
    """Whether the tokens are one row's."""
    return len(rows.lengths_B) == 1


@torch.inference_mode()
def step_seconds(
    exits: dict[int, EagerPasses],
    without_drafts: EagerPasses,
    num_rows: int,
    sample: bool,
    lengths: Sequence[int] = DRAFTS,
) -> dict[Cell, float]:
    """What a step costs in every cell of the menu, in seconds; `lengths` are those of drafts, 0 the first of them.

    Steps are timed at the first and the last exit, over prompts of two zeros that do not advance. Between exits, and
    from one draft on, costs lie on a line, by which the noise of single timings is evened out.
    """
    first, last, longest = min(exits), max(exits), max(lengths)
    rows = _waiting_rows(exits[first], num_rows, sample, longest + 1)
    sources: dict[int, Passes] = {exit_layer: exits[exit_layer] for exit_layer in {first, last}}
    if takes_free_drafts(rows):
        sources[FREE] = FreePasses(without_drafts, [0] * longest)
    drafts_of = dict.fromkeys(sources, lengths) | {FREE: (*(d for d in DRAFTS if 0 < d < longest), longest)}
    timed = [Cell(source, drafts) for source in sources for drafts in drafts_of[source]]
    seconds = dict.fromkeys(timed, math.inf)
    for turn in range(1 + TIMED):
        for cell in timed:
            passes = sources[cell.exit_layer] if cell.num_speculations else without_drafts
            one = _seconds(partial(speculative_step, passes, rows, cell.num_speculations))
            # Whatever else runs makes a step slower only; the first of each is slow by itself.
            seconds[cell] = min(seconds[cell], one) if turn else math.inf
    fitted = {source: evened_out({d: seconds[Cell(source, d)] for d in drafts_of[source] if d}) for source in sources}
    menu = {
        Cell(exit_layer, drafts): float(
            np.interp(exit_layer, [first, last], [fitted[first](drafts), fitted[last](drafts)])
        )
        for exit_layer in exits
        for drafts in lengths
        if drafts
    }
    menu |= {Cell(exit_layer, 0): seconds[Cell(first, 0)] for exit_layer in exits}
    if FREE in sources:
        menu |= {Cell(FREE, drafts): float(fitted[FREE](drafts)) for drafts in range(1, longest + 1)}
    return menu


def evened_out(seconds: dict[int, float]) -> Callable[[int], float]:
    """Seconds by the draft length, on a line through those that were timed, a level one through a single length.

    None is below the least of them: where other work slowed some of the steps, a line may even fall below zero.
    """
    line = np.polynomial.Polynomial.fit(list(seconds), list(seconds.values()), min(1, len(seconds) - 1))
    return lambda drafts: max(float(line(drafts)), min(seconds.values()))


def _waiting_rows(passes: EagerPasses, num_rows: int, sample: bool, room: int) -> Rows:
    model = passes.model
    rows = Rows.empty(PositionAddressedCache(num_caches(model), 3 + room, token_device(model)), num_rows, sample)
    rows.begin([[0, 0]] * num_rows, [2 + room] * num_rows, keys=[0] * num_rows)
    prefill(passes, rows)
    rows.active_B.zero_()
    rows.cache.see(2 + room)
    return rows


def _seconds(step: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
