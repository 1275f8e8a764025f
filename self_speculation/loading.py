"""From names to things: a model and its tokenizer, and the exit layer and draft length to use."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from self_speculation.decoding.early_exit import check_supported
from self_speculation.settings import Settings, setting


def bundled(name: str) -> Path:
    """The folder of a checkpoint that comes along: inside the package once installed, beside it in the repository."""
    package = Path(__file__).parent
    installed = package / "checkpoints" / name
    return installed if installed.is_dir() else package.parent / "checkpoints" / name


BUNDLED_CHECKPOINT = bundled("layerskip-python-6M")
RECOMMENDATION_FILE = "layerskip.json"
# The (E, d) with the paper's best speed-up (tables of section 6, greedy).
PAPER_RECOMMENDATIONS = {
    "facebook/layerskip-llama2-7B": (8, 12),
    "facebook/layerskip-llama2-13B": (15, 12),
}
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments(Settings):
    """Which model, and where and how it runs."""

    model: str = setting(str(BUNDLED_CHECKPOINT), help="Folder or hub name; the bundled checkpoint by default.")
    model_args: str | None = setting(
        None, help="Arguments of from_pretrained: 'k=v,k=v', e.g. device_map=auto,revision=main."
    )
    device: str | None = setting(None, help="cuda, cpu …; CUDA by default where there is any.")
    dtype: str = setting(
        "auto",
        help="auto, float32, bfloat16, float16 or float64; auto is the checkpoint's own, but float32 on CPUs that are "
        "slow in 16 bits.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")


@dataclass(frozen=True)
class Recommendation:
    """The exit layer and draft length to use with a checkpoint, and who says so."""

    exit_layer: int
    num_speculations: int
    source: str


def load(arguments: ModelArguments, **options: Any) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer; `options` stand beside those of `model_args`.

    Raises:
        ValueError: no such model, no weights, no access, or a model that cannot exit early.
    """
    options, device = _parse_model_args(arguments.model_args) | options, choose_device(arguments.device)
    try:
        options.setdefault("dtype", _dtype(arguments.dtype, AutoConfig.from_pretrained(arguments.model), device))
        model = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(_loading_sentence(arguments.model, error)) from error
    except TypeError as error:
        cause = f"--model_args {arguments.model_args}" if arguments.model_args else f"--model {arguments.model}"
        raise ValueError(f"{cause}: {error}.") from error
    check_supported(model)
    if "device_map" not in options:
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator forgets self.
    return model.eval(), tokenizer


def read_recommendation(name: str, num_layers: int) -> Recommendation:
    """E and d for a checkpoint: from beside its weights, the paper's, or by the rule E = L/4, d = 4."""
    path = Path(name) / RECOMMENDATION_FILE
    if path.is_file():
        try:
            values = json.loads(path.read_text())
            return Recommendation(values["exit_layer"], values["num_speculations"], "recommended by the checkpoint")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a JSON object with exit_layer and num_speculations.") from error
    if name in PAPER_RECOMMENDATIONS:
        return Recommendation(*PAPER_RECOMMENDATIONS[name], "the paper's choice")
    return Recommendation(max(1, num_layers // 4), 4, "a quarter of the layers, the rule for unknown checkpoints")


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
            raise ValueError(f"--model_args must look like 'k=v,k=v', but has {item.strip()!r}.")
        if key:
            try:
                options[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[key] = value
    return options


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    is_slow = device.type == "cpu" and own.itemsize == 2 and not _is_fast(own)
    return torch.float32 if is_slow else own


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16-bit numbers in hardware."""
    capabilities = torch.cpu.get_capabilities()
    wanted = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(capabilities.get(name, False) for name in wanted)


def _loading_sentence(name: str, error: Exception) -> str:
    text = str(error)
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"--model {name} is gated or private: ask for access at https://huggingface.co/{name}, "
            "then set HF_TOKEN or run `hf auth login`."
        )
    if Path(name).is_dir():
        return f"--model {name}: the folder has no model that transformers can load ({text.splitlines()[0]})"
    return f"--model {name} is neither a folder nor a model that the hub could give ({text.splitlines()[0]})"
