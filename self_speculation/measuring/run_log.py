"""What a long run has found so far, on disk: whole or absent, whenever the process is killed.

A run is a *document*, replaced as a whole, and a *log* of JSON lines beside it, to which several processes may append.
"""

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from self_speculation.writing import naming

Parsed = TypeVar("Parsed")

# Arguments that may differ between a run and its resumption.
FREE_ARGUMENTS = ("resume", "verbose", "output_dir", "log", "quiet", "json", "config", "rendezvous_timeout", "judge")

# What a run writes after its name, and the number of a run that was set aside.
FILE_NAME = r"(_[a-z_]+)?(\.(?P<number>\d+))?\.(json|jsonl|csv|md|png|pdf)"


@dataclass(frozen=True)
class RunLog:
    """`NAME.json` and `NAME.jsonl` in a folder."""

    folder: Path
    name: str

    @property
    def document(self) -> Path:
        """Where arguments, surroundings and totals stand."""
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """Where each finished piece of work stands as a line."""
        return self.folder / f"{self.name}.jsonl"

    def begin(self, arguments: dict[str, Any], resume: bool) -> None:
        """Start a new run, or go on with the one that is there; an earlier run's files get a number.

        Raises:
            ValueError: there is nothing to resume, or it was begun with other arguments.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume:
            self._check_same(arguments)
            self._drop_torn_lines()
            return
        set_aside(self.folder, self.name)
        self.write({"arguments": arguments})
        self.log.touch()

    def write(self, document: dict[str, Any]) -> None:
        """Replace the document."""
        unfinished = self.document.with_suffix(".json.incomplete")
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with naming(self.document):
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self.document)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, in one write, so that lines of several processes do not mix.

        Raises:
            OSError: the line could not be written, or only in part; it names the file.
        """
        content = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with naming(self.log):
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            try:
                # A disk that has room for a part of it takes that part, and reports no error.
                if os.write(file, content) < len(content):
                    raise OSError(errno.ENOSPC, "a line was written in part; make room, and go on with --resume True")
            finally:
                os.close(file)

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far.

        Raises:
            ValueError: a line is not a JSON object.
        """
        return self.read(lambda line: line)

    def read(self, parse: Callable[[dict[str, Any]], Parsed]) -> list[Parsed]:
        """What a function makes of each line so far.

        Raises:
            ValueError: a line is not a JSON object, or not one that the function understands.
        """
        contents = enumerate(self.log.read_bytes().splitlines(), start=1)
        return [self._parsed(number, content, parse) for number, content in contents]

    def _parsed(self, number: int, content: bytes, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
        try:
            return parse(json_object(content))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{self.log}:{number} is damaged; delete that line, and --resume True does its work again."
            ) from error

    def _check_same(self, arguments: dict[str, Any]) -> None:
        if not (self.document.is_file() and self.log.is_file()):
            raise ValueError(f"--resume: there is no earlier run in {self.folder}.")
        earlier = self._arguments()
        for name in sorted((earlier.keys() | arguments.keys()) - set(FREE_ARGUMENTS)):
            before, now = earlier.get(name), json.loads(json.dumps(arguments.get(name)))
            if before != now:
                raise ValueError(f"--resume: the run in {self.folder} had --{name} {before}, not {now}.")

    def _arguments(self) -> dict[str, Any]:
        """What the run that is there was begun with."""
        try:
            document = json_object(self.document.read_bytes())
            return dict(document["arguments"].items())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.document} is damaged; without --resume the run is begun anew.") from error

    def _drop_torn_lines(self) -> None:
        """Take out the beginnings of lines that a kill or a full disk left without their ends.

        The last line may be one; further up, another process has gone on behind it. A file with other damage is left
        as it is.
        """
        content = self.log.read_bytes()
        *lines, end = content.split(b"\n")
        whole = [(number, line) for number, line in enumerate(lines, start=1) if not _is_torn(line)]
        if end or len(whole) < len(lines):
            for number, line in whole:
                self._parsed(number, line, lambda values: values)
            unfinished = self.log.with_suffix(".jsonl.incomplete")
            with naming(self.log):
                unfinished.write_bytes(b"".join(line + b"\n" for _, line in whole))
                unfinished.replace(self.log)


def set_aside(folder: Path, name: str) -> None:
    """Put the next number into the names of an earlier run's files: `sweep_map.png` becomes `sweep_map.2.png`."""
    names = {path: re.fullmatch(name + FILE_NAME, path.name) for path in folder.iterdir()}
    numbers = {path: match["number"] for path, match in names.items() if match}
    number = 1 + max((int(taken) for taken in numbers.values() if taken), default=0)
    for path, taken in numbers.items():
        if not taken:
            path.rename(path.with_stem(f"{path.stem}.{number}"))


def json_object(content: bytes) -> dict[str, Any]:
    """What a file's content is as a JSON object; raises ValueError if it is anything else."""
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("Nested too deeply.") from error
    if not isinstance(value, dict):
        raise ValueError("Not a JSON object.")
    return value


def _is_torn(line: bytes) -> bool:
    """Whether a line begins as ours do, and does not end so."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(b"{")
    return False
