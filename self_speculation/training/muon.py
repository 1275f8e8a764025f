"""Muon for matrices and AdamW for the rest, as one optimiser."""

import re
from typing import Any

import torch
from torch import nn

# Names of parameters that are a decoder layer's.
IN_LAYER = re.compile(r"\.layers?\.")


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for decoder layers' matrices and AdamW for embeddings, head and norms, as one optimiser.

    What is frozen is left out. Muon's updates are scaled to AdamW's root mean square, so that one learning rate serves
    both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        layers = [p for name, p in trained.items() if IN_LAYER.search(name) and p.ndim == 2]
        chosen = {id(parameter) for parameter in layers}
        rest = [parameter for parameter in trained.values() if id(parameter) not in chosen]
        self.parts = [
            torch.optim.Muon(layers, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=betas),
        ]
        super().__init__([*layers, *rest], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    # Unlike other optimisers it takes no closure: the Trainer has none to give.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
