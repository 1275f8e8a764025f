"""An exit adapter: one decoder layer and a norm behind exit E that only draft, for a model that is left as it is.

Early exits of a model that was not trained for them draft badly, and training them changes the model's own output. The
adapter reads what leaves layers [0, E), and the model's LM head reads what leaves the adapter; verification never
does. So the output is exactly the original model's (Kangaroo, arXiv 2404.18911, is built like this).

Shapes: D hidden size.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

CONFIG_FILE = "exit_adapter.json"
WEIGHTS_FILE = "exit_adapter.safetensors"
# The model's attribute that holds its adapter, so that it moves, and is copied, with the model.
ATTRIBUTE = "exit_adapter"


class ExitAdapter(nn.Module):
    """A decoder layer with its own norm; its place in the KV cache is that of a layer after the model's last."""

    def __init__(self, layer: nn.Module, norm: nn.Module, exit_layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.exit_layer = exit_layer

    @classmethod
    def of(cls, model: LlamaForCausalLM, exit_layer: int) -> "ExitAdapter":
        """The start of training: a copy of the layer that follows the exit, and of the final norm."""
        num_layers = model.config.num_hidden_layers
        if not 1 <= exit_layer < num_layers:
            raise ValueError(
                f"--train_exit_adapter must lie between 1 and {num_layers - 1}, below the model's last layer, "
                f"not {exit_layer}."
            )
        layer = copy.deepcopy(model.model.layers[exit_layer])
        layer.self_attn.layer_idx = num_layers
        return cls(layer, copy.deepcopy(model.model.norm), exit_layer)

    def save(self, folder: Path) -> None:
        """Write the adapter alone: a few megabytes, to be put beside the model's weights."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps({"exit_layer": self.exit_layer}, indent=2) + "\n")


def exit_adapter(model: LlamaForCausalLM, exit_layer: int) -> ExitAdapter | None:
    """The model's adapter, if it has one at this exit."""
    adapter = vars(model)["_modules"].get(ATTRIBUTE)
    return adapter if isinstance(adapter, ExitAdapter) and adapter.exit_layer == exit_layer else None


def read_exit_adapter(model: LlamaForCausalLM, folder: Path) -> None:
    """Give the model the adapter that lies in the folder, if one does, in its own dtype and on its device.

    Raises:
        ValueError: names the file that is damaged, or of another model.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    adapter = ExitAdapter.of(model, _exit_layer_in(path, model.config.num_hidden_layers))
    tensors = _tensors_in(folder / WEIGHTS_FILE)
    for name, own in adapter.state_dict().items():
        found = tensors.pop(name, None)
        if found is None or found.shape != own.shape or not found.isfinite().all():
            reason = "is missing" if found is None else f"is not {tuple(own.shape)} finite numbers"
            raise ValueError(f"{folder / WEIGHTS_FILE}: its tensor {name} {reason}.")
        own.copy_(found)
    if tensors:
        raise ValueError(f"{folder / WEIGHTS_FILE}: its tensor {min(tensors)} is none of an exit adapter's.")
    model.add_module(ATTRIBUTE, adapter.requires_grad_(False))


def _exit_layer_in(path: Path, num_layers: int) -> int:
    try:
        # A pipe or a device might never end.
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        exit_layer = values["exit_layer"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object with exit_layer.") from error
    if type(exit_layer) is not int or not 1 <= exit_layer < num_layers:
        raise ValueError(
            f"{path}: exit_layer must be a whole number from 1 to {num_layers - 1}, not {exit_layer!r:.40}."
        )
    return exit_layer


def _tensors_in(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path) if path.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a file of tensors.") from error
