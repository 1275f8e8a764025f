"""Who runs a model's layers and LM head during decoding: torch, or kernels whose rows do not depend on one another.

A model that is cut at a layer (section 4.2 of the paper): `forward_early` runs layers [0, E), and `forward_remainder`
layers [E, L).

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.families import embed

if TYPE_CHECKING:
    from self_speculation.decoding.cache import PositionAddressedCache
    from self_speculation.decoding.draft_head import DraftHead
    from self_speculation.exit_adapter import ExitAdapter


class Kernels(Protocol):
    """Runs parts of one model."""

    @property
    def model(self) -> PreTrainedModel:
        """The model."""

    @property
    def backend(self) -> str | None:
        """What torch compiles a step of these passes with; None where they are what that would come to."""

    def run_layers(
        self, hidden_BTD: Tensor, layers: range, positions_BT: Tensor, cache: "PositionAddressedCache"
    ) -> Tensor:
        """What leaves the layers (B, T, D), which read and write the cache at the positions."""

    def run_adapter(
        self, adapter: "ExitAdapter", exit_states_BTD: Tensor, positions_BT: Tensor, cache: "PositionAddressedCache"
    ) -> Tensor:
        """What leaves an exit adapter's layer (B, T, D)."""

    def logits(self, hidden_BTD: Tensor, norm: nn.Module, draft_head: "DraftHead | None" = None) -> Tensor:
        """Logits (B, T, V) of hidden states: a norm, then the LM head, or the one that drafts."""


def forward_early(
    kernels: Kernels, tokens_BT: Tensor, exit_layer: int, positions_BT: Tensor, cache: "PositionAddressedCache"
) -> Tensor:
    """The exit states (B, T, D): what leaves layers [0, E)."""
    return kernels.run_layers(embed(kernels.model, tokens_BT), range(exit_layer), positions_BT, cache)


def forward_remainder(
    kernels: Kernels, exit_states_BTD: Tensor, layers: range, positions_BT: Tensor, cache: "PositionAddressedCache"
) -> Tensor:
    """Hidden states (B, T, D) after the last layer, going on from the exit states through layers [E, L)."""
    return kernels.run_layers(exit_states_BTD, layers, positions_BT, cache)
