"""Settings that a user gives, as dataclass fields: what each means, what it may be, and the flag that sets it.

A field is made by `setting`; `Settings` checks every field's limits in one place, and names the flag in the sentence.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

# torch, NumPy and iterators keep whole numbers in 64 bits, with a sign.
MOST_WHOLE = 2**63 - 1
# How a setting is written that is chosen where it is not given; in Python it is None.
AUTO = "auto"
# Files that whoever began the program has opened for it: a pipe, or a shell's <(command).
OPEN_FILES = ("/dev/stdin", "/dev/stdout", "/dev/fd/", "/proc/self/fd/")


@dataclass(frozen=True)
class Limits:
    """What a setting may be, besides None; the flag that sets it, where that is not the field's own name.

    `masked` takes its secrets out, wherever it is shown. A setting that `is_rare` is left out of the shorter help. One
    that is `or_auto` may be written `auto`, which is None.
    """

    at_least: float | None = None
    at_most: float | None = None
    flag: str | None = None
    masked: Callable[[str], str] | None = None
    is_rare: bool = False
    or_auto: bool = False


def setting(
    default: Any = MISSING,
    *,
    help: str,
    default_factory: Callable[[], Any] | Any = MISSING,
    **limits: Any,
) -> Any:
    """A dataclass field with its help text and its `Limits`, such as `at_least` and its `flag` on the command line."""
    metadata = {"help": help, "limits": Limits(**limits)}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def limits_of(field: Field[Any]) -> Limits:
    """The field's limits; none at all if it was not made by `setting`."""
    return field.metadata.get("limits", Limits())


def flag_of(field: Field[Any]) -> str:
    """The field's name on the command line, and in files of results."""
    return limits_of(field).flag or field.name


@dataclass
class Settings:
    """A group of settings. A subclass that checks more calls `super().__post_init__()`.

    Raises:
        ValueError: a setting is out of its limits.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            if limits_of(field).or_auto and getattr(self, field.name) == AUTO:
                setattr(self, field.name, None)
            _check(flag_of(field), getattr(self, field.name), limits_of(field))


def _check(flag: str, value: Any, limits: Limits) -> None:
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        raise ValueError(f"--{flag} must fit into 64 bits, not be {value}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{flag} must be a finite number, not {value}.")
    if value is None or limits.at_least is limits.at_most is None:
        return
    if not isinstance(value, int | float):
        kind = f"a number or {AUTO}" if limits.or_auto else "a number"
        raise ValueError(f"--{flag} must be {kind}, not {value!r}.")
    if limits.at_least is not None and not value >= limits.at_least:
        raise ValueError(f"--{flag} must be at least {limits.at_least}, not {value}.")
    if limits.at_most is not None and not value <= limits.at_most:
        raise ValueError(f"--{flag} must be at most {limits.at_most}, not {value}.")


def shown(field: Field[Any], value: Any) -> Any:
    """A field's value as files and terminals may have it: without secrets, and `auto` where it is chosen."""
    limits = limits_of(field)
    if value is None:
        return AUTO if limits.or_auto else None
    return value if limits.masked is None else limits.masked(value)


def by_flag(*groups: Any) -> dict[str, Any]:
    """All settings of some dataclasses by their flags' names, as files of results have them: without secrets."""
    return {flag_of(field): shown(field, getattr(group, field.name)) for group in groups for field in fields(group)}


def regular_file(flag: str, path: str | Path) -> Path:
    """The file that a flag names; what is piped to the program under a name of its own is taken for one.

    Raises:
        ValueError: reading it would wait for a writer, or never end.
    """
    file = Path(path)
    is_given_open = file.is_fifo() and str(file).startswith(OPEN_FILES)
    if file.exists() and not (file.is_file() or is_given_open):
        raise ValueError(f"--{flag}: {file} is not a regular file.")
    return file
