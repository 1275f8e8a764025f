"""An exit adapter that reads nothing until it is to draft.

Its cache must hold every token before it drafts, and not earlier. While a policy drafts nothing at its exit, its layer
would run for nothing at every step, and over the whole prompt. So what it should have read waits, and is read at once,
in one pass, when it is needed.

Shapes: B batch, which is one row here, T positions of this call, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.kernels import Kernels
from self_speculation.exit_adapter import ExitAdapter


class KernelsAround:
    """Others' kernels, of which a subclass changes something."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.kernels.model

    @property
    def backend(self) -> str | None:
        """What torch compiles a step of these passes with."""
        return self.kernels.backend

    def run_layers(
        self, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves the layers (B, T, D)."""
        return self.kernels.run_layers(hidden_BTD, layers, positions_BT, cache)

    def run_adapter(
        self, adapter: ExitAdapter, exit_states_BTD: Tensor, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """What leaves an exit adapter's layer (B, T, D)."""
        return self.kernels.run_adapter(adapter, exit_states_BTD, positions_BT, cache)

    def logits(self, hidden_BTD: Tensor, norm: nn.Module, draft_head: DraftHead | None = None) -> Tensor:
        """Logits (B, T, V)."""
        return self.kernels.logits(hidden_BTD, norm, draft_head)


class LateAdapterKernels(KernelsAround):
    """Kernels over one row, but that the exit adapter only takes note of what it is to read."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def run_adapter(
        self, adapter: ExitAdapter, exit_states_BTD: Tensor, positions_BT: Tensor, cache: PositionAddressedCache
    ) -> Tensor:
        """The exit states (B, T, D) as they came: nobody drafts from them."""
        self.waiting.append((exit_states_BTD, positions_BT))
        return exit_states_BTD

    def keep(self, count: int) -> None:
        """Of what came last so many positions were committed; what lies beyond is stale."""
        states_BTD, positions_BT = self.waiting[-1]
        self.waiting[-1] = states_BTD[:, :count], positions_BT[:, :count]

    def catch_up(self, adapter: ExitAdapter, cache: PositionAddressedCache) -> None:
        """Let the adapter read all that waits."""
        if self.waiting:
            states, positions = zip(*self.waiting, strict=True)
            self.waiting = []
            self.kernels.run_adapter(adapter, torch.cat(states, dim=1), torch.cat(positions, dim=1), cache)
