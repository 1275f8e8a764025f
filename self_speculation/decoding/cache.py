"""The position-addressed KV cache that drafting and verification share (section 4.3 of the paper).

A layer writes keys and values at the positions it is given; a query at position i sees the keys at positions ≤ i.
Entries past a row's length are stale: no query sees them, and the next step overwrites them, so rejecting a draft
costs nothing.

The host says once a step how far queries may `see`; a pass asks for `access` at its positions; each of its layers
writes and reads through that access, by `update`.

Shapes: B batch, T positions of a pass, C capacity, W visible prefix (W ≤ C), H key-value heads, K head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET = 64


def round_up(length: int) -> int:
    """The next multiple of the bucket size, so that few different shapes occur."""
    return -(-length // BUCKET) * BUCKET


def power_of_two(length: int) -> int:
    """The next power of two, from four buckets up: so few shapes that each can have a graph of its own."""
    return max(1 << (length - 1).bit_length(), 4 * BUCKET)


class PositionAddressedCache:
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
        self.capacity = round_up(capacity)
        self.bucket = bucket
        self.positions_C = torch.arange(self.capacity, device=device)
        self.positions_W = self.positions_C
        self.is_prefill = False
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def see(self, length: int, is_prefill: bool = False) -> None:
        """Let queries read the first `length` positions only, rounded up; none of them may lie further on.

        The passes of a prefill start at position 0.
        """
        self.positions_W = self.positions_C[: min(self.bucket(length), self.capacity)]
        self.is_prefill = is_prefill

    @property
    def visible(self) -> int:
        """W: how many positions queries read."""
        return self.positions_W.shape[0]

    def access(self, positions_BT: Tensor) -> "CacheAccess":
        """What a pass over these positions may write, and what each of them sees.

        Prefill needs no mask: there `sdpa` is causal by itself, but for a single query.
        """
        rows_B1 = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
        is_causal = self.is_prefill and positions_BT.shape[1] > 1
        mask_B1TW = None if is_causal else self.positions_W <= positions_BT[:, None, :, None]
        return CacheAccess(self, rows_B1, positions_BT, mask_B1TW)

    def buffers(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values; made now, to hold what looks like these (B, H, T, K), if it has none yet."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            batch_size, num_heads, _, head_dim = key_states.shape
            shape = (batch_size, num_heads, self.capacity, head_dim)
            self.keys[layer] = keys = key_states.new_zeros(shape)
            self.values[layer] = values = value_states.new_zeros(shape)
        return keys, values

    def keep(self, index_B: Tensor) -> None:
        """Go on with these rows only."""
        for buffers in (self.keys, self.values):
            buffers[:] = [None if buffer is None else buffer[index_B.to(buffer.device)] for buffer in buffers]

    def copy_from(self, other: "PositionAddressedCache", length: int) -> None:
        """Take over the first `length` positions of another cache of the same model and as many rows."""
        pairs = zip((self.keys, self.values), (other.keys, other.values), strict=True)
        for layer, (own, others) in ((layer, pair) for pair in pairs for layer in range(len(other.keys))):
            source = others[layer]
            if source is not None:
                target = own[layer]
                if target is None:
                    target = own[layer] = source.new_zeros((*source.shape[:2], self.capacity, source.shape[3]))
                target[:, :, :length] = source[:, :, :length]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers allocated so far."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values) if buffer is not None)


class RowOfCache(PositionAddressedCache):
    """One row of a cache of `num_rows`: a cache of one row in the same buffers."""

    def __init__(self, whole: PositionAddressedCache, row: int, num_rows: int) -> None:
        super().__init__(len(whole.keys), whole.capacity, whole.positions_C.device, whole.bucket)
        self.whole = whole
        self.row = row
        self.num_rows = num_rows

    def buffers(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The row's keys and values of a layer."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            like = (states.expand(self.num_rows, -1, -1, -1) for states in (key_states, value_states))
            keys, values = (buffer[self.row : self.row + 1] for buffer in self.whole.buffers(layer, *like))
            self.keys[layer], self.values[layer] = keys, values
        return keys, values


@dataclass(frozen=True)
class CacheAccess:
    """One pass's access: the rows (B, 1) and positions (B, T) that it writes, and the mask of what it reads."""

    cache: PositionAddressedCache
    rows_B1: Tensor
    positions_BT: Tensor
    mask_B1TW: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, T, K) at the positions; returns the visible prefix (B, H, W, K).

        By index: `scatter_` does the same, in 16 bits twenty times as slowly.
        """
        keys_BHCK, values_BHCK = self.cache.buffers(layer_idx, key_states, value_states)
        rows_B1, positions_BT = self.rows_B1.to(keys_BHCK.device), self.positions_BT.to(keys_BHCK.device)
        keys_BHCK[rows_B1, :, positions_BT] = key_states.transpose(1, 2)
        values_BHCK[rows_B1, :, positions_BT] = value_states.transpose(1, 2)
        visible = self.cache.visible
        return keys_BHCK[:, :, :visible], values_BHCK[:, :, :visible]


@dataclass(frozen=True)
class Uncached:
    """No cache: positions start at 0 and see those of their own pass, where `sdpa` is causal by itself."""

    mask_B1TW: None = None

    def access(self, positions_BT: Tensor) -> "Uncached":
        """The same for all positions."""
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object) -> tuple[Tensor, Tensor]:
        """The pass's own keys and values."""
        return key_states, value_states
