"""Files whose code runs when they are read: pickles that lm-eval keeps, and Python that a task file names."""

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_eval.tasks._index import Entry

from self_speculation.terminal import shown_on

# A function as lm-eval's index has it: the task file's folder, the module, the function's name.
FUNCTION = re.compile(r"(?P<module>/[^\n]*)\.\w+")
# That others may write.
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def warn(sentence: str) -> None:
    """Say it on standard error; of several processes the first one speaks."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(shown_on(sys.stderr, sentence), file=sys.stderr)


def private_folder(flag: str, folder: Path) -> Path:
    """The folder, made if need be, into which nobody else can put a pickle.

    Raises:
        ValueError: it is somebody else's.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.geteuid():
        raise ValueError(f"--{flag}: {folder} is another user's, and reading its files runs what is in them.")
    folder.chmod(0o700)
    for file in folder.iterdir():
        check_ours(flag, file)
    return folder


def check_ours(flag: str, file: Path) -> None:
    """Check a file that is going to be unpickled, if there is one.

    Raises:
        ValueError: others may have written it.
    """
    # Another rank's journal may be gone by now.
    with contextlib.suppress(FileNotFoundError):
        found = file.stat()
        if found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
            raise ValueError(f"--{flag}: others can write to {file}, and reading it runs what is in it.")


def code_of_tasks(entries: Iterable[Entry], trusted: tuple[Path, ...]) -> Iterator[str]:
    """The Python files, or modules, that task files name by `!function`, but for those in trusted folders."""
    found = {}
    for entry in entries:
        for text in _texts(entry.cfg):
            match = FUNCTION.fullmatch(text)
            if match:
                place = Path(match["module"])
                found[place] = entry
    for place, entry in found.items():
        file = place.with_name(place.name.replace(".", "/") + ".py")
        if file.exists():
            if not any(file.resolve().is_relative_to(folder) for folder in trusted):
                yield str(file)
        elif entry.yaml_path is not None and place.parent == entry.yaml_path.parent.resolve():
            yield f"the module {place.name}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _texts(own)
