"""The model that is trained, and its tokenizer: from a folder or the hub, or new ones of given sizes."""

from collections.abc import Callable, Iterable
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
from self_speculation.settings import regular_file
from self_speculation.training.model_arguments import TrainedModelArguments as TrainedModelArguments
from self_speculation.training.tokenizer import train_tokenizer

# The family of a configuration that names none.
LLAMA = "llama"


def model_to_train(
    arguments: TrainedModelArguments, texts: Callable[[], Iterable[str]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32, and its tokenizer; `texts` gives what a new tokenizer is trained on.

    Raises:
        ValueError: there is no such model or tokenizer, or they do not go together.
    """
    tokenizer = _given_tokenizer(arguments) or train_tokenizer(texts(), arguments.vocab_size)
    model = _given_model(arguments) or _new_model(new_config(arguments, tokenizer))
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


def new_config(arguments: TrainedModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a new model; of the given sizes, with one matrix as input and output embeddings."""
    own: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if arguments.config:
        return _read_config(arguments.config, own)
    return LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        num_key_value_heads=arguments.num_kv_heads,
        max_position_embeddings=arguments.context_length,
        tie_word_embeddings=True,
        **own,
    )


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
