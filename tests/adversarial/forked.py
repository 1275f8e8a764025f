"""Programs in forked children of a process that has imported everything: each costs milliseconds, and harms nobody."""

import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import huggingface_hub.constants

# Longer is a hang.
MOST_SECONDS = 60.0
# What a child may take on top of its parent: sizes that need more are refused by the allocator, on every machine.
MOST_BYTES = 3 << 30
# Where a child's streams go, in its folder.
INPUT, OUTPUT, ERRORS = ".stdin", ".stdout", ".stderr"


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit code (negative: killed by that signal; None: it hung), and what it said."""

    code: int | None
    output: str
    errors: str


@dataclass
class Child:
    """A forked program, in a folder of its own."""

    process: int
    folder: Path
    descriptor: int

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end; whether it came."""
        return bool(select.select([self.descriptor], [], [], seconds)[0])

    def kill(self) -> None:
        """SIGKILL to the child and to what it has started."""
        os.killpg(self.process, signal.SIGKILL)

    def outcome(self, seconds: float = MOST_SECONDS) -> Outcome:
        """Wait for the end; a child that hangs is killed."""
        ended = self.ends_within(seconds)
        if not ended:
            self.kill()
        _, status = os.waitpid(self.process, 0)
        os.close(self.descriptor)
        output, errors = ((self.folder / name).read_text(errors="replace") for name in (OUTPUT, ERRORS))
        return Outcome(os.waitstatus_to_exitcode(status) if ended else None, output, errors)


def start(main: Callable[[], None], flags: list[str], folder: Path, text: bytes = b"") -> Child:
    """Run a program's `main` in a child whose folder is `folder`, with these flags, and `text` on standard input."""
    (folder / INPUT).write_bytes(text)
    process = os.fork()
    if not process:
        _run(main, flags, folder)
    # Either of the two may be first.
    with_group(process)
    return Child(process, folder, os.pidfd_open(process))


def with_group(process: int) -> None:
    """Give a child a process group of its own."""
    try:
        os.setpgid(process, process)
    except (PermissionError, ProcessLookupError):
        return


def _run(main: Callable[[], None], flags: list[str], folder: Path) -> NoReturn:
    """The child's life."""
    code = 70
    try:
        with_group(0)
        _settle(folder)
        sys.argv = ["program.py", *flags]
        code = _exit_code(main)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    """As the interpreter would have it."""
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _settle(folder: Path) -> None:
    """Make the child one that a shell could have started: streams, folder, environment, limits."""
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"}
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    for number, (name, mode) in enumerate([(INPUT, os.O_RDONLY), (OUTPUT, os.O_WRONLY), (ERRORS, os.O_WRONLY)]):
        descriptor = os.open(name, mode | (os.O_CREAT | os.O_TRUNC if number else 0), 0o600)
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
