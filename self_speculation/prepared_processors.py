"""Logits processors that transformers' `generate` has prepared, and how a row of ours is shown to them.

Shapes: B batch, T tokens, the padding included, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# From the last to the first, as `generate` applies them when it samples.
FILTERS: dict[str, Any] = {"top_p": TopPLogitsWarper, "top_k": TopKLogitsWarper, "temperature": TemperatureLogitsWarper}
UNFILTERED = {"top_p": 1.0, "top_k": 0, "temperature": 1.0}


def split_filters(prepared: LogitsProcessorList) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """The processors, and the settings that do the same as those filters of sampling that stand last among them."""
    others, settings = LogitsProcessorList(prepared), dict(UNFILTERED)
    for name, kind in FILTERS.items():
        value = vars(others[-1]).get(name) if others and type(others[-1]) is kind else None
        # One with options of its own stays what it is.
        if value and vars(kind(value)) == vars(others[-1]):
            settings[name] = value
            others.pop()
    return others, settings


class AsInGenerate(LogitsProcessor):
    """Processors that see one row as `generate` shows it: in its place in the batch, behind its padding.

    The batch's other rows are copies of it, which no processor that looks at each row alone can tell.
    """

    def __init__(self, processors: LogitsProcessorList, row: int, padding_BP: Tensor) -> None:
        self.processors = processors
        self.row = row
        self.padding_BP = padding_BP

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The row's scores (1, V) behind its tokens (1, T)."""
        count, device = len(self.padding_BP), self.padding_BP.device
        tokens_BT: Any = torch.cat([self.padding_BP, input_ids.to(device).expand(count, -1)], dim=1)
        processed_BV = self.processors(tokens_BT, scores.to(device).repeat(count, 1))
        return processed_BV[self.row : self.row + 1].to(scores.device)
