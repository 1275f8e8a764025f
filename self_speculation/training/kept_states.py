"""What a frozen model computes of the training rows, kept: an exit adapter's later epochs train without running it.

While an adapter is trained its model never changes, and so neither does what it computes of a row. That is kept in
memory: what leaves the adapter's exit, which the adapter reads, and the normed states of the last layer, which teach.

Shapes: B batch, M rows of it that are not kept, T positions (of a kept row those up to its last label), D hidden size,
X what is read of a position: its token, and its number where that is given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from self_speculation.training.labels import IGNORED_LABEL


class Row(NamedTuple):
    """What the model computed of a row, (T, D) each, in autocast's dtype where that is on."""

    exit_TD: Tensor
    last_TD: Tensor


class KeptStates:
    """Rows by their tokens and positions, as many as go into so many bytes; others are computed each time."""

    def __init__(self, model: PreTrainedModel, exit_layer: int, most_bytes: float) -> None:
        self.model = model
        self.exit_layer = exit_layer
        self.bytes_left = most_bytes
        self.rows: dict[bytes, Row] = {}

    def states(self, ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What leaves the exit and the last layer, (B, T, D) each; past a row's last label it may be zero."""
        names = _names(ids_BT, labels_BT, position_ids_BT)
        found = [self.rows.get(name) for name in names]
        missing_M = torch.tensor([number for number, row in enumerate(found) if row is None], device=ids_BT.device)
        if len(missing_M):
            position_ids_MT = None if position_ids_BT is None else position_ids_BT[missing_M]
            states = self._computed(ids_BT[missing_M], position_ids_MT)
            lengths = _lengths(labels_BT[missing_M])
            for number, length, *computed in zip(missing_M.tolist(), lengths, *states, strict=True):
                found[number] = row = Row(*(state_TD[:length].clone() for state_TD in computed))
                self._keep(names[number], row)
        width, dtype = ids_BT.shape[1], self.model.lm_head.weight.dtype
        exit_BTD, last_BTD = (
            _padded([state_TD.to(ids_BT.device, dtype) for state_TD in states], width)
            for states in zip(*filter(None, found), strict=True)
        )
        return exit_BTD, last_BTD

    def _computed(self, ids_MT: Tensor, position_ids_MT: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same by a pass of the model."""
        taken: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            taken.append(args[0] if args else kwargs["hidden_states"])

        hook = self.model.model.layers[self.exit_layer].register_forward_pre_hook(take, with_kwargs=True)
        try:
            passed = self.model.model(input_ids=ids_MT, position_ids=position_ids_MT, use_cache=False)
        finally:
            hook.remove()
        last_MTD, device = passed.last_hidden_state, ids_MT.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else last_MTD.dtype
        return taken[0].to(dtype), last_MTD.to(dtype)

    def _keep(self, name: bytes, row: Row) -> None:
        """Keep a row in the host's memory, if there is room."""
        num_bytes = sum(state_TD.nbytes for state_TD in row)
        if num_bytes <= self.bytes_left and name not in self.rows:
            self.bytes_left -= num_bytes
            self.rows[name] = Row(*(state_TD.cpu() for state_TD in row))


class _StandIn(nn.Module):
    """Stands where a layer stood, and leaves the states as they are, or gives others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # By it some families choose the mask that a layer is given.
        self.attention_type = getattr(layer, "attention_type", None)
        self.gives_BTD: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.gives_BTD is None else self.gives_BTD


@contextmanager
def replayed(model: PreTrainedModel, exit_layer: int, exit_BTD: Tensor) -> Iterator[None]:
    """For as long as it lasts, these states leave the exit, whatever the model reads; its own layers do not run."""
    layers = model.model.layers
    stand_ins = [_StandIn(layer) for layer in layers]
    stand_ins[exit_layer - 1].gives_BTD = exit_BTD
    model.model.layers = nn.ModuleList(stand_ins)
    try:
        yield
    finally:
        model.model.layers = layers


def _lengths(labels_BT: Tensor) -> list[int]:
    """T of each row: no position that follows teaches anything, or is seen by one that does."""
    index_T = torch.arange(1, labels_BT.shape[1] + 1, device=labels_BT.device)
    lengths: list[int] = torch.where(labels_BT != IGNORED_LABEL, index_T, 0).amax(1).tolist()
    return lengths


def _names(ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor | None) -> list[bytes]:
    """What a row is kept by."""
    read_BXT = ids_BT[:, None] if position_ids_BT is None else torch.stack([ids_BT, position_ids_BT], 1)
    pairs = zip(read_BXT.cpu(), _lengths(labels_BT), strict=True)
    return [read_XT[:, :length].numpy().tobytes() for read_XT, length in pairs]


def _padded(states: list[Tensor], width: int) -> Tensor:
    """Rows of different lengths as (B, T, D)."""
    padded_BTD = pad_sequence(states, batch_first=True)
    return nn.functional.pad(padded_BTD, (0, 0, 0, width - padded_BTD.shape[1]))
