"""A checkpoint: its configuration, tokenizer and weights, read with the same arguments, and checked.

transformers fills tensors that a checkpoint lacks with random numbers, leaves out those that it does not know, and
says so in its log only. NaN weights agree with themselves in every comparison. So all weights are checked here.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from self_speculation.log_levels import logging_at

SHARDING_LOGGER = "transformers.distributed.tensor_parallel"
# Arguments of from_pretrained that say which files are read and how; all others are the model's alone.
SHARED_OPTIONS = {
    "cache_dir",
    "code_revision",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
}


class DamagedCheckpointError(ValueError):
    """A checkpoint could be read, but its weights are not those of its model."""


@dataclass(frozen=True)
class Pretrained:
    """A folder or a name on the hub, and the arguments of `from_pretrained`.

    Code that the checkpoint brings along is not executed, and nobody is asked whether it should be, unless
    `trust_remote_code` is True among the options. Reading raises whatever transformers raises.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in sentences."""
        return self.name

    def config(self) -> PreTrainedConfig:
        """The configuration.

        Raises:
            DamagedCheckpointError: its weights would be whole numbers.
        """
        config = AutoConfig.from_pretrained(self.name, **self._shared())
        if isinstance(config.dtype, torch.dtype) and not config.dtype.is_floating_point:
            kind = str(config.dtype).removeprefix("torch.")
            raise DamagedCheckpointError(f"--model {self.label}: its configuration's dtype is {kind}, no float type.")
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return AutoTokenizer.from_pretrained(self.name, **self._shared())

    def model(self) -> PreTrainedModel:
        """The causal language model.

        Raises:
            DamagedCheckpointError: a tensor is missing, unknown, of another shape, or not finite.
        """
        options = self.options | self._shared() | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        # Its report is what is refused below. Where it is quiet, transformers tells that no layer is sharded instead.
        with logging_at(logging.ERROR, "transformers.modeling_utils"), logging_at(logging.ERROR, SHARDING_LOGGER):
            loaded: Any = AutoModelForCausalLM.from_pretrained(self.name, **options)
        model, found = loaded
        self._check_tensors(found)
        self._check_numbers(model)
        return model

    def check_vocabulary(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with more tokens than the model embeds.

        Raises:
            DamagedCheckpointError: some of its tokens would have no embedding.
        """
        num_rows = model.config.vocab_size
        if len(tokenizer) > num_rows:
            self._refuse(
                "model.embed_tokens.weight", f"has {num_rows} rows, but the tokenizer has {len(tokenizer)} tokens"
            )

    def _shared(self) -> dict[str, Any]:
        given = {name: value for name, value in self.options.items() if name in SHARED_OPTIONS}
        return {"trust_remote_code": False} | given

    def _check_tensors(self, found: dict[str, Any]) -> None:
        """Refuse what transformers reports of the tensors in the files."""
        for name in sorted(found["missing_keys"]):
            self._refuse(name, "is missing")
        for name, in_file, in_model in sorted(found["mismatched_keys"]):
            self._refuse(name, f"has the shape {tuple(in_file)}, not {tuple(in_model)} as its configuration says")
        for name in sorted(found["unexpected_keys"]):
            if not self._is_cut_off(name):
                self._refuse(name, "is none of its model's")

    def _is_cut_off(self, name: str) -> bool:
        """Whether a tensor is of a layer that the options leave out on purpose."""
        layer, kept = re.match(r"model\.layers\.(\d+)\.", name), self.options.get("num_hidden_layers")
        return layer is not None and kept is not None and int(layer[1]) >= kept

    def _check_numbers(self, model: PreTrainedModel) -> None:
        for name, parameter in model.named_parameters():
            if not is_finite(parameter):
                self._refuse(name, f"has values that are NaN or infinite in {parameter.dtype}".replace("torch.", ""))

    def _refuse(self, tensor: str, reason: str) -> NoReturn:
        raise DamagedCheckpointError(f"--model {self.label}: the checkpoint is damaged: its tensor {tensor} {reason}.")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; taken for granted where they are offloaded or quantised."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.itemsize > 1
    if tensor.is_meta or not is_plain or not tensor.numel():
        return True
    # One pass without a copy: NaN comes through minimum and maximum.
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
