"""What steps cost on this machine, in the mode that runs: by which a policy chooses (`decoding/policy.py`)."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.cell import DRAFTS, FREE, Cell
from self_speculation.decoding.early_exit import num_caches, token_device
from self_speculation.decoding.free_passes import FreePasses, takes_free_drafts
from self_speculation.decoding.prefill import prefill_zeros
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.session import Step
from self_speculation.decoding.step import StepOutcome, speculative_step

# After how many tokens steps are timed: almost none, and so many, or what the model has room for.
NEAR, FAR = 2, 1024
# Of many rows each has fewer, so that all together hold no more; less than the least context says nothing.
MOST_HELD, LEAST_FAR = 8 * FAR, 128
# How often each step is timed, after once that does not count; less often, where that has taken so many seconds.
TIMED, LONG = 5, 3.0


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step in every cell of the menu, after few tokens and after `context` of them."""

    near: dict[Cell, float]
    far: dict[Cell, float]
    context: int = FAR

    def after(self, num_tokens: float) -> dict[Cell, float]:
        """What steps cost after so many tokens: on a line, for what is read of the cache grows with them."""
        share = (num_tokens - NEAR) / (self.context - NEAR)
        return {cell: near + share * max(self.far[cell] - near, 0.0) for cell, near in self.near.items()}


@torch.inference_mode()
def step_costs(exits: dict[int, Step], resting: Step, lengths: Sequence[int] = DRAFTS) -> StepCosts:
    """What a step costs in every cell of the menu; `lengths` are those of drafts, 0 the first of them.

    A fixed step, which reads the same whatever the context is, is timed once.
    """
    near = _step_seconds(exits, resting, lengths, NEAR)
    passes, num_rows = resting.passes, len(resting.rows.lengths_B)
    room = passes.model.config.max_position_embeddings - max(lengths) - 2
    far = min(FAR, MOST_HELD // num_rows, room)
    if resting.is_fixed or far < LEAST_FAR:
        return StepCosts(near, near)
    return StepCosts(near, _step_seconds(exits, resting, lengths, far), far)


def _step_seconds(exits: dict[int, Step], resting: Step, lengths: Sequence[int], context: int) -> dict[Cell, float]:
    """What a step costs after `context` tokens, in seconds.

    Steps are timed at the first and the last exit, over rows that do not advance. Between exits, and from one draft on,
    costs lie on a line, by which the noise of single timings is evened out; after many tokens its ends are enough.
    """
    first, last, longest = min(exits), max(exits), max(lengths)
    rows = _waiting_rows(exits[first], longest + 1, context)
    without_drafts = _over(rows, resting)
    sources = {exit_layer: _over(rows, exits[exit_layer]) for exit_layer in (first, last)}
    free_lengths = tuple(sorted({*(d for d in DRAFTS if 0 < d < longest), longest}))
    if takes_free_drafts(rows):
        sources[FREE] = partial(speculative_step, FreePasses(resting.passes, [0] * longest), rows)
    drafts_of = dict.fromkeys(sources, tuple(lengths)) | {FREE: free_lengths}
    if context > NEAR:
        drafts_of = {source: _ends(drafts) for source, drafts in drafts_of.items()}
    timed = [Cell(source, drafts) for source in sources for drafts in drafts_of[source]]
    seconds, start = dict.fromkeys(timed, math.inf), time.perf_counter()
    for turn in range(1 + TIMED):
        if turn > 1 and time.perf_counter() - start > LONG:
            break
        for cell in timed:
            step = sources[cell.exit_layer] if cell.num_speculations else without_drafts
            one = _seconds(partial(step, cell.num_speculations))
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


def _ends(lengths: Sequence[int]) -> tuple[int, ...]:
    """No draft, where that is one of them, the shortest one and the longest."""
    drafts = [drafts for drafts in lengths if drafts]
    return tuple(sorted({*(drafts for drafts in lengths if not drafts), min(drafts), max(drafts)}))


def evened_out(seconds: dict[int, float]) -> Callable[[int], float]:
    """Seconds by the draft length, on a line through those that were timed, a level one through a single length.

    None is below the least of them: where other work slowed some of the steps, a line may even fall below zero.
    """
    line = np.polynomial.Polynomial.fit(list(seconds), list(seconds.values()), min(1, len(seconds) - 1))
    return lambda drafts: max(float(line(drafts)), min(seconds.values()))


def _waiting_rows(step: Step, room: int, context: int) -> Rows:
    """Rows for timing a step, of `context` tokens: its own if it is fixed, else others of the same kind.

    What they are does not matter to time: all but the first keys and values are zeros.
    """
    passes, rows = step.passes, step.rows
    if not step.is_fixed:
        cache = PositionAddressedCache(num_caches(passes.model), context + 1 + room, token_device(passes.model))
        rows = Rows.empty(cache, len(rows.lengths_B), rows.noise_BCS is not None)
    prefill_zeros(passes, rows)
    rows.lengths_B.fill_(context)
    rows.active_B.zero_()
    rows.cache.see(context + room)
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
