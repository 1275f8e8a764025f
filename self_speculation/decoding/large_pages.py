"""One piece of memory for a model's weights, in large pages where the system has them.

Decoding reads every weight for every token. In pages of 4 kB that is tens of thousands of addresses to look up; in
pages of 2 MB, a hundred. Matrices are smaller than such a page, so that only together they fill some.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 1 << 21
# Where a tensor may begin, so that vectors do not cross cache lines.
ALIGNMENT = 64


class Arena:
    """Room for some tensors; they are freed together."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        size = sum(_aligned(tensor.nbytes) for tensor in tensors) + PAGE
        self.bytes = _in_large_pages(size)
        self.used = -self.bytes.data_ptr() % PAGE

    @torch.inference_mode(False)
    def place(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in here, which is contiguous."""
        room = self.bytes[self.used : self.used + tensor.nbytes]
        self.used += _aligned(tensor.nbytes)
        with torch.no_grad():
            return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _in_large_pages(size: int) -> Tensor:
    """So many bytes; the system takes the wish for large pages, or does not know it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # A kernel that was built without them.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
