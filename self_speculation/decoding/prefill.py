"""Reading the prompts, which makes the invariant true: every layer has cached `tokens[:-1]` of each row.

Shapes: B batch, T positions of this call.
"""

import torch
from transformers import LlamaForCausalLM

from self_speculation.decoding.early_exit import embed, run_layers
from self_speculation.decoding.rows import Rows


def prefill(model: LlamaForCausalLM, rows: Rows, num_layers: int, chunk: int | None = None) -> None:
    """Cache `tokens[:-1]` of every row in the first `num_layers` layers: over right-padded prompts, without LM head.

    In one pass, or in passes over `chunk` positions, which bound the memory that a long prompt takes.
    """
    longest = int(rows.lengths_B.max()) - 1
    chunk = chunk or max(longest, 1)
    for first in range(0, longest, chunk):
        last = min(first + chunk, longest)
        rows.cache.see(last, is_prefill=first == 0)
        positions_BT = torch.arange(first, last, device=rows.lengths_B.device).expand(len(rows.lengths_B), -1)
        run_layers(model, embed(model, rows.read(positions_BT)), range(num_layers), positions_BT, rows.cache)
