"""lm-eval's `--model_args`: which model, how it generates, and what lm-eval's own Hugging Face model takes."""

from dataclasses import fields
from typing import Any

from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments
from self_speculation.settings import flag_of

# What `HFLM` takes that still has a meaning for a model that is loaded already.
HARNESS_OPTIONS = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}
# lm-eval's own, for tasks that do not say.
DEFAULT_MAX_STEPS = 256
LOADING_OPTIONS = {"device_map", "revision"}


def read_model_args(given: dict[str, Any]) -> tuple[ModelArguments, GenerationConfig, dict[str, Any]]:
    """The model to load, the configuration of its answers (by its fields or flags), and options for `HFLM`.

    Raises:
        ValueError: there is no such argument, or not with this value.
    """
    options = dict(given)
    device = options.pop("device", None)
    # lm-eval's default, also where there is no such device.
    loading = take(options, {"dtype"}) | {"device": None if device == "cuda:0" else device}
    if "pretrained" in options:
        loading["model"] = options.pop("pretrained")
    loading["model_args"] = ",".join(f"{key}={value}" for key, value in take(options, LOADING_OPTIONS).items())
    model_arguments = ModelArguments(**loading)
    own = {name: item.name for item in fields(GenerationConfig) for name in (item.name, flag_of(item))}
    generation = {own[name]: value for name, value in take(options, set(own)).items()}
    config = GenerationConfig(**({"max_new_tokens": DEFAULT_MAX_STEPS} | generation))
    unknown = options.keys() - HARNESS_OPTIONS
    if unknown:
        raise ValueError(f"--model_args: layerskip has no argument {', '.join(sorted(unknown))}.")
    return model_arguments, config, options


def take(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Remove the named entries from `given`, and return them."""
    return {name: given.pop(name) for name in sorted(names & given.keys())}
