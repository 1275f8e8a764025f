"""What a program and all processes below it use together, seen from outside: the kernel limits each of them alone."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
PROC = Path("/proc")


@dataclass(frozen=True)
class Watch:
    """A process, with the most bytes of memory and of files that it and those below it may have together.

    It writes to `folder`: a path of this process, or, if it `is_inner`, the top of a file system of its own.
    """

    pid: int
    memory_bytes: int
    written_bytes: int
    folder: str
    is_inner: bool

    def excess(self) -> str:
        """What there is too much of; empty if nothing. To be asked once the process is isolated."""
        processes = list(family(self.pid))
        if self._written(processes[-1]) > self.written_bytes:
            return "out of disk space"
        # What processes share counts for each of them at first, since to divide it takes longer.
        if sum(map(resident_bytes, processes)) <= self.memory_bytes:
            return ""
        return "out of memory" if sum(map(own_bytes, processes)) > self.memory_bytes else ""

    def _written(self, newest: int) -> int:
        if not self.is_inner:
            return folder_bytes(self.folder)
        # The first process stays outside, where the folder is another one.
        return 0 if newest == self.pid else inner_bytes(newest, self.folder)


def can_watch() -> bool:
    """Whether this system tells which processes are below another."""
    return (PROC / "self" / "task" / str(os.getpid()) / "children").exists()


def has_ended(pid: int) -> bool:
    """Whether a child process has ended; it stays there to be waited for. Without Linux, never known."""
    if sys.platform != "linux":
        return False
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def family(pid: int) -> Iterator[int]:
    """The process and all below it that still run."""
    yield pid
    # A process that ends meanwhile has no children left.
    with contextlib.suppress(OSError):
        for task in (PROC / str(pid) / "task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def resident_bytes(pid: int) -> int:
    """Memory that the process has, shared or not; 0 when it has ended."""
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def own_bytes(pid: int) -> int:
    """Memory that the process has, its part of what it shares; all of it where the system does not tell."""
    try:
        text = (PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return resident_bytes(pid)
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


def folder_bytes(folder: str) -> int:
    """What the files below a folder take of the disk; a page at least for each, as empty ones take space too."""
    total = 0
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            with contextlib.suppress(OSError):
                total += PAGE + os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def inner_bytes(pid: int, folder: str) -> int:
    """The same for all of a file system that the process sees at a folder; 0 when it has ended."""
    try:
        found = os.statvfs(PROC / str(pid) / "root" / folder.lstrip("/"))
    except OSError:
        return 0
    # Its top is a file too.
    return (found.f_blocks - found.f_bfree) * found.f_frsize + (found.f_files - found.f_ffree - 1) * PAGE
