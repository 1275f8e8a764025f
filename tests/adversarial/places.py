"""What the tests of bad inputs share: a program's `main` as a child runs it, and folders before and after."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lm_eval.tasks.manager
from inputs import PROGRAMS

from self_speculation.measuring.probes import Probes

Snapshot = dict[str, bytes]
QUICK = Probes(bytes_per_second=lambda device: 1e10, live_bytes=lambda: 12345)
# Rows of a task with choices, and of one that generates.
CHOICE = {"question": "a", "choices": ["b", "c"], "label": 0}
PARSE = {"domain": "d", "utterance": "a", "semantic_parse": "[IN:GET a ]"}


def main_of(program: str) -> Callable[[], None]:
    """A program's `main`; lm-eval does not list its own tasks, and memory is not measured: both take seconds."""

    def main() -> None:
        lm_eval.tasks.manager.__file__ = os.path.abspath("bad/empty/manager.py")
        PROGRAMS[program].main(*([QUICK] if program == "benchmark" else []))

    return main


@contextmanager
def in_quick_children() -> Iterator[None]:
    """While this lasts, garbage collection in children does not copy what they share with their parent."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def snapshot(folder: Path) -> Snapshot:
    """Every regular file below a folder, but not what links lead to."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".std")
    }


def harmed(before: Snapshot, after: Snapshot) -> list[str]:
    """Finished results whose bytes are nowhere any more; a file of lines may have been gone on with."""
    kept = set(after.values())
    return [
        path
        for path, content in before.items()
        if content not in kept and not after.get(path, b"").startswith(content or b"-")
    ]
