"""Labels: the token that each position has to predict, and the positions that have none.

Shapes: B batch, T positions, N = B·T rows.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


def next_labels(labels_BT: Tensor) -> Tensor:
    """Y: what each position has to predict, the label of the position after it, (N); the last one of a row has none."""
    return F.pad(labels_BT, (0, 1), value=IGNORED_LABEL)[:, 1:].flatten()


def num_labels(labels_BT: Tensor) -> Tensor:
    """Tokens of each row that are to be predicted, (B)."""
    return (labels_BT[:, 1:] != IGNORED_LABEL).sum(1)
