"""HumanEval's pass@1: do programs that a model wrote pass their tests?

Each program runs in a new Python process of its own, without input, output, network, or our environment, and with
limits on time, memory, files and processes. It has passed only if the process reports, with a token that was drawn for
it, that the last line returned: printing or exiting early is no pass.

By bubblewrap (see `Isolation`) it has namespaces of its own for users, processes, mounts, network, inter-process
communication and the host's name: it sees Python, the system's libraries, read-only, and an empty folder in memory,
and nothing else. Its processes end with it. Where the kernel gives no namespaces, Landlock and seccomp refuse it every
other file, every signal to others, every socket and every new session. Both hold the sums over its processes:
`written_bytes` is a size of its folder by bubblewrap, and looked at every few milliseconds by Landlock, as
`total_memory_bytes` is by both; between two looks there can be more. Where a machine has neither, nothing is run,
except for who asks for it: then a program has its user's rights on the files and processes of the machine.

This is a wall around the machine, not around the verdict: program and report share an interpreter, so that a program
that looks for the token finds it. A hole in the kernel is a hole in the wall. docs/sandbox.md has the table.
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
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from self_speculation.measuring import program_process
from self_speculation.measuring.isolation import PYTHON, SAFE, UNSAFE, Confinement, Isolation, confinement
from self_speculation.measuring.process_watch import Watch, can_watch, has_ended
from self_speculation.measuring.program_process import NOBODY, REPORT_BYTES

# What begins the text after the function body: the stop strings of Codex, and those that others added to them.
STOP_WORDS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\n```")
# The source of what runs in a program's process.
PROCESS_SOURCE = inspect.getsource(program_process)
# Between two looks at what a program uses.
LOOK_MILLISECONDS = 20
# What bubblewrap takes to end after the program, to pass on how it ended.
PASSING_ON_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """What a program may use: each of its processes, or (the wall time and the last three) all of them together.

    `processes` counts threads too; where there is no user namespace, those of the user's other programs, and root is
    not bound without bubblewrap or Landlock. The two sums hold by bubblewrap and Landlock only.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    processes: int = 256
    total_memory_bytes: int = 2**31
    written_bytes: int = 2**24


@dataclass(frozen=True)
class Sandbox:
    """What programs run in: their limits, what isolates them, and the source of their processes.

    By default they are isolated by the best that this machine has, and refused if that is not safe.
    """

    limits: Limits = field(default_factory=Limits)
    isolation: Isolation | None = None
    process_source: str = PROCESS_SOURCE


SANDBOX = Sandbox()


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed; if not, the exception's name, or "timed out", "out of memory", "exited", "killed: …".

    `isolation` is what kept it from the machine.
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
    if programs:
        sandbox = replace(sandbox, isolation=sandbox.isolation or best_isolation())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(functools.partial(run, sandbox=sandbox), programs)
        return list(tqdm(outcomes, total=len(programs), desc="Running programs", unit="program"))


def run(source: str, sandbox: Sandbox = SANDBOX) -> Outcome:
    """Run a program in a process of its own.

    Raises:
        RuntimeError: if the process could not be isolated or limited; the program was not run then.
        ValueError: see `best_isolation`.
    """
    isolation = sandbox.isolation or best_isolation()
    token = secrets.token_hex()
    reader, writer = os.pipe()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                how = confinement(isolation, folder, sandbox.limits.written_bytes)
                request = marshal.dumps((source, token, writer, how.measures, _resources(sandbox.limits)))
                process = _start(f"{sandbox.process_source}\nmain()", request, writer, (how, folder))
            finally:
                os.close(writer)
            watch = _watch(process.pid, sandbox.limits, (how, folder))
            report, excess = _wait(process, reader, sandbox.limits.wall_seconds, watch)
            said = _last_words(process)
    finally:
        os.close(reader)
    return Outcome(*_judge(_events(report, token, said), excess, process.returncode), isolation)


@functools.cache
def best_isolation(unsafely: bool = False, process_source: str = PROCESS_SOURCE) -> Isolation:
    """The best isolation that this machine has.

    Raises:
        ValueError: none keeps a program from files and processes, and `unsafely` does not say to go on without.
    """
    for isolation in SAFE + UNSAFE if unsafely else SAFE:
        if isolation in UNSAFE or can_watch():
            with contextlib.suppress(RuntimeError, OSError):
                if run("", Sandbox(isolation=isolation, process_source=process_source)).passed:
                    return isolation
    raise ValueError(
        "--execute_code, --confirm_run_unsafe_code: neither bubblewrap nor Landlock can be used here, so programs that "
        "a model wrote would have your rights on this machine; --execute_code_unsafely True runs them all the same."
    )


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


def _start(code: str, request: bytes, writer: int, place: tuple[Confinement, str]) -> subprocess.Popen[bytes]:
    """The new process in its place, with `request` in its standard input, and holding the pipe end `writer`."""
    how, folder = place
    if how.becomes_nobody:
        os.chown(folder, NOBODY, NOBODY)
    inner = how.inner_folder or folder
    environment = {"PATH": os.defpath, "HOME": inner, "TMPDIR": inner, "OMP_NUM_THREADS": "1"}
    # A file, not a pipe: nobody has to keep writing, and nothing breaks if the process dies early.
    with tempfile.TemporaryFile() as file:
        file.write(request)
        file.seek(0)
        return subprocess.Popen(
            [*how.prefix, *PYTHON, code],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            pass_fds=[writer],
            start_new_session=True,
        )


def _watch(pid: int, limits: Limits, place: tuple[Confinement, str]) -> Watch | None:
    """What looks at the sums; None where nothing keeps processes together that could be looked at."""
    how, folder = place
    if not how.is_safe:
        return None
    sums = (limits.total_memory_bytes, limits.written_bytes)
    return Watch(pid, *sums, how.inner_folder or folder, how.inner_folder is not None)


def _wait(process: subprocess.Popen[bytes], reader: int, seconds: float, watch: Watch | None) -> tuple[bytes, str]:
    """What the process reports until it ends, and, if it was ended, what it had too much of. Nothing of it runs on.

    The group is killed before its leader is waited for: until then, no other group can have got its number.
    """
    # Unlike select, poll takes file descriptors past 1023.
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    deadline = time.monotonic() + seconds
    report = b""
    try:
        while True:
            ended = has_ended(process.pid)
            if poller.poll(0 if ended else LOOK_MILLISECONDS):
                piece = os.read(reader, REPORT_BYTES)
                report += piece
                # Two lines are the start and the end.
                if report.count(b"\n") >= 2 or len(report) > 2 * REPORT_BYTES or not (piece or watch):
                    # What was written since the last look counts too.
                    return report, watch.excess() if watch else ""
                if not piece:
                    poller.unregister(reader)
                    deadline = min(deadline, time.monotonic() + PASSING_ON_SECONDS)
            elif ended:
                return report, ""
            if time.monotonic() > deadline:
                return report, "timed out"
            excess = watch.excess() if watch and b"\n" in report else ""
            if excess:
                return report, excess
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group."""
    # macOS refuses to signal a group whose leader has ended and nobody else is in.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """What was said before the program took its place."""
    assert process.stderr is not None
    with process.stderr:
        os.set_blocking(process.stderr.fileno(), False)
        return (process.stderr.read() or b"").decode(errors="replace").strip()


def _events(report: bytes, token: str, said: str) -> list[str]:
    """The events that the process reported, by their token.

    Raises:
        RuntimeError: it was not isolated.
    """
    lines = [line.partition(" ") for line in report.decode(errors="replace").splitlines()]
    events = [event if sender == token else "" for sender, _, event in lines]
    if not events or events[0] != "started":
        raise RuntimeError(f"The program was not run, because its process could not be isolated: {events} {said}")
    return events[1:]


def _judge(events: list[str], excess: str, returncode: int) -> tuple[bool, str]:
    """Whether a program passed, and the reason."""
    event, _, name = (events[0] if events else "").partition(" ")
    if event and not (excess and event == "returned"):
        return event == "returned", {"SystemExit": "exited", "MemoryError": "out of memory"}.get(name, name)
    # Bubblewrap tells of its program's signal as shells do.
    number = returncode - 128 if returncode > 128 else -returncode
    if excess or number == signal.SIGXCPU:
        return False, excess or "timed out"
    return False, f"killed: {signal.strsignal(number)}" if number in signal.valid_signals() else "exited"
