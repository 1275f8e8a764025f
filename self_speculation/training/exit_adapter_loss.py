"""Training an exit adapter (`self_speculation/exit_adapter.py`): it learns the last layer's distribution at its exit.

The model is frozen and runs without gradients. The adapter's layer runs where the model's own next layer does, with the
same mask and positions, whatever the batch is packed of. Two things save most of the work: what the model computed
may be kept (`training/kept_states.py`), and of the head frequent tokens alone may be learnt, as they alone may be
drafted (`decoding/draft_head.py`).

Shapes: B batch, T positions, D hidden size, V vocabulary, K positions with labels, N tokens that can be drafted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter, adapter_of
from self_speculation.families import logits_function
from self_speculation.training.chunked_loss import (
    ExitSums,
    SummedExitLoss,
    TaughtLoss,
    distillation_cross_entropy,
    partly_argmax,
)
from self_speculation.training.kept_states import KeptStates, replayed
from self_speculation.training.labels import IGNORED_LABEL, next_labels


def prepare_exit_adapter(model: PreTrainedModel, exit_layer: int | None, name: str | None) -> None:
    """Freeze the model, and give it a new adapter at the exit, which alone is trained; nothing, where none is wanted.

    `name` is what the model was loaded from.

    Raises:
        ValueError: the model is new, or lacks the exit; or it is to be trained, and has an adapter that knows it as it
            is.
    """
    if exit_layer is None:
        if adapter_of(model) is not None:
            raise ValueError(
                f"--model {name} has an exit adapter for the model as it is: give that model, or "
                "--train_exit_adapter for another one."
            )
        return
    if name is None:
        raise ValueError("--train_exit_adapter needs --model: there is nothing to learn from a new model.")
    model.requires_grad_(False)
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, exit_layer).requires_grad_(True))


@contextmanager
def running_adapter(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """While this lasts, a pass of the model is one of its exit adapter, too.

    Gives, by the adapter's exit, what left the adapter's layer (B, T, D); nothing for a model without one.
    """
    left_BTD: dict[int, Tensor] = {}
    adapter = adapter_of(model)
    if adapter is None:
        yield left_BTD
        return

    def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.set_grad_enabled(model.training):
            left_BTD[adapter.exit_layer] = adapter.layer(*args, **kwargs)

    hook = model.model.layers[adapter.exit_layer].register_forward_pre_hook(run, with_kwargs=True)
    try:
        yield left_BTD
    finally:
        hook.remove()


@dataclass(frozen=True)
class AdapterTarget:
    """What an adapter learns: the last layer's distribution, a share of it its argmax; of all tokens or of some (N)."""

    argmax_share: float = 0.0
    tokens_N: Tensor | None = None

    @property
    def taught(self) -> TaughtLoss:
        """The loss by the last layer's distribution."""
        return partial(partly_argmax, share=self.argmax_share) if self.argmax_share else distillation_cross_entropy


LAST_LAYER = AdapterTarget()


class ExitAdapterLoss:
    """Σ CE(adapter's distribution, last layer's) per labelled token, inside the model's `forward`; removable again.

    It stands in the place of `EarlyExitLoss`: inside `forward` because DDP prepares the adapter around that call. With
    `keep_bytes` so much of what the model computes is kept for other epochs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: ExitAdapter,
        chunk_tokens: int,
        target: AdapterTarget = LAST_LAYER,
        keep_bytes: float = 0.0,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.target = target
        self.kept = KeptStates(model, adapter.exit_layer, keep_bytes) if keep_bytes else None
        # The last layer teaches, and weighs nothing.
        self.sums = ExitSums((0.0, 1.0), target.taught, chunk_tokens, logits=logits_function(model))
        self.step = 0

    def attach(self) -> None:
        """Replace the model's `forward` for calls in training mode that bring labels."""
        self.model.forward = self._with_loss(self.model.forward)

    def remove(self) -> None:
        """Give the model its class's `forward` back."""
        self.model.__dict__.pop("forward", None)

    def _with_loss(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def forward_with_adapter_loss(
            *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
        ) -> Any:
            if labels is None or not self.model.training:
                return forward(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
            states = self._states(labels, *args, **kwargs)
            return CausalLMOutput(loss=self._loss(*states, labels, num_items_in_batch))

        return forward_with_adapter_loss

    def _states(self, labels_BT: Tensor, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What leaves the adapter's layer, with its gradients, and the model's last one."""
        kwargs |= {"use_cache": False}
        if self.kept is None:
            with torch.no_grad(), running_adapter(self.model) as left_BTD:
                last_BTD = self.model.model(input_ids, **kwargs).last_hidden_state
            return left_BTD[self.adapter.exit_layer], last_BTD
        with torch.no_grad():
            exit_BTD, last_BTD = self.kept.states(input_ids, labels_BT, kwargs.get("position_ids"))
            with replayed(self.model, self.adapter.exit_layer, exit_BTD), running_adapter(self.model) as left_BTD:
                self.model.model(input_ids, **kwargs)
        return left_BTD[self.adapter.exit_layer], last_BTD

    @cached_property
    def _head(self) -> Tensor:
        """The LM head's rows that are learnt, (V, D) or (N, D)."""
        weight_VD: Tensor = self.model.lm_head.weight
        tokens_N = self.target.tokens_N
        return weight_VD if tokens_N is None else weight_VD[tokens_N.to(weight_VD.device)]

    def _loss(
        self, left_BTD: Tensor, last_BTD: Tensor, labels_BT: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        labelled_K = (next_labels(labels_BT) != IGNORED_LABEL).nonzero().flatten()
        drafted_KD = self.adapter.norm(left_BTD.flatten(0, 1)[labelled_K])
        states = (last_BTD.flatten(0, 1)[labelled_K], drafted_KD)
        # No label is learnt.
        total = SummedExitLoss.apply(self.sums, torch.zeros_like(labelled_K), self._head, *states)
        return total / (len(labelled_K) if num_items_in_batch is None else num_items_in_batch)
