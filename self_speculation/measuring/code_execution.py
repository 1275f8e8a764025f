"""HumanEval's pass@1: do programs that a model wrote pass their tests?

Each program runs in a new Python process of its own, in a temporary folder, without input, output or network, and with
limits on time, memory, files and processes. It has passed only if the process reports, with a token that was drawn for
it, that the last line returned: printing or exiting early is no pass.

This is a seat belt against accidents, not a jail against attackers. Program and report share an interpreter, so that a
program that looks for the token finds it. It has its user's rights on the files of the machine. Limits hold for each
of its processes, and a process that leaves the session outlives the program. Blocked sockets, which stand in where the
kernel gives no network namespace, bind Python code only, not other executables.
"""

import contextlib
import functools
import inspect
import marshal
import math
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum

from tqdm import tqdm

from self_speculation.measuring import program_process
from self_speculation.measuring.program_process import REPORT_BYTES

# What begins the text after the function body: the stop strings of Codex, and those that others added to them.
STOP_WORDS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\n```")
# The source of what runs in a program's process.
PROCESS_SOURCE = inspect.getsource(program_process)
# Isolated: no PYTHON… variables, no user packages, and the folder is not on the import path.
PYTHON = (sys.executable, "-I", "-c")


class Isolation(StrEnum):
    """What keeps a program from the network."""

    NETWORK_NAMESPACE = "network namespace"
    BLOCKED_SOCKETS = "blocked sockets"


@dataclass(frozen=True)
class Limits:
    """What a program may use; all but `wall_seconds` hold for each of its processes.

    `processes` counts those of the user, threads included, that are in the same user namespace; root is not bound.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    processes: int = 256


@dataclass(frozen=True)
class Sandbox:
    """What programs run in: their limits, what keeps them from the network, and the source of their processes.

    By default the network is kept from them by the best that this machine has.
    """

    limits: Limits = field(default_factory=Limits)
    isolation: Isolation | None = None
    process_source: str = PROCESS_SOURCE


SANDBOX = Sandbox()


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed; if not, the exception's name, or "timed out", "out of memory", "exited", "killed: …".

    `isolation` is what kept it from the network.
    """

    passed: bool
    reason: str
    isolation: Isolation


def completion(text: str) -> str:
    """The function body that an answer begins with: the answer up to the first of `STOP_WORDS`."""
    return text[: min((start for word in STOP_WORDS if (start := text.find(word)) >= 0), default=len(text))]


def program(row: Mapping[str, str], answer: str) -> str:
    """The program that tests an answer to a row of HumanEval."""
    return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})\n"


def pass_at_1(programs: Sequence[str], sandbox: Sandbox = SANDBOX) -> list[Outcome]:
    """The programs' outcomes, in their order; pass@1 is the share that passed. Runs one program per processor."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(functools.partial(run, sandbox=sandbox), programs)
        return list(tqdm(outcomes, total=len(programs), desc="Running programs", unit="program"))


def run(source: str, sandbox: Sandbox = SANDBOX) -> Outcome:
    """Run a program in a process of its own.

    Raises:
        RuntimeError: if the process could not be isolated or limited; the program was not run then.
    """
    isolation = sandbox.isolation or network_isolation()
    in_namespace = isolation is Isolation.NETWORK_NAMESPACE
    token = secrets.token_hex()
    reader, writer = os.pipe()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            request = marshal.dumps((source, token, writer, in_namespace, _resources(sandbox.limits)))
            try:
                process = _start(sandbox.process_source, request, writer, folder)
            finally:
                os.close(writer)
            report = _wait(process, reader, sandbox.limits.wall_seconds)
    finally:
        os.close(reader)
    return Outcome(*_judge(report, token, process.returncode), isolation)


@functools.cache
def network_isolation(process_source: str = PROCESS_SOURCE) -> Isolation:
    """What keeps programs from the network on this machine: a namespace where the kernel allows one."""
    probe = subprocess.run([*PYTHON, f"{process_source}\nenter_namespace()"], stderr=subprocess.DEVNULL)
    return Isolation.BLOCKED_SOCKETS if probe.returncode else Isolation.NETWORK_NAMESPACE


def _resources(limits: Limits) -> list[tuple[int, int, int]]:
    """Kind, soft and hard limit of each resource."""
    cpu_seconds = math.ceil(limits.cpu_seconds)
    resources = [
        # At the soft limit comes SIGXCPU, which tells the reason; at the hard one SIGKILL, for who ignores SIGXCPU.
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_NPROC, limits.processes, limits.processes),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    # macOS has the constant but refuses the limit.
    memory = [] if sys.platform == "darwin" else [(resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes)]
    return resources + memory


def _start(process_source: str, request: bytes, writer: int, folder: str) -> subprocess.Popen[bytes]:
    """The new process in `folder`, with `request` in its standard input, and holding the pipe end `writer`."""
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    # A file, not a pipe: nobody has to keep writing, and nothing breaks if the process dies early.
    with tempfile.TemporaryFile() as file:
        file.write(request)
        file.seek(0)
        return subprocess.Popen(
            [*PYTHON, f"{process_source}\nmain()"],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            pass_fds=[writer],
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], reader: int, seconds: float) -> str | None:
    """What the process reports, empty if it ends without; None after `seconds`. Nothing of its group runs on.

    The group is killed before its leader is waited for: until then, no other group can have got its number.
    """
    try:
        # Unlike select, poll takes file descriptors past 1023.
        poller = select.poll()
        poller.register(reader, select.POLLIN)
        return os.read(reader, REPORT_BYTES).decode(errors="replace") if poller.poll(1000 * seconds) else None
    finally:
        # macOS refuses to signal a group whose leader has ended and nobody else is in.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge(report: str | None, token: str, returncode: int) -> tuple[bool, str]:
    """Whether a program passed, and the reason."""
    sender, _, message = (report or "").partition(" ")
    event, _, name = message.partition(" ")
    if sender != token:
        if returncode == -signal.SIGXCPU or (report is None and returncode == -signal.SIGKILL):
            return False, "timed out"
        return False, f"killed: {signal.strsignal(-returncode)}" if returncode < 0 else "exited"
    if event == "refused":
        raise RuntimeError(f"The program was not run, because its process could not be isolated: {name}")
    return event == "returned", {"SystemExit": "exited", "MemoryError": "out of memory"}.get(name, name)
