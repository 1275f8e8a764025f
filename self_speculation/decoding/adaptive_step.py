"""A step whose exit layer and draft length a policy chooses, and what such steps cost.

Between steps every layer has cached exactly `tokens[:-1]` of each row, so each step may take another E and another d;
d = 0 is autoregressive decoding.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, N numbers of an outcome.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.cell import DRAFTS, FREE, Cell
from self_speculation.decoding.early_exit import num_caches, token_device
from self_speculation.decoding.kernels import forward_remainder
from self_speculation.decoding.lookup import NOTHING, FreeDraft, Lookup
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.prefill import prefill_zeros
from self_speculation.decoding.request import RowStep
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.session import Step
from self_speculation.decoding.step import DraftedToken, EagerPasses, StepOutcome, speculative_step
from self_speculation.decoding.verification import VerificationRule
from self_speculation.families import embed

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
    """A step that asks its policy for E and d, and tells it what came of them. It has a step for every exit.

    These share their rows; one that is fixed is so for all. Without drafts they are alike, and the first is taken. A
    single row may also take drafts that cost nothing.
    """

    def __init__(self, exits: dict[int, Step], policy: Policy) -> None:
        self.exits = exits
        self.policy = policy
        self.first = exits[policy.first]
        self.passes, self.rows, self.is_fixed = self.first.passes, self.first.rows, self.first.is_fixed
        self.lookup = Lookup() if takes_free_drafts(self.rows) else None
        self.free, self.cell = NOTHING, Cell(policy.first, 0)

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft, verify, commit: at most d tokens."""
        self.free = self._free_draft(num_speculations)
        self.cell = self.policy.choose(num_speculations, self.free)
        return self._step(*self.cell)._replace(cell=self.cell)

    def _step(self, exit_layer: int, num_drafts: int) -> StepOutcome:
        if exit_layer == FREE:
            return speculative_step(FreePasses(self.passes, self.free.tokens), self.rows, num_drafts)
        step = self.exits[exit_layer] if num_drafts else self.first
        return step(num_drafts)

    def observe(self, steps: Sequence[RowStep]) -> None:
        """Tell the policy what came of the last step, and the lookup what the row's tokens are now."""
        drafted, accepted = [len(step.drafted) for step in steps], [step.accepted for step in steps]
        self.policy.observe(self.cell, drafted, accepted, self.free)
        if self.lookup is not None:
            self.lookup.extend(steps[0].tokens)

    def _free_draft(self, most: int) -> FreeDraft:
        if self.lookup is None:
            return NOTHING
        if not self.lookup.tokens:
            self.lookup.extend(self.rows.tokens_BC[0, : int(self.rows.lengths_B[0])].tolist())
        return self.lookup.draft(most)


def takes_free_drafts(rows: Rows) -> bool:
    """Whether the tokens are one row's."""
    return len(rows.lengths_B) == 1


@torch.inference_mode()
def step_seconds(exits: dict[int, Step]) -> dict[Cell, float]:
    """What a step costs in every cell of the menu, in seconds.

    Steps are timed at the first and the last exit, over prompts of two zeros that do not advance. Between exits, and
    from one draft on, costs lie on a line, by which the noise of single timings is evened out.
    """
    first, last = min(exits), max(exits)
    rows = _waiting_rows(exits[first])
    sources = {exit_layer: _over(rows, exits[exit_layer]) for exit_layer in (first, last)}
    if takes_free_drafts(rows):
        free = FreePasses(exits[first].passes, [0] * max(DRAFTS))
        sources[FREE] = partial(speculative_step, free, rows)
    timed = [Cell(source, drafts) for source in sources for drafts in DRAFTS]
    seconds = dict.fromkeys(timed, math.inf)
    for turn in range(1 + TIMED):
        for cell in timed:
            one = _seconds(partial(sources[cell.exit_layer], cell.num_speculations))
            # Whatever else runs makes a step slower only; the first of each is slow by itself.
            seconds[cell] = min(seconds[cell], one) if turn else math.inf
    fitted = {source: evened_out({d: seconds[Cell(source, d)] for d in DRAFTS[1:]}) for source in sources}
    menu = {
        Cell(exit_layer, drafts): float(
            np.interp(exit_layer, [first, last], [fitted[first](drafts), fitted[last](drafts)])
        )
        for exit_layer in exits
        for drafts in DRAFTS[1:]
    }
    menu |= {Cell(exit_layer, 0): seconds[Cell(first, 0)] for exit_layer in exits}
    if FREE in sources:
        menu |= {Cell(FREE, drafts): float(fitted[FREE](drafts)) for drafts in range(1, max(DRAFTS) + 1)}
    return menu


def evened_out(seconds: dict[int, float]) -> Callable[[int], float]:
    """Seconds by the draft length, on a line through those that were timed.

    None is below the least of them: where other work slowed some of the steps, a line may even fall below zero.
    """
    line = np.polynomial.Polynomial.fit(list(seconds), list(seconds.values()), 1)
    return lambda drafts: max(float(line(drafts)), min(seconds.values()))


def _waiting_rows(step: Step) -> Rows:
    """Rows for timing a step: its own if it is fixed, else short ones of the same kind."""
    passes, rows, room = step.passes, step.rows, max(DRAFTS) + 1
    if not step.is_fixed:
        cache = PositionAddressedCache(num_caches(passes.model), 3 + room, token_device(passes.model))
        rows = Rows.empty(cache, len(rows.lengths_B), rows.noise_BCS is not None)
    prefill_zeros(passes, rows)
    rows.active_B.zero_()
    rows.cache.see(2 + room)
    return rows


def _over(rows: Rows, step: Step) -> Callable[[int], StepOutcome]:
    """The step over these rows."""
    return step if step.rows is rows else partial(speculative_step, step.passes, rows)


def _seconds(step: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
