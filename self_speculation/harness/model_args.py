"""lm-eval's `--model_args`: which model, how it generates, and what lm-eval's own Hugging Face model takes."""

from dataclasses import dataclass, fields
from typing import Any

from self_speculation.generator_base import GenerationConfig
from self_speculation.harness.arguments import DEFAULT_MAX_STEPS
from self_speculation.loading import ModelArguments
from self_speculation.pretrained import SHARED_OPTIONS
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
# Arguments of from_pretrained that are the weights' alone, beside those that say which files are read.
WEIGHT_OPTIONS = {
    "attn_implementation",
    "device_map",
    "key_mapping",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "tp_plan",
    "use_safetensors",
    "variant",
}


@dataclass(frozen=True)
class ModelArgs:
    """The model to load, arguments of `from_pretrained`, how answers are generated, and options for `HFLM`."""

    model: ModelArguments
    loading: dict[str, Any]
    generation: GenerationConfig
    options: dict[str, Any]


def read_model_args(given: dict[str, Any]) -> ModelArgs:
    """What each argument is for; those of generation are named by `GenerationConfig`'s fields or flags.

    Raises:
        ValueError: there is no such argument, or not with this value.
    """
    options = dict(given)
    device = options.pop("device", None)
    # lm-eval's default, also where there is no such device.
    model = take(options, {"dtype"}) | {"device": None if device == "cuda:0" else device}
    if "pretrained" in options:
        model["model"] = options.pop("pretrained")
    if options.get("token"):
        raise ValueError("--model_args: lm-eval would write the token into its results; set HF_TOKEN instead.")
    loading = take(options, SHARED_OPTIONS | WEIGHT_OPTIONS)
    own = {name: item.name for item in fields(GenerationConfig) for name in (item.name, flag_of(item))}
    generation = {own[name]: value for name, value in take(options, set(own)).items()}
    config = GenerationConfig(**({"max_new_tokens": DEFAULT_MAX_STEPS} | generation))
    unknown = options.keys() - HARNESS_OPTIONS
    if unknown:
        raise ValueError(f"--model_args: layerskip has no argument {', '.join(sorted(unknown))}.")
    return ModelArgs(ModelArguments(**model), loading, config, options)


def take(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Remove the named entries from `given`, and return them."""
    return {name: given.pop(name) for name in sorted(names & given.keys())}
