"""LoRA (arXiv 2106.09685): low-rank adapters of the layers' matrices are trained, and the model's own weights kept.

A matrix W of the model is used as W + (alpha / rank) · B A. Only attention's and the MLP's matrices have adapters:
head and embeddings may be one matrix, into which an adapter of one would merge for both. PEFT does the work; it is
imported when adapters are asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.adapter_config import is_adapter, read_adapter_config
from self_speculation.training.whole_files import whole_files

if TYPE_CHECKING:
    from peft import PeftModel

# Attention's and the MLP's matrices; Phi-3 has the two groups of them that are side by side.
ADAPTED = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
# Beside the merged model, which every program loads.
ADAPTER_FOLDER = "adapter"


def with_lora(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> "PeftModel":
    """The model with an adapter of every layer's matrices; all other weights are frozen.

    Raises:
        ValueError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora_rank needs the package peft (pip install peft).") from error
    own = {name.rpartition(".")[2] for name, _ in model.model.layers.named_modules()}
    adapted = [name for name in ADAPTED if name in own]
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=adapted, task_type="CAUSAL_LM")
    # A is drawn, whatever was drawn before. B is zero: at first the model is what it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast("PeftModel", get_peft_model(model, config))


def go_on_from(model: "PeftModel", folder: Path, rank: int, alpha: float) -> None:
    """Begin with the weights of an adapter that was trained before, of the same model and sizes.

    Raises:
        ValueError: it is none, or one of other sizes, or of another model.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    if not is_adapter(folder):
        raise ValueError(f"--lora_from: {folder} is no folder of an adapter.")
    earlier = read_adapter_config(folder)
    if (earlier.rank, earlier.alpha) != (rank, alpha):
        raise ValueError(f"--lora_from: {folder} needs --lora_rank {earlier.rank} --lora_alpha {earlier.alpha:g}.")
    try:
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--lora_from: {folder / SAFETENSORS_WEIGHTS_NAME} is missing or damaged.") from error
    own = {name: tensor.shape for name, tensor in adapter_tensors(model).items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != own:
        raise ValueError(f"--lora_from: {folder} is an adapter of another model, or of other matrices.")
    set_peft_model_state_dict(model, tensors)


def adapter_tensors(model: "PeftModel") -> dict[str, Tensor]:
    """The adapter's weights, as a checkpoint has them."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def save_adapter(model: "PeftModel", output_dir: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into the folder `adapter`, whole or not at all."""
    with whole_files(output_dir / ADAPTER_FOLDER) as folder:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, with nothing filled in.


def merged(model: "PeftModel") -> PreTrainedModel:
    """The model with its adapter added to its own weights, in which there is no adapter any more."""
    return cast(PreTrainedModel, model.merge_and_unload())
