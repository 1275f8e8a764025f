"""The anchor: the untouched model, near which the last layer is kept while exits learn.

Shapes: B batch, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel


class Anchor:
    """The model as it was, and the weight of the KL divergence from it.

    With LoRA that is the trained model itself within `untouched`, which turns its adapters off; else a copy.
    """

    def __init__(
        self,
        weight: float,
        model: PreTrainedModel,
        untouched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.weight = weight
        self.model = model
        self.untouched = untouched

    @property
    def head(self) -> Tensor:
        """The weights of the LM head, (V, D)."""
        return self.model.lm_head.weight

    def states(self, *args: Any, **kwargs: Any) -> Tensor:
        """x_L, normed, (B, T, D), without gradients; the arguments are those of the model's `forward`."""
        is_training = self.model.training
        self.model.eval()  # No layer is dropped.
        try:
            with torch.no_grad(), self.untouched():
                return self.model.model(*args, **kwargs | {"output_hidden_states": False}).last_hidden_state
        finally:
            self.model.train(is_training)


def anchored(weight: float, model: PreTrainedModel, adapted: "PeftModel | None") -> Anchor:
    """The anchor of a model that is about to be trained, with adapters or whole."""
    if adapted is not None:
        return Anchor(weight, model, adapted.disable_adapter)
    return Anchor(weight, deepcopy(model).eval().requires_grad_(False))
