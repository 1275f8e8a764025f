"""From files to rows: JSON lines, JSON, CSV, Parquet and text. What is wrong is named by file and line.

A row comes with its place, which is how an error names it: the file, and the line or row.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from self_speculation.prompts.words import word_spans

# A longer text file is read in windows of this many words.
WINDOW_WORDS = 2000
# What Python raises for valid JSON that it does not take: numbers of thousands of digits, deep nesting.
LIMITS = (ValueError, RecursionError)

# JSON can escape halves of characters, which no encoding and no tokenizer takes.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")

Row = dict[str, Any]
PlacedRow = tuple[str, Row]


def text_field(row: Row, name: str, where: str) -> str:
    """A row's field, which must be a string."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{where} has no text field {name!r}; it has {', '.join(row) or 'no fields'}.")
    if HALF_CHARACTER.search(row[name]):
        raise ValueError(f"{where} has half a character, an unpaired surrogate, in its field {name!r}.")
    return row[name]


def read_json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number and object of every line of a JSON-lines file; a bad line is named by file and line."""
    with _readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line, f"{path}:{number}")


def json_lines_rows(path: Path) -> Iterator[PlacedRow]:
    """The rows of a file of JSON lines."""
    return ((f"{path}:{number}", row) for number, row in read_json_lines(path))


def parquet_rows(path: Path) -> Iterator[PlacedRow]:
    """The rows of a Parquet file."""
    # Comes with datasets, and is slow to import.
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def text_windows(path: Path) -> Iterator[PlacedRow]:
    """A text file as one row with a field `text`, or one of each window of a longer file."""
    with _readable(path):
        text = path.read_text(encoding="utf-8")
    words = word_spans(text)
    for first in range(0, len(words), WINDOW_WORDS):
        last = min(first + WINDOW_WORDS, len(words)) - 1
        yield f"{path}, from word {first + 1}", {"text": text[words[first][0] : words[last][1]]}


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    with _readable(path):
        text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        # Files of JSON lines are often called .json.
        yield from json_lines_rows(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is not valid JSON: {error.msg}.") from error
    except LIMITS as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is not a JSON object.")
        yield f"{path}: row {number}", row


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    with _readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            for values in filter(None, reader):
                # A value may hold line breaks: this is the row's last line.
                place = f"{path}:{reader.line_num}"
                if len(values) > len(names):
                    raise ValueError(f"{place} has more values than the first line has names.")
                yield place, dict(zip(names, values, strict=False))
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} is not valid CSV: {error}.") from error


# How the files of a table are read, by their suffix; any other suffix is JSON lines.
READERS: dict[str, Callable[[Path], Iterable[PlacedRow]]] = {
    ".jsonl": json_lines_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": parquet_rows,
}


def table_rows(path: Path) -> Iterable[PlacedRow]:
    """The rows of a file, read as its suffix says."""
    return READERS.get(path.suffix.lower(), json_lines_rows)(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """One sentence for a file that is not text or not to be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def _json_object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg}.") from error
    except LIMITS as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object.")
    return row
