"""From names to things: a model and its tokenizer, and what is recommended for them (`advice.py`)."""

import ast
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.advice import RECOMMENDATION_FILE as RECOMMENDATION_FILE
from self_speculation.advice import Recommendation as Recommendation
from self_speculation.advice import Use as Use
from self_speculation.advice import advice_for as advice_for
from self_speculation.advice import read_recommendation as read_recommendation
from self_speculation.checkpoint_kinds import checkpoint
from self_speculation.decoding.generation_defaults import check_defaults, ignore_defaults
from self_speculation.families import another_family, choose_attention, is_decoder
from self_speculation.masking import masked, without_secrets_of
from self_speculation.model_arguments import AUTO
from self_speculation.model_arguments import BUNDLED_CHECKPOINT as BUNDLED_CHECKPOINT
from self_speculation.model_arguments import DTYPES as DTYPES
from self_speculation.model_arguments import ModelArguments as ModelArguments
from self_speculation.model_arguments import bundled as bundled
from self_speculation.pretrained import DamagedCheckpointError


def load(arguments: ModelArguments, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer; `options` stand beside those of `model_args`.

    Raises:
        ValueError: no such model, no weights or damaged ones, no access, or defaults of generation that cannot be
            honoured. Strategies that cut the model at a layer refuse by themselves one that cannot be.
    """
    options, device = _parse_model_args(arguments.model_args) | options, choose_device(arguments.device)
    _check_trust(arguments.model, options)
    if arguments.num_threads is not None and arguments.num_threads != AUTO:
        torch.set_num_threads(int(arguments.num_threads))
    source = checkpoint(arguments.model, options)
    try:
        if "dtype" not in options:
            dtype = _dtype(arguments.dtype, source.config(), device)
            source = replace(source, options=source.options | {"dtype": dtype})
        model, tokenizer = source.model(), source.tokenizer()
    except DamagedCheckpointError:
        raise
    # What reads the files of a checkpoint raises errors of many kinds, and the sentence is the same for all.
    except Exception as error:
        raise ValueError(_loading_sentence(arguments, error)) from error
    if is_decoder(model):
        choose_attention(model)
    elif getattr(model.config, "max_position_embeddings", None) is None:
        raise another_family(model)  # Nor is there a context, which every strategy asks for.
    source.check_vocabulary(model, tokenizer)
    if arguments.ignore_generation_config:
        ignore_defaults(model.generation_config)
    check_defaults(model.generation_config, sample=False)
    if "device_map" not in options:
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` takes it for a function.
    return model.eval(), tokenizer


def choose_device(name: str | None) -> torch.device:
    """The device of this name; CUDA by default where there is any.

    Raises:
        ValueError: torch cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # What torch raises for a kind of device that it was built without.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not a device that torch can use here.") from error


def _parse_model_args(text: str | None) -> dict[str, Any]:
    """'k=v,k=v' as a dict; values are Python literals where they can be, else strings."""
    options: dict[str, Any] = {}
    for item in (text or "").split(","):
        key, equals, value = item.strip().partition("=")
        if item.strip() and not (key and equals):
            raise ValueError(f"--model_args must look like 'k=v,k=v', but has {masked(item.strip())!r}.")
        if key:
            try:
                options[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[key] = value
    return options


def _check_trust(model: str, options: dict[str, Any]) -> None:
    """Say it when Python code of the checkpoint may run; what is not clearly wanted is refused."""
    trust = options.get("trust_remote_code", False)
    if not isinstance(trust, bool):
        raise ValueError(f"--model_args: trust_remote_code must be True or False, not {trust!r}.")
    if trust:
        print(f"--model_args trust_remote_code=True: Python code that {model} brings along may run.", file=sys.stderr)


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    # A name that a config may be given is a dtype once the config is made.
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    is_slow = device.type == "cpu" and own.itemsize == 2 and not _is_fast(own)
    return torch.float32 if is_slow else own


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16-bit numbers in hardware."""
    capabilities = torch.cpu.get_capabilities()
    wanted = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(capabilities.get(name, False) for name in wanted)


def _loading_sentence(arguments: ModelArguments, error: Exception) -> str:
    name, given = arguments.model, arguments.model_args or ""
    text = without_secrets_of(given, str(error))
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"--model {name} is gated or private: ask for access at https://huggingface.co/{name}, "
            "then set HF_TOKEN or run `hf auth login`."
        )
    reason = (text.splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, TypeError) and given:
        return f"--model_args {masked(given)}: {reason}."
    if Path(name).exists():
        kind = "folder" if Path(name).is_dir() else "file"
        return f"--model {name}: the {kind} has no model that transformers can load ({reason})"
    return f"--model {name} is neither a folder nor a model that the hub could give ({reason})"
