"""From names to things: a model and its tokenizer, and the exit layer and draft length to use."""

import ast
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.adapter_config import file_beside
from self_speculation.checkpoint_kinds import checkpoint
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.decoding.generation_defaults import check_defaults, ignore_defaults
from self_speculation.families import another_family, choose_attention, is_decoder
from self_speculation.masking import masked, without_secrets_of
from self_speculation.model_arguments import AUTO
from self_speculation.model_arguments import BUNDLED_CHECKPOINT as BUNDLED_CHECKPOINT
from self_speculation.model_arguments import DTYPES as DTYPES
from self_speculation.model_arguments import ModelArguments as ModelArguments
from self_speculation.model_arguments import bundled as bundled
from self_speculation.pretrained import DamagedCheckpointError

RECOMMENDATION_FILE = "layerskip.json"
RECOMMENDED = ("exit_layer", "num_speculations", "draft_vocab")
# On what a case in that file may depend.
USES = ("dtype", "device", "task")
# Larger than any vocabulary.
MOST_VOCABULARY = 2**31 - 1
# The (E, d) with the paper's best speed-up (tables of section 6, greedy).
PAPER_RECOMMENDATIONS = {
    "facebook/layerskip-llama2-7B": (8, 12),
    "facebook/layerskip-llama2-13B": (15, 12),
}


@dataclass(frozen=True)
class Recommendation:
    """The exit layer, the draft length and the draft's vocabulary to use with a checkpoint, and who says so."""

    exit_layer: int
    num_speculations: int
    source: str
    draft_vocab: int | None = None


@dataclass(frozen=True)
class Use:
    """What a checkpoint is used for, and how: a recommendation may hold for some of it only."""

    dtype: str | None = None
    device: str | None = None
    task: str | None = None

    def number_met(self, case: dict[str, Any]) -> int | None:
        """How many conditions a case of a recommendation has; None if one of them is not met."""
        conditions = {name: case[name] for name in USES if name in case}
        is_met = all(getattr(self, name) == wanted for name, wanted in conditions.items())
        return len(conditions) if is_met else None


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


def advice_for(model: PreTrainedModel, task: str | None = None) -> Recommendation:
    """What is recommended for a model where it is, and in its dtype; `task` is a dataset's name.

    Raises:
        ValueError: the file beside the weights holds something else.
    """
    use = Use(str(model.dtype).removeprefix("torch."), model.device.type, task)
    return read_recommendation(model.name_or_path or "", model.config.num_hidden_layers, use, model.config.vocab_size)


def read_recommendation(
    name: str, num_layers: int, use: Use = Use(), vocab_size: int = MOST_VOCABULARY
) -> Recommendation:
    """E, d and the draft's vocabulary for a checkpoint: from beside its weights, the paper's, or by E = L/4, d = 4.

    Raises:
        ValueError: the file beside the weights holds something else.
    """
    path = file_beside(name, RECOMMENDATION_FILE)
    if path is not None:
        return _recommendation_in(path, {"exit_layer": num_layers, "draft_vocab": vocab_size}, use)
    if name in PAPER_RECOMMENDATIONS:
        return Recommendation(*PAPER_RECOMMENDATIONS[name], "the paper's choice")
    return Recommendation(max(1, num_layers // 4), 4, "a quarter of the layers, the rule for unknown checkpoints")


def _recommendation_in(path: Path, most: dict[str, int], use: Use) -> Recommendation:
    """Of the file's cases that apply the one with most conditions, the first of equals; without any, its own values."""
    try:
        # A pipe or a device might never end.
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        general = _recommended(path, "", values, most)
        cases = values.get("cases", [])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is not a JSON object with exit_layer and num_speculations.") from error
    if not isinstance(cases, list):
        raise ValueError(f"{path}: cases must be a list, not {cases!r:.40}.")
    fitting = {0: general}
    for number, case in enumerate(cases, 1):
        place = f"case {number}: "
        _check_case(path, place, case)
        recommended, num_met = _recommended(path, place, case, most), use.number_met(case)
        if num_met is not None:
            fitting.setdefault(num_met, recommended)
    return fitting[max(fitting)]


def _check_case(path: Path, place: str, case: Any) -> None:
    """Refuse a case that says nothing of when it applies, or says it in other words."""
    known = {*USES, *RECOMMENDED}
    if not isinstance(case, dict) or not case.keys() >= {"exit_layer", "num_speculations"}:
        raise ValueError(f"{path}: {place}not an object with exit_layer and num_speculations.")
    if case.keys() - known:
        raise ValueError(f"{path}: {place}{min(case.keys() - known)!r:.40} is none of {', '.join(sorted(known))}.")
    given = {name: case[name] for name in USES if name in case}
    if not given:
        raise ValueError(f"{path}: {place}it needs one of {', '.join(USES)}.")
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {place}{name} must be a string, not {value!r:.40}.")


def _recommended(path: Path, place: str, values: Any, most: dict[str, int]) -> Recommendation:
    chosen = {"exit_layer": values["exit_layer"], "num_speculations": values["num_speculations"]}
    if values.get("draft_vocab") is not None:
        chosen["draft_vocab"] = values["draft_vocab"]
    for name, value in chosen.items():
        least, limit = (0, MOST_SPECULATIONS) if name == "num_speculations" else (1, most[name])
        if type(value) is not int or not least <= value <= limit:
            raise ValueError(
                f"{path}: {place}{name} must be a whole number from {least} to {limit}, not {value!r:.40}."
            )
    return Recommendation(**chosen, source="recommended by the checkpoint")


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
