"""The position-addressed KV cache that drafting and verification share (section 4.3 of the paper).

A layer writes keys and values at the positions it is given; a query at position i sees the keys at positions ≤ i.
Entries past a row's length are stale: no query sees them, and the next step overwrites them, so rejecting a draft
costs nothing.

Shapes: B batch, T positions of this call, C capacity, W visible prefix (W ≤ C), H key-value heads, K head dimension.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache

BUCKET = 64


def round_up(length: int) -> int:
    """The next multiple of the bucket size, so that few different shapes occur."""
    return -(-length // BUCKET) * BUCKET


def power_of_two(length: int) -> int:
    """The next power of two, from four buckets up: so few shapes that each can have a graph of its own."""
    return max(1 << (length - 1).bit_length(), 4 * BUCKET)


class PositionAddressedCache(Cache):
    """Preallocated keys and values of all layers, each (B, H, C, K), on the layer's own device.

    A layer's buffers are allocated when it first writes, with zeros: an uninitialised NaN would survive its mask.
    `bucket` rounds a length up to the prefix that queries read. `device` is where positions live.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        device: torch.device | None = None,
        bucket: Callable[[int], int] = round_up,
    ) -> None:
        super().__init__(layers=[])
        self.capacity = round_up(capacity)
        self.bucket = bucket
        self.positions_C = torch.arange(self.capacity, device=device)
        self.keys_W = self.positions_C
        self.is_prefill = False
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.slots = (torch.empty(0, 1, dtype=torch.long), torch.empty(0, 0, dtype=torch.long))

    def address(self, positions_BT: Tensor) -> Tensor | None:
        """Set where the layers write next; return the mask (B, 1, T, W) of the keys that each position sees.

        Prefill needs no mask: its positions start at 0, and there `sdpa` is causal by itself, but for a single query.
        """
        self.slots = (torch.arange(len(positions_BT), device=positions_BT.device)[:, None], positions_BT)
        if self.is_prefill and positions_BT.shape[1] > 1:
            return None
        return self.keys_W <= positions_BT[:, None, :, None]

    def see(self, length: int, is_prefill: bool = False) -> None:
        """Let queries read the first `length` positions only, rounded up; none of them may lie further on."""
        self.keys_W = self.positions_C[: min(self.bucket(length), self.capacity)]
        self.is_prefill = is_prefill

    @property
    def visible(self) -> int:
        """W: how many positions queries read."""
        return self.keys_W.shape[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, K) keys and values at the addressed positions; return the visible prefix (B, H, W, K)."""
        if self.keys[layer_idx] is None:
            batch_size, num_heads, _, head_dim = key_states.shape
            shape = (batch_size, num_heads, self.capacity, head_dim)
            self.keys[layer_idx] = key_states.new_zeros(shape)
            self.values[layer_idx] = value_states.new_zeros(shape)
        keys = self._write(self.keys[layer_idx], key_states)
        values = self._write(self.values[layer_idx], value_states)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def _write(self, buffer_BHCK: Tensor, states_BHTK: Tensor) -> Tensor:
        """Put states at the addressed positions; `scatter_` does the same, in 16 bits twenty times as slowly."""
        rows_B1, positions_BT = (index.to(buffer_BHCK.device) for index in self.slots)
        buffer_BHCK[rows_B1, :, positions_BT] = states_BHTK.transpose(1, 2)
        return buffer_BHCK

    def keep(self, index_B: Tensor) -> None:
        """Go on with these rows only."""
        for buffers in (self.keys, self.values):
            buffers[:] = [None if buffer is None else buffer[index_B.to(buffer.device)] for buffer in buffers]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers allocated so far."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values) if buffer is not None)
