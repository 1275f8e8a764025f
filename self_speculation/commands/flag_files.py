"""Files of flags: the settings that a run leaves beside its results, a recipe, or one's own; YAML or JSON."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from self_speculation.settings import flag_of, regular_file, shown
from self_speculation.writing import write_text

# How a run is carried out, not what it finds; and a recipe, whose flags are kept themselves.
NOT_KEPT = ("resume", "resume_changed", "verbose", "recipe")


def flags_in(flag: str, path: Path) -> list[str]:
    """The words of a file's flags and their values; those without a value are left out.

    Raises:
        ValueError: names the flag that named the file, and the file.
    """
    kind, read = ("JSON", json.loads) if path.suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        values = read(regular_file(flag, path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--{flag}: {path}: {error.strerror}.") from error
    # A ValueError is of bytes that are not UTF-8, or of a date or number that YAML allows and Python does not.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if str(error).startswith(f"--{flag}"):
            raise
        raise ValueError(f"--{flag}: {path} is not valid {kind}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--{flag}: {path} is not a mapping of flags to values.")
    return [word for name, value in values.items() for word in _words(name, value)]


def _words(flag: Any, value: Any) -> list[str]:
    """A flag and its value as they are typed."""
    if value is None or value == []:
        return []
    # With a sign between them, a value may begin with a dash.
    return [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]


def save_settings(path: Path, *groups: Any, **changes: Any) -> None:
    """Write the settings of a run by flag, as `--config` reads them; what would have to be masked is left out."""
    pairs = ((field, getattr(group, field.name)) for group in groups for field in fields(group))
    kept = {flag_of(field): value for field, value in pairs if shown(field, value) == value} | changes
    found = {flag: value for flag, value in kept.items() if value is not None and flag not in NOT_KEPT}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
