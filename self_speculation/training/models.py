"""The model that is trained, and its tokenizer: from a folder or the hub, or new ones of given sizes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from self_speculation.checkpoint_kinds import checkpoint
from self_speculation.families import FAMILIES, NAMES, check_supported
from self_speculation.pretrained import DamagedCheckpointError
from self_speculation.settings import Settings, regular_file, setting
from self_speculation.training.tokenizer import train_tokenizer

# The family of a configuration that names none.
LLAMA = "llama"
# The largest vocabularies in use are a quarter of it. The trainer of tokenizers makes room for all of them at once.
MOST_TOKENS = 1_000_000


@dataclass
class TrainedModelArguments(Settings):
    """The model to train, from scratch or from a folder."""

    model: str | None = setting(None, help="Folder, .gguf file or hub name to go on from; from scratch when not given.")
    tokenizer: str | None = setting(None, help="Tokenizer's folder or hub name; trained on the texts when not given.")
    config: str | None = setting(
        None, help="config.json of a new model, or its folder, in the place of the sizes below, which are a Llama's."
    )
    vocab_size: int = setting(4096, at_least=1, at_most=MOST_TOKENS, help="Size of a new tokenizer's vocabulary.")
    block_size: int = setting(256, at_least=1, help="Tokens in a training sequence.")
    eval_blocks: int = setting(256, at_least=1, help="Held-out sequences to evaluate on.")
    context_length: int = setting(1024, at_least=1, help="Longest sequence a new model is made for.")
    num_layers: int = setting(12, at_least=1, help="Layers of a new model.")
    hidden_size: int = setting(192, at_least=1, help="Width of a new model.")
    intermediate_size: int = setting(512, at_least=1, help="Width inside the MLP of a new model.")
    num_heads: int = setting(6, at_least=1, help="Attention heads of a new model.")
    num_kv_heads: int = setting(2, at_least=1, help="Key and value heads of a new model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError("--block_size must be at least 2: a sequence of one token has nothing to predict.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"--hidden_size must be a multiple of twice --num_heads, not {self.hidden_size}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--num_heads must be a multiple of --num_kv_heads, not {self.num_heads}.")
        if self.model and self.config:
            raise ValueError("--config is of a new model, and does not go with --model.")

    def new_config(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The configuration of a new model; of the given sizes, with one matrix as input and output embeddings."""
        own: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
        }
        if self.config:
            return _read_config(self.config, own)
        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.context_length,
            tie_word_embeddings=True,
            **own,
        )


def model_to_train(
    arguments: TrainedModelArguments, texts: Callable[[], Iterable[str]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32, and its tokenizer; `texts` gives what a new tokenizer is trained on.

    Raises:
        ValueError: there is no such model or tokenizer, or they do not go together.
    """
    tokenizer = _given_tokenizer(arguments) or train_tokenizer(texts(), arguments.vocab_size)
    model = _given_model(arguments) or _new_model(arguments.new_config(tokenizer))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"--tokenizer has {len(tokenizer)} tokens, more than the model's {model.config.vocab_size}.")
    if arguments.block_size > model.config.max_position_embeddings:
        raise ValueError(f"--block_size must be at most the model's {model.config.max_position_embeddings} positions.")
    return model, tokenizer


def _new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model that has learnt nothing, in float32.

    Raises:
        ValueError: its exits could not draft.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    check_supported(model)
    return model


def _read_config(source: str, own: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that `--config` names, with a new model's own values in the place of its."""
    named = Path(source)
    regular_file("config", named / CONFIG_NAME if named.is_dir() else named)
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
        family = values.pop("model_type", LLAMA)
        if family not in FAMILIES:
            raise ValueError(f"a {family} model")
        # transformers takes an empty folder for an empty configuration, whose sizes would be those of Llama 7B.
        if "hidden_size" not in values:
            raise ValueError("no sizes")
        return AutoConfig.for_model(family, **values | own)
    # What reads a configuration raises errors of many kinds, and the sentence is the same for all.
    except Exception as error:
        raise ValueError(f"--config: {source} is no configuration of one of these families: {NAMES}.") from error


def _given_tokenizer(arguments: TrainedModelArguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the flags name, if they name one."""
    source, flag = arguments.tokenizer or arguments.model, "--tokenizer" if arguments.tokenizer else "--model"
    try:
        return checkpoint(source, {}).tokenizer() if source else None
    # What reads the files of a tokenizer raises errors of many kinds, and the sentence is the same for all.
    except Exception as error:
        raise ValueError(f"{flag}: {source} has no tokenizer that transformers can load.") from error


def _given_model(arguments: TrainedModelArguments) -> PreTrainedModel | None:
    """The model that the flags name, if they name one.

    Raises:
        ValueError: there is none, it is damaged, or of another family, whose exits could not draft.
    """
    if not arguments.model:
        return None
    source = checkpoint(arguments.model, {"dtype": torch.float32})
    try:
        family = source.config().model_type
        model = source.model() if family in FAMILIES else None
    except DamagedCheckpointError:
        raise
    # As for tokenizers.
    except Exception as error:
        raise ValueError(f"--model: {arguments.model} is not a model that transformers can load.") from error
    if model is None:
        raise ValueError(f"--model: {arguments.model} is a {family} model; families that can exit early: {NAMES}.")
    check_supported(model)
    return model
