"""A PEFT adapter's own description, `adapter_config.json`: the base that it changes, and how."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_CONFIG_FILE = "adapter_config.json"
PEFT_TYPE = "LORA"
# A tied model has one matrix for both, into which an adapter of one of them cannot be merged.
TIED_MODULES = {"embed_tokens", "lm_head"}
# A rank is at most a matrix's smaller side.
MOST_RANK = 1_000_000


@dataclass(frozen=True)
class AdapterConfig:
    """What is needed of an adapter: its base's name or folder, the base's revision, what it changes, and its sizes."""

    base: str
    revision: str | None
    modules: frozenset[str]
    rank: int
    alpha: float

    def base_beside(self, folder: Path) -> str:
        """Where the base is: a path relative to the adapter's folder, if there is one, else the name as it stands.

        So an absolute path is itself, and what is no path from there is one from the working directory, or the hub's.
        """
        beside = folder / self.base
        return str(beside) if beside.exists() else self.base


def is_adapter(name: str | Path) -> bool:
    """Whether a folder has an adapter."""
    return (Path(name) / ADAPTER_CONFIG_FILE).exists()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The description in an adapter's folder.

    Raises:
        ValueError: it is no JSON object, has an entry of another type or out of its range, or is of another PEFT type.
    """
    path = folder / ADAPTER_CONFIG_FILE
    values = _json_object(path)
    if values.get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{path}: peft_type must be {PEFT_TYPE!r}, not {values.get('peft_type')!r:.40}.")
    base, revision, rank = (values.get(name) for name in ("base_model_name_or_path", "revision", "r"))
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise ValueError(f"{path}: base_model_name_or_path must name the base, not {base!r:.40}.")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"{path}: revision must be a string, not {revision!r:.40}.")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ValueError(f"{path}: r must be a whole number from 1 to {MOST_RANK}, not {rank!r:.40}.")
    alpha = values.get("lora_alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MOST_RANK:
        raise ValueError(f"{path}: lora_alpha must be a number up to {MOST_RANK}, not {alpha!r:.40}.")
    modules = _names(path, "target_modules", values) | _names(path, "modules_to_save", values)
    return AdapterConfig(base, revision, modules, rank, alpha)


def file_beside(name: str | Path, file: str) -> Path | None:
    """A small file beside a checkpoint's weights; an adapter's own, else its base's. None if there is none."""
    given = Path(name)
    folder = given.parent if given.is_file() else given
    if (folder / file).exists():
        return folder / file
    if not is_adapter(folder):
        return None
    beside = Path(read_adapter_config(folder).base_beside(folder))
    path = (beside.parent if beside.is_file() else beside) / file
    return path if path.exists() else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        # A pipe or a device might never end.
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return values


def _names(path: Path, field: str, values: dict[str, Any]) -> frozenset[str]:
    """Names of modules: a list, one name or pattern, or none."""
    names = values.get(field) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {field} must be a list of names, not {names!r:.40}.")
    return frozenset(names)
