"""What a page of results is made of, and how values of JSON files become its texts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A column's head and the style of its figures; a list is a style's several arguments.
Columns = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class PageTable:
    """A table; one that is folded opens when its title is clicked."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False


@dataclass(frozen=True)
class ShownStep:
    """A step of an answer: each token's text and producer, and in words what was drafted and what became of it."""

    tokens: list[tuple[str, str]]
    verdict: str


@dataclass(frozen=True)
class ShownAnswer:
    """A prompt and its answer. Without steps the text has no colours; a picture is a PNG in base 64."""

    title: str
    prompt: str
    text: str
    facts: str = ""
    steps: list[ShownStep] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    picture: str = ""


@dataclass(frozen=True)
class Section:
    """What one program left in a folder. `pictures` are PNGs in base 64, by what they show."""

    program: str
    summary: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tables: list[PageTable] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    answers: list[ShownAnswer] = field(default_factory=list)


@contextmanager
def understood(path: Path, program: str) -> Iterator[None]:
    """What is read in here is as the program wrote it.

    Raises:
        ValueError: it is not; the sentence names the file.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not what {program} writes.") from error


def json_object(path: Path) -> dict[str, Any]:
    """The file's JSON object.

    Raises:
        ValueError: it is something else.
    """
    try:
        return _as_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object.") from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines, each a JSON object; the beginning of a last one is left out: it may be being written.

    Raises:
        ValueError: a line is something else; the sentence names it.
    """
    lines, found = path.read_bytes().splitlines(keepends=True), []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                found.append(_as_object(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not a JSON object.") from error
    return found


def _as_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("Nested too deeply.") from error
    if not isinstance(value, dict):
        raise ValueError("Not an object.")
    return value


def shown(value: Any, style: str = "") -> str:
    """A value as text; nothing for None."""
    if value is None:
        return ""
    if style:
        return style.format(*value) if isinstance(value, list) else style.format(value)
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def records_table(title: str, records: Sequence[Mapping[str, Any]], columns: Columns) -> PageTable:
    """A row for each record; columns that say nothing are left out."""
    used = {key: own for key, own in columns.items() if any(one.get(key) not in (None, []) for one in records)}
    rows = [[shown(one.get(key), style) for key, (_, style) in used.items()] for one in records]
    return PageTable(title, [head for head, _ in used.values()], rows)


def all_figures(records: Mapping[str, Mapping[str, Any]]) -> PageTable:
    """Everything that is a figure, a row for each, a column for each record."""
    keys = dict.fromkeys(key for own in records.values() for key, value in own.items() if not _is_nested(value))
    rows = [[key, *(shown(own.get(key)) for own in records.values())] for key in keys]
    return PageTable("All figures", ["figure", *records], rows, is_folded=True)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value))
