"""What steps cost on this machine, in the mode that runs: by which a policy chooses (`decoding/policy.py`)."""

import math
import time
from collections.abc import Callable, Sequence
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

# How often each step is timed, after once that does not count; less often, where that has taken so many seconds.
TIMED, LONG = 5, 3.0


@torch.inference_mode()
def step_seconds(exits: dict[int, Step], resting: Step, lengths: Sequence[int] = DRAFTS) -> dict[Cell, float]:
    """What a step costs in every cell of the menu, in seconds; `lengths` are those of drafts, 0 the first of them.

    Steps are timed at the first and the last exit, over prompts of two zeros that do not advance. Between exits, and
    from one draft on, costs lie on a line, by which the noise of single timings is evened out.
    """
    first, last, longest = min(exits), max(exits), max(lengths)
    rows = _waiting_rows(exits[first], longest + 1)
    without_drafts = _over(rows, resting)
    sources = {exit_layer: _over(rows, exits[exit_layer]) for exit_layer in (first, last)}
    if takes_free_drafts(rows):
        sources[FREE] = partial(speculative_step, FreePasses(resting.passes, [0] * longest), rows)
    drafts_of = dict.fromkeys(sources, lengths) | {FREE: (*(d for d in DRAFTS if 0 < d < longest), longest)}
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


def evened_out(seconds: dict[int, float]) -> Callable[[int], float]:
    """Seconds by the draft length, on a line through those that were timed, a level one through a single length.

    None is below the least of them: where other work slowed some of the steps, a line may even fall below zero.
    """
    line = np.polynomial.Polynomial.fit(list(seconds), list(seconds.values()), min(1, len(seconds) - 1))
    return lambda drafts: max(float(line(drafts)), min(seconds.values()))


def _waiting_rows(step: Step, room: int) -> Rows:
    """Rows for timing a step: its own if it is fixed, else short ones of the same kind."""
    passes, rows = step.passes, step.rows
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
