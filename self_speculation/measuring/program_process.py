"""What runs in the process of a program: isolate it, run the program, report how it ended.

Its source is handed to a new Python as text, so that it imports only what it needs: a start takes the time of Python's
own, and the program finds nothing of this package.
"""

import marshal
import os
import resource
import sys
import types

# What any pipe takes at once: a report is no longer.
REPORT_BYTES = 512


def main() -> None:
    """Isolate this process, run the program that is in the standard input, and report how it ended."""
    source, token, writer, in_namespace, resources = marshal.loads(sys.stdin.buffer.read())
    # What the program may replace is taken before it runs.
    pid, getpid, write = os.getpid(), os.getpid, os.write
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        enter_namespace() if in_namespace else sys.addaudithook(refuse_sockets)
        for kind, soft, hard in resources:
            limit(kind, soft, hard)
    except (OSError, ValueError) as error:
        event = f"refused {error!r}"
    else:
        event = execute(source)
    # A fork of the program that comes to its end has nothing to report. Who has reported is killed at once: neither
    # threads nor exit handlers run on.
    if getpid() == pid:
        write(writer, f"{token} {event}".encode(errors="replace")[:REPORT_BYTES])


def execute(source: str) -> str:
    """Run the program as the main module; what ended it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        return f"raised {type(error).__name__}"
    return "returned passed"


def enter_namespace() -> None:
    """Move this process to a network namespace of its own, in which not even the loopback device is up."""
    import ctypes

    clone_newuser, clone_newnet = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(clone_newuser | clone_newnet):
        raise OSError(ctypes.get_errno(), "no network namespace")


def refuse_sockets(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook, which cannot be taken off, that lets through nothing but unconnected local sockets.

    Event loops need a pair of those, to wake up.
    """
    is_local_pair = event == "socket.__new__" and arguments[1] == 1
    if event.startswith("socket.") and not is_local_pair:
        raise PermissionError(f"{event}: programs have no network")


def limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit of this process, within what is allowed to it."""
    _, highest = resource.getrlimit(kind)
    bounds = [bound if highest == resource.RLIM_INFINITY else min(bound, highest) for bound in (soft, hard)]
    resource.setrlimit(kind, (bounds[0], bounds[1]))
