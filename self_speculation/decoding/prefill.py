"""Reading the prompts, which makes the invariant true: every layer has cached `tokens[:-1]` of each row.

Shapes: B batch, T positions of this call.
"""

from typing import TYPE_CHECKING

import torch

from self_speculation.decoding.kernels import forward_early, forward_remainder
from self_speculation.decoding.rows import Rows

if TYPE_CHECKING:
    from self_speculation.decoding.step import EagerPasses

# Prompts up to so many tokens are read together on a CPU.
LONGEST_TOGETHER = 32


def prefill(passes: "EagerPasses", rows: Rows, chunk: int | None = None, num_cached: int = 0) -> None:
    """Cache `tokens[:-1]` of every row in the layers of the plan, without LM head.

    In one pass, or in passes over `chunk` positions, which bound the memory that a long prompt takes. Of the rows'
    first `num_cached` tokens all layers have keys and values already. On a CPU, where the padding of shorter prompts
    would cost as much as tokens do, rows are read one by one, unless all are so short that the weights cost more.
    """
    is_apart = rows.lengths_B.device.type == "cpu" and int(rows.lengths_B.max()) > LONGEST_TOGETHER
    parts = [rows.row(index) for index in range(len(rows.lengths_B))] if is_apart else [rows]
    for part in parts:
        _prefill(passes, part, chunk, num_cached)


def prefill_zeros(passes: "EagerPasses", rows: Rows) -> None:
    """Begin with prompts of two zeros, for what depends on no tokens: compiling, and timing."""
    num_rows = len(rows.lengths_B)
    rows.begin([[0, 0]] * num_rows, [rows.cache.capacity] * num_rows, keys=[0] * num_rows)
    prefill(passes, rows)


def _prefill(passes: "EagerPasses", rows: Rows, chunk: int | None, num_cached: int) -> None:
    """Over right-padded prompts."""
    plan, kernels = passes.plan, passes.kernels
    longest = int(rows.lengths_B.max()) - 1
    chunk = chunk or max(longest, 1)
    for first in range(num_cached, longest, chunk):
        last = min(first + chunk, longest)
        rows.cache.see(last, is_prefill=first == 0)
        positions_BT = torch.arange(first, last, device=rows.lengths_B.device).expand(len(rows.lengths_B), -1)
        exit_states_BTD = forward_early(kernels, rows.read(positions_BT), plan.exit_layer, positions_BT, rows.cache)
        if plan.adapter is not None:
            kernels.run_adapter(plan.adapter, exit_states_BTD, positions_BT, rows.cache)
        remainder = range(plan.exit_layer, plan.num_layers)
        forward_remainder(kernels, exit_states_BTD, remainder, positions_BT, rows.cache)
