"""What runs in the process of a program: isolate it, run the program, report how it ended.

Its source is handed to a new Python as text, so that it imports only what it needs: a start takes the time of Python's
own, and the program finds nothing of this package.
"""

import ctypes
import marshal
import os
import resource
import struct
import sys
import types

# What any pipe takes at once: a report is no longer.
REPORT_BYTES = 512
# Of whom the kernel takes for nobody: no file is theirs.
NOBODY = 65534
# The one with 64 powers.
CAPABILITY_VERSION = 0x20080522


def main() -> None:
    """Isolate this process, run the program that is in the standard input, and report how it ended.

    The input is, marshalled: the program, a token, the pipe end for reports, functions of this module with their
    arguments, which are called before the program runs, and the limits.
    """
    source, token, writer, measures, resources = marshal.loads(sys.stdin.buffer.read())
    # What the program may replace is taken before it runs.
    pid, getpid, write = os.getpid(), os.getpid, os.write
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, argument in measures:
            globals()[name](argument)
        for kind, soft, hard in resources:
            limit(kind, soft, hard)
    except (OSError, ValueError, AttributeError) as error:
        event = f"refused {error!r}"
    else:
        write(writer, f"{token} started\n".encode())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        event = execute(source)
    # A fork of the program that comes to its end has nothing to report. Who has reported is killed at once: neither
    # threads nor exit handlers run on.
    if getpid() == pid:
        write(writer, f"{token} {event}".encode(errors="replace")[: REPORT_BYTES - 1] + b"\n")


def execute(source: str) -> str:
    """Run the program as the main module; what ended it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        return f"raised {type(error).__name__}"
    return "returned passed"


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    # As whole registers: the kernel looks at all their bits.
    whole = [ctypes.c_long(own) if isinstance(own, int) else own for own in arguments]
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*whole)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return result


def enter_namespace(kinds: int) -> None:
    """Move this process to namespaces of its own; in a network namespace not even the loopback device is up."""
    call("unshare", kinds)


def drop_powers(_: None) -> None:
    """Give up what a new user namespace gives to the one who made it."""
    call("capset", struct.pack("2I", CAPABILITY_VERSION, 0), bytes(24))


def block_sockets(_: None) -> None:
    """Refuse sockets to Python code, by an audit hook, which cannot be taken off."""
    sys.addaudithook(refuse_sockets)


def refuse_sockets(event: str, arguments: tuple[object, ...]) -> None:
    """Let through nothing but unconnected local sockets: event loops need a pair of those, to wake up."""
    is_local_pair = event == "socket.__new__" and arguments[1] == 1
    if event.startswith("socket.") and not is_local_pair:
        raise PermissionError(f"{event}: programs have no network")


def drop_root(keeps_reading: bool) -> None:
    """Become nobody, without any of root's powers but, if asked for, to read files that are not nobody's to read.

    Limits on the number of processes do not bind root.
    """
    set_keepcaps, set_dumpable, read_and_search = 8, 4, 1 << 2
    if keeps_reading:
        call("prctl", set_keepcaps, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if keeps_reading:
        # Effective, permitted and inheritable powers, each in two halves.
        powers = struct.pack("6I", read_and_search, read_and_search, 0, 0, 0, 0)
        call("capset", struct.pack("2I", CAPABILITY_VERSION, 0), powers)
    # Else /proc/self would be root's.
    call("prctl", set_dumpable, 1, 0, 0, 0)


def stand_above(_: None) -> None:
    """Become the parent of all below this process whose own parent ends, so that they are found; end with ours."""
    set_parent_death_signal, set_child_subreaper = 1, 36
    call("prctl", set_parent_death_signal, 9, 0, 0, 0)
    call("prctl", set_child_subreaper, 1, 0, 0, 0)


def restrict_files(rules: list[tuple[str, int]]) -> None:
    """Let this process open only what lies in some folders, each with its rights, by Landlock.

    Raises:
        OSError: the kernel has no Landlock, or an older one than Linux 6.2's, which does not keep files from being
            cut short.
    """
    create_ruleset, add_rule, restrict_self, get_version, path_beneath = 444, 445, 446, 1, 1
    set_no_new_privileges, folders_only = 38, 1 << 3
    version = call("syscall", create_ruleset, None, 0, get_version)
    if version < 3:
        raise OSError(f"Landlock has version {version}, not at least 3")
    every_right = (1 << (16 if version >= 5 else 15)) - 1
    # Rights to files, to ports, and (both bits) to others' abstract sockets and to signals to others.
    handled = struct.pack("3Q", every_right, 0, 3)[: 24 if version >= 6 else 8]
    ruleset = call("syscall", create_ruleset, handled, len(handled), 0)
    for path, rights in rules:
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH)
        allowed = rights if os.path.isdir(path) else rights & ~folders_only
        call("syscall", add_rule, ruleset, path_beneath, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    call("prctl", set_no_new_privileges, 1, 0, 0, 0)
    call("syscall", restrict_self, ruleset, 0)
    os.close(ruleset)


def filter_calls(instructions: list[tuple[int, int, int, int | None]]) -> None:
    """Have the kernel judge each system call of this process and those below it, by a seccomp filter.

    An instruction is its code, its two jumps and its number; None stands for this process' own.
    """
    set_no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    pid = os.getpid()
    packed = b"".join(struct.pack("HBBI", *rest, pid if number is None else number) for *rest, number in instructions)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("H6xP", len(instructions), ctypes.addressof(buffer))
    call("prctl", set_no_new_privileges, 1, 0, 0, 0)
    call("prctl", set_seccomp, by_filter, header, 0, 0)


def limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit of this process, within what is allowed to it."""
    _, highest = resource.getrlimit(kind)
    bounds = [bound if highest == resource.RLIM_INFINITY else min(bound, highest) for bound in (soft, hard)]
    resource.setrlimit(kind, (bounds[0], bounds[1]))
