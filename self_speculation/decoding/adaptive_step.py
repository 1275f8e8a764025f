"""A step whose exit layer and draft length a policy chooses, and what such steps cost.

Between steps every layer has cached exactly `tokens[:-1]` of each row, so each step may take another E and another d;
d = 0 is autoregressive decoding.

Shapes: B batch, N numbers of an outcome.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.early_exit import num_caches, token_device
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.prefill import prefill
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, StepOutcome, speculative_step

# The draft lengths to choose from.
DRAFTS = (0, 1, 2, 3, 4, 6, 8)
# How often a step is timed for its cost, after once that does not count.
TIMED = 5


class AdaptiveStep:
    """A step that asks its policy for E and d, and tells it what came of them. It has passes for every exit."""

    is_fixed = False

    def __init__(self, exits: dict[int, EagerPasses], rows: Rows, policy: Policy) -> None:
        self.exits = exits
        self.rows = rows
        self.policy = policy
        self.passes = exits[policy.first]

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft, verify, commit: at most d tokens."""
        cell = self.policy.choose(num_speculations)
        drafted_B = self.rows.room(cell.num_speculations)
        outcome = speculative_step(self.exits[cell.exit_layer], self.rows, cell.num_speculations)
        counts_B2 = torch.stack([drafted_B, outcome.packed_BN[:, 0]], dim=1)[self.rows.active_B]
        self.policy.observe(cell, *counts_B2.T.tolist())
        return outcome


@torch.inference_mode()
def step_seconds(exits: dict[int, EagerPasses], num_rows: int, sample: bool) -> dict[Cell, float]:
    """What a step costs in every cell of the menu, in seconds.

    Steps are timed at the first and the last exit, over prompts of two zeros that do not advance. Between exits, and
    from one draft on, costs lie on a line, by which the noise of single timings is evened out.
    """
    first, last = min(exits), max(exits)
    rows = _waiting_rows(exits[first], num_rows, sample)
    timed = [Cell(exit_layer, drafts) for exit_layer in {first, last} for drafts in DRAFTS]
    seconds = dict.fromkeys(timed, math.inf)
    for turn in range(1 + TIMED):
        for cell in timed:
            one = _seconds(partial(speculative_step, exits[cell.exit_layer], rows, cell.num_speculations))
            # Whatever else runs makes a step slower only; the first of each is slow by itself.
            seconds[cell] = min(seconds[cell], one) if turn else math.inf
    fitted = {
        exit_layer: np.polynomial.Polynomial.fit(
            DRAFTS[1:], [seconds[Cell(exit_layer, drafts)] for drafts in DRAFTS[1:]], 1
        )
        for exit_layer in {first, last}
    }
    return {
        Cell(exit_layer, drafts): seconds[Cell(first, 0)]
        if drafts == 0
        else float(np.interp(exit_layer, [first, last], [fitted[first](drafts), fitted[last](drafts)]))
        for exit_layer in exits
        for drafts in DRAFTS
    }


def _waiting_rows(passes: EagerPasses, num_rows: int, sample: bool) -> Rows:
    model, room = passes.model, max(DRAFTS) + 1
    rows = Rows.empty(PositionAddressedCache(num_caches(model), 3 + room, token_device(model)), num_rows, sample)
    rows.begin([[0, 0]] * num_rows, [2 + room] * num_rows, seed=0)
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
