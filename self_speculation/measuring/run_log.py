"""What a long run has found so far, on disk: whole or absent, whenever the process is killed.

A run is a *document*, replaced as a whole, and a *log* of JSON lines beside it, to which several processes may append.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_speculation.writing import naming, write_text

# Arguments that may differ between a run and its resumption.
FREE_ARGUMENTS = ("resume", "verbose", "output_dir")

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
            _drop_torn_line(self.log)
            return
        self._set_aside()
        self.write({"arguments": arguments})
        self.log.touch()

    def write(self, document: dict[str, Any]) -> None:
        """Replace the document."""
        unfinished = self.document.with_suffix(".json.incomplete")
        write_text(unfinished, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        unfinished.replace(self.document)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, in one write, so that lines of several processes do not mix."""
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        try:
            with naming(self.log):
                os.write(file, (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
        finally:
            os.close(file)

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        with self.log.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def _check_same(self, arguments: dict[str, Any]) -> None:
        if not (self.document.is_file() and self.log.is_file()):
            raise ValueError(f"--resume: there is no earlier run in {self.folder}.")
        earlier = json.loads(self.document.read_text(encoding="utf-8"))["arguments"]
        for name in sorted((earlier.keys() | arguments.keys()) - set(FREE_ARGUMENTS)):
            before, now = earlier.get(name), json.loads(json.dumps(arguments.get(name)))
            if before != now:
                raise ValueError(f"--resume: the run in {self.folder} had --{name} {before}, not {now}.")

    def _set_aside(self) -> None:
        """Put the next number into the names of an earlier run's files: `sweep_map.png` becomes `sweep_map.2.png`."""
        names = {path: re.fullmatch(self.name + FILE_NAME, path.name) for path in self.folder.iterdir()}
        numbers = {path: match["number"] for path, match in names.items() if match}
        number = 1 + max((int(taken) for taken in numbers.values() if taken), default=0)
        for path, taken in numbers.items():
            if not taken:
                path.rename(path.with_stem(f"{path.stem}.{number}"))


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left without its end."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
