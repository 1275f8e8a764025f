"""The rows of a batch while they are decoded: tokens addressed by position, and the cache behind them.

Between steps every layer has cached exactly `tokens[:-1]` of each row; the last token is *pending*, no layer has read
it yet. Prefill makes that true, and every step leaves it true.

Shapes: B batch, T positions of this call, C capacity, S noise streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from self_speculation.decoding.cache import PositionAddressedCache, RowOfCache
from self_speculation.decoding.sampling import NUM_STREAMS, noise


@dataclass
class Rows:
    """A batch of rows between two steps.

    `tokens_BC[b, :lengths_B[b]]` are row b's tokens; what lies beyond is stale. Rows advance while `active_B`, never
    past `limits_B`. `noise_BCS` decides the draws at each position; None for greedy decoding.

    `known` are tokens of the only row, all but the last of which are cached: where another prompt begins with them,
    they need not be read again. It is kept up by who asks for that, and empty otherwise.
    """

    tokens_BC: Tensor
    lengths_B: Tensor
    limits_B: Tensor
    active_B: Tensor
    noise_BCS: Tensor | None
    cache: PositionAddressedCache
    known: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, cache: PositionAddressedCache, num_rows: int, sample: bool) -> "Rows":
        """Room for `num_rows` rows of the cache's capacity, on its device."""
        device, capacity = cache.positions_C.device, cache.capacity
        shape = (num_rows, capacity, NUM_STREAMS)
        return cls(
            tokens_BC=torch.zeros(num_rows, capacity, dtype=torch.long, device=device),
            lengths_B=torch.zeros(num_rows, dtype=torch.long, device=device),
            limits_B=torch.zeros(num_rows, dtype=torch.long, device=device),
            active_B=torch.zeros(num_rows, dtype=torch.bool, device=device),
            noise_BCS=torch.zeros(shape, dtype=torch.double, device=device) if sample else None,
            cache=cache,
        )

    def begin(self, prompts: list[list[int]], limits: list[int], seed: int = 0, keys: Sequence[int] = ()) -> None:
        """Put other prompts into the same tensors: what they held before is stale, and nothing is known of it.

        The seed and the rows' `keys` decide their noise, if they have any.
        """
        self.known = []
        capacity = self.tokens_BC.shape[1]
        lengths = [len(prompt) for prompt in prompts]
        self.tokens_BC.copy_(_padded(prompts, capacity))
        self.lengths_B.copy_(torch.tensor(lengths))
        self.limits_B.copy_(torch.tensor(limits))
        self.active_B.copy_(torch.tensor(lengths) < torch.tensor(limits))
        if self.noise_BCS is not None:
            self.noise_BCS.copy_(noise(seed, keys, capacity))

    def row(self, index: int) -> "Rows":
        """One of the rows: a batch of one in the same tensors."""
        own = slice(index, index + 1)
        return Rows(
            tokens_BC=self.tokens_BC[own],
            lengths_B=self.lengths_B[own],
            limits_B=self.limits_B[own],
            active_B=self.active_B[own],
            noise_BCS=None if self.noise_BCS is None else self.noise_BCS[own],
            cache=RowOfCache(self.cache, index, len(self.lengths_B)),
        )

    def num_cached(self, prompt: list[int]) -> int:
        """How many of a prompt's tokens are cached already; its last one is read again in any case."""
        pairs = zip(self.known[:-1], prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def take_over(self, other: "Rows") -> None:
        """Go on from what other rows know, whose cache is smaller."""
        self.cache.copy_from(other.cache, len(other.known))
        self.known = other.known

    def positions(self, count: int) -> Tensor:
        """Positions (B, T) of the pending token and those after it, `count` in all."""
        return self.lengths_B[:, None] + torch.arange(-1, count - 1, device=self.lengths_B.device)

    def read(self, positions_BT: Tensor) -> Tensor:
        """The tokens (B, T) at the positions."""
        return self.tokens_BC.gather(1, positions_BT)

    def write(self, positions_BT: Tensor, tokens_BT: Tensor) -> None:
        """Put tokens (B, T) at the positions."""
        self.tokens_BC.scatter_(1, positions_BT, tokens_BT)

    def noise(self, positions_BT: Tensor) -> Tensor | None:
        """The uniform numbers (B, T, S) that decide the tokens at the positions."""
        if self.noise_BCS is None:
            return None
        return self.noise_BCS.gather(1, positions_BT[..., None].expand(-1, -1, self.noise_BCS.shape[-1]))

    def room(self, num_speculations: int) -> Tensor:
        """How many of d tokens (B) each row may draft: with the target's one it must stay within the row's limit."""
        return (self.limits_B - self.lengths_B - 1).clamp(min=0, max=num_speculations)

    def advance(self, num_tokens_B: Tensor) -> None:
        """Rows that are active have so many tokens (B) more; the last of them is pending."""
        self.lengths_B += num_tokens_B * self.active_B

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index_B = torch.tensor(rows, device=self.lengths_B.device)
        self.tokens_BC, self.lengths_B, self.limits_B, self.active_B = (
            tensor[index_B] for tensor in (self.tokens_BC, self.lengths_B, self.limits_B, self.active_B)
        )
        self.noise_BCS = None if self.noise_BCS is None else self.noise_BCS[index_B]
        self.cache.keep(index_B)


def _padded(prompts: list[list[int]], capacity: int) -> Tensor:
    tokens_BC = torch.zeros(len(prompts), capacity, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BC[row, : len(prompt)] = torch.tensor(prompt)
    return tokens_BC
