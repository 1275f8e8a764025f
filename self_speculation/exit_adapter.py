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
from transformers import PreTrainedModel

EXIT_ADAPTER_FILE = "exit_adapter.json"
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
    def of(cls, model: PreTrainedModel, exit_layer: int) -> "ExitAdapter":
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

    def save(self, folder: Path, base: str | None) -> None:
        """Write the adapter alone, a few megabytes in bfloat16, and the name or folder of the model that it is for.

        Without one, it is the model in the same folder.
        """
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        described = {"base_model_name_or_path": base, "exit_layer": self.exit_layer}
        (folder / EXIT_ADAPTER_FILE).write_text(json.dumps(described, indent=2) + "\n")


def has_exit_adapter(name: str | Path) -> bool:
    """Whether a folder has an exit adapter."""
    return (Path(name) / EXIT_ADAPTER_FILE).exists()


def base_of(folder: Path) -> str | None:
    """The name or folder of the model that the adapter in a folder is for; None: the model in the same folder.

    Raises:
        ValueError: the description is no JSON object, or names something else than a model.
    """
    path = folder / EXIT_ADAPTER_FILE
    base = _described(path).get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or not base.strip() or "\0" in base):
        raise ValueError(f"{path}: base_model_name_or_path must name a model, not {base!r:.40}.")
    return base


def exit_norm(model: PreTrainedModel, exit_layer: int) -> nn.Module:
    """What stands between an exit's states and the LM head: the adapter's norm, or the model's own."""
    adapter = exit_adapter(model, exit_layer)
    return model.model.norm if adapter is None else adapter.norm


def adapter_of(model: PreTrainedModel) -> ExitAdapter | None:
    """The model's adapter, if it has one."""
    adapter = vars(model)["_modules"].get(ATTRIBUTE)
    return adapter if isinstance(adapter, ExitAdapter) else None


def exit_adapter(model: PreTrainedModel, exit_layer: int) -> ExitAdapter | None:
    """The model's adapter, if it has one at this exit."""
    adapter = adapter_of(model)
    return adapter if adapter is not None and adapter.exit_layer == exit_layer else None


def read_exit_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give the model the adapter that lies in the folder, in the model's dtype and on its device.

    Raises:
        ValueError: names the file that is damaged, or of another model.
    """
    adapter = _empty(model, _exit_layer_in(folder / EXIT_ADAPTER_FILE, model.config.num_hidden_layers))
    tensors = _tensors_in(folder / WEIGHTS_FILE)
    for name, own in adapter.state_dict().items():
        found = tensors.pop(name, None)
        if found is None or found.shape != own.shape or not found.isfinite().all():
            reason = "is missing" if found is None else f"is not {tuple(own.shape)} finite numbers"
            raise ValueError(f"{folder / WEIGHTS_FILE}: its tensor {name} {reason}.")
        own.copy_(found)  # Into the adapter's own memory.
    if tensors:
        raise ValueError(f"{folder / WEIGHTS_FILE}: its tensor {min(tensors)} is none of an exit adapter's.")
    model.add_module(ATTRIBUTE, adapter.requires_grad_(False))


def read_beside(model: PreTrainedModel) -> None:
    """Give a model that others loaded the exit adapter that lies beside its weights, if one does.

    Raises:
        ValueError: as `read_exit_adapter`.
    """
    folder = Path(model.name_or_path or "")
    if model.name_or_path and ATTRIBUTE not in vars(model)["_modules"] and has_exit_adapter(folder):
        read_exit_adapter(model, folder)


def _empty(model: PreTrainedModel, exit_layer: int) -> ExitAdapter:
    """An adapter whose tensors are still to be read, like the model's norm in dtype and device.

    Its layer is of the same kind as the model's own behind the exit.
    """
    layer = type(model.model.layers[exit_layer])(model.config, exit_layer)
    layer.self_attn.layer_idx = model.config.num_hidden_layers
    norm = type(model.model.norm)(model.config.hidden_size, model.config.rms_norm_eps)
    weight = model.model.norm.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    return ExitAdapter(layer, norm, exit_layer).to(device, weight.dtype).eval()


def _described(path: Path) -> dict[str, Any]:
    try:
        # A pipe or a device might never end.
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object with exit_layer.") from error
    if not isinstance(values, dict) or "exit_layer" not in values:
        raise ValueError(f"{path} is not a JSON object with exit_layer.")
    return values


def _exit_layer_in(path: Path, num_layers: int) -> int:
    exit_layer = _described(path)["exit_layer"]
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
