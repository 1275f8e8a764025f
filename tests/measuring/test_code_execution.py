"""Programs pass only if their tests do, whatever they try; and each limit stops what passes without it."""

import ast
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from self_speculation.measuring.code_execution import (
    PROCESS_SOURCE,
    Limits,
    Sandbox,
    best_isolation,
    completion,
    pass_at_1,
    program,
    run,
)
from self_speculation.measuring.isolation import Isolation

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=list(Isolation))
def isolation(request: pytest.FixtureRequest) -> Isolation:
    """Each isolation that this machine has."""
    try:
        run("", Sandbox(isolation=request.param))
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="session")
def humaneval(data_folder: Path) -> list[dict[str, str]]:
    """The rows of HumanEval."""
    with (data_folder / "humaneval" / "HumanEval.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1", "    return 1"),
        ("", ""),
        ("    return 1\n\n\nclass A:\n    pass\n", "    return 1\n\n"),
        ("    return 1\n\ndef g():\n    pass\n", "    return 1\n"),
        ("    return 1\n# Test\n", "    return 1"),
        ("    return 1\n@cache\n", "    return 1"),
        ("    return 1\nif __name__ == '__main__':\n", "    return 1"),
        ("    return 1\nprint(f(1))\n", "    return 1"),
        ("    return 1\nassert f(1) == 1\n", "    return 1"),
        ("    return 1\n```\nThis returns 1.", "    return 1"),
        ("    return 1\nprint(1)\ndef g():\n", "    return 1"),  # the first in the text
        ("    def g():\n        # one\n        if a:\n            print(a)\n", None),  # inside the function
    ],
)
def test_completion(text: str, body: str | None) -> None:
    assert completion(text) == (text if body is None else body)


def test_program() -> None:
    row = {"prompt": "def f():\n", "test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "f"}
    text = program(row, "    return 1")
    assert text == "def f():\n    return 1\ndef check(candidate):\n    assert candidate() == 1\n\ncheck(f)\n"
    assert run(text).passed
    assert not run(program(row, "    return 2")).passed


def test_humaneval_s_own_solutions_pass_and_empty_ones_fail(humaneval: list[dict[str, str]]) -> None:
    assert len(humaneval) == 164
    solutions = [program(row, completion(row["canonical_solution"])) for row in humaneval]
    outcomes = pass_at_1(solutions + [program(row, "") for row in humaneval])
    assert [outcome.passed for outcome in outcomes] == [True] * 164 + [False] * 164
    # A function that is a docstring alone returns None.
    assert {outcome.reason for outcome in outcomes[164:]} == {"AssertionError", "TypeError"}


def test_outcomes_keep_the_order_of_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = pass_at_1(["import time; time.sleep(0.3)", "1 / 0", "pass"])
    assert [outcome.reason for outcome in outcomes] == ["passed", "ZeroDivisionError", "passed"]
    assert "3/3" in capsys.readouterr().err
    assert pass_at_1([]) == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:\n", "SyntaxError"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("input()", "EOFError"),
        ("def f():\n    f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class passed(Exception):\n    pass\nraise passed", "passed"),
        # No early end is a pass.
        ("print('passed')\nraise SystemExit", "exited"),
        ("import sys\nprint('returned passed', file=sys.stderr)\nsys.exit(0)", "exited"),
        ("import os\nos._exit(0)", "exited"),
        ("import os\nos.kill(os.getpid(), 9)", f"killed: {signal.strsignal(signal.SIGKILL)}"),
        ("import os\nos.abort()", f"killed: {signal.strsignal(signal.SIGABRT)}"),
        # Nor is a report from someone who does not know the token.
        (
            "import os\nfor i in range(3, 99):\n    try: os.write(i, b'0 returned passed')\n    except OSError: pass\n",
            None,
        ),
        ("import os\nos.closerange(3, 99)\n", None),
        # Nor the end of a fork.
        ("import os, sys\nif os.fork(): os.wait(); sys.exit(0)", "exited"),
    ],
)
def test_programs_that_fail(source: str, reason: str | None, isolation: Isolation) -> None:
    outcome = run(source, Sandbox(isolation=isolation))
    assert not outcome.passed
    assert reason in (None, outcome.reason)
    assert outcome.isolation is isolation


@pytest.mark.parametrize(
    "source",
    [
        "",
        "assert __name__ == '__main__'",
        "import __main__\nx = 1\nassert __main__.x == 1",
        "import numpy\nassert numpy.ones((100, 100)).sum() == 1e4",
        "import asyncio\nasyncio.run(asyncio.sleep(0))",
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()",
        "import atexit, time\natexit.register(time.sleep, 60)",
        "import os\nos.getpid = os.write = os._exit = None",
        "import os\nos.lseek(0, 0, 0)\nassert not os.read(0, 1)",
        "import sys\nsys.stdout.write('x' * 10**7)",
        "open('a', 'w').write('漢字')\nassert open('a', 'rb').read() == '漢字'.encode()",
        "import os\nassert os.listdir() == []\nassert os.getcwd() == os.path.realpath(os.environ['HOME'])",
        "import os\nassert 'SECRET' not in os.environ",
        "import sys\nassert 'self_speculation' not in sys.modules and len(sys.argv) == 1",
    ],
)
def test_programs_that_pass(source: str, isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run(source, Sandbox(isolation=isolation)).reason == "passed"


@pytest.mark.parametrize(
    ("source", "limits", "reason"),
    [
        ("import time\ntime.sleep(0.5)", Limits(wall_seconds=0.25), "timed out"),
        ("import time\nwhile time.process_time() < 1.2: pass", Limits(cpu_seconds=1), "timed out"),
        ("x = bytearray(2**28)", Limits(memory_bytes=2**27), "out of memory"),
        ("x = [bytes(2**20) for _ in range(2**8)]", Limits(memory_bytes=2**27), "out of memory"),
        ("open('a', 'wb').write(bytes(2**19))", Limits(file_bytes=2**18), "OSError"),
    ],
)
def test_limits(source: str, limits: Limits, reason: str) -> None:
    """Each of these passes within the default limits."""
    assert run(source).passed
    outcome = run(source, Sandbox(limits))
    assert not outcome.passed
    assert outcome.reason == reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [("x = [0]\nwhile True: x += x", "out of memory"), ("open('a', 'wb').write(bytes(2**21))", "OSError")],
)
def test_default_limits(source: str, reason: str) -> None:
    assert run(source).reason == reason


def test_number_of_processes() -> None:
    source = "import os, time\nfor _ in range(20):\n    if not os.fork(): time.sleep(60)"
    assert run(source, Sandbox(Limits(processes=5))).reason == "BlockingIOError"


@pytest.mark.parametrize(
    ("ending", "reason"), [("while True: pass", "timed out"), ("", "passed"), ("os._exit(0)", "exited")]
)
def test_nothing_of_a_program_runs_on(ending: str, reason: str, tmp_path: Path) -> None:
    """A child process holds the writing end of a pipe, which hangs up when the child has been killed.

    No safe isolation lets the pipe be reached: theirs is in test_escapes.py.
    """
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    source = f"""
import os, time
os.write(os.open({str(path)!r}, os.O_WRONLY), b"started")
if not os.fork():
    time.sleep(30)
"""
    assert run(source + ending, Sandbox(Limits(wall_seconds=1), Isolation.BLOCKED_SOCKETS)).reason == reason
    assert os.read(reader, 100) == b"started"
    poller = select.poll()
    poller.register(reader, select.POLLHUP)
    assert poller.poll(5000)
    os.close(reader)


def test_files_in_the_working_folder_do_not_survive(tmp_path: Path) -> None:
    path = tmp_path / "path"
    source = f"import os\nos.mkdir('a')\nopen('a/b', 'w').write('b')\nopen({str(path)!r}, 'w').write(os.getcwd())"
    assert run(source, Sandbox(isolation=Isolation.BLOCKED_SOCKETS)).passed
    folder = Path(path.read_text())
    assert folder.is_absolute()
    assert not folder.exists()
    assert folder != Path.cwd()


def test_a_program_has_no_network(isolation: Isolation) -> None:
    """Control: the same program reaches the server in a plain process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        subprocess.run([sys.executable, "-c", source], check=True)
        server.accept()[0].close()
        outcome = run(source, Sandbox(isolation=isolation))
        assert not outcome.passed
        # In a new network namespace not even the loopback device can be reached; bubblewrap gives it one of its own.
        namespaced = {Isolation.NETWORK_NAMESPACE: "OSError", Isolation.BUBBLEWRAP: "ConnectionRefusedError"}
        assert outcome.reason == namespaced.get(isolation, "PermissionError")
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "source",
    [
        "import _socket\n_socket.socket(2)",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('a')",
        "import http.client\nhttp.client.HTTPConnection('127.0.0.1').request('GET', '/')",
    ],
)
def test_blocked_sockets(source: str) -> None:
    assert run(source, Sandbox(isolation=Isolation.BLOCKED_SOCKETS)).reason == "PermissionError"


NO_SEAL = "\ndef filter_calls(_): raise OSError(1, 'no seccomp')"


@pytest.mark.parametrize(
    ("error", "isolation"),
    [
        ("None", Isolation.NETWORK_NAMESPACE),
        ("OSError(1, 'no network namespace')", Isolation.BLOCKED_SOCKETS),
        ("AttributeError('unshare')", Isolation.BLOCKED_SOCKETS),
    ],
)
def test_the_probe_asks_the_kernel(error: str, isolation: Isolation) -> None:
    source = f"{PROCESS_SOURCE}{NO_SEAL}\ndef enter_namespace(_):\n    if {error}: raise {error}"
    assert best_isolation(unsafely=True, process_source=source) is isolation


def test_what_is_not_safe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--execute_code.*--execute_code_unsafely True"):
        best_isolation(process_source=PROCESS_SOURCE + NO_SEAL)


# A machine without namespaces and Landlock: none of their calls is allowed.
FORBIDDING = """
from self_speculation.measuring.program_process import filter_calls
from self_speculation.measuring.system_calls import NEW_NAMESPACE, Condition, Rule, seccomp_filter
landlock, unshare = Rule((444, 444)), Rule((272, 97))
filter_calls(seccomp_filter((landlock, unshare, Rule((56, 220), 0, Condition.HAS_BIT, NEW_NAMESPACE))))
"""


def test_a_machine_that_has_neither() -> None:
    source = """
from self_speculation.measuring.code_execution import best_isolation
print(best_isolation(unsafely=True).value)
try:
    best_isolation()
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", FORBIDDING + source], capture_output=True, text=True, cwd=ROOT)
    taken, refusal = done.stdout.splitlines()
    assert taken == Isolation.BLOCKED_SOCKETS
    assert refusal.startswith("--execute_code, --confirm_run_unsafe_code: neither bubblewrap nor Landlock")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "benchmark --dataset human_eval --execute_code True",
        "eval --tasks local_humaneval --confirm_run_unsafe_code True",
    ],
)
def test_the_programs_refuse_there_in_one_sentence(
    command: str, humaneval: list[dict[str, str]], data_folder: Path, tmp_path: Path
) -> None:
    name, *flags = command.split()
    places = ["--data_dir" if name == "eval" else "--data_path", str(data_folder)]
    flags += [*places, "--output_dir", str(tmp_path)]
    source = f"{FORBIDDING}\nimport sys\nsys.argv[1:] = {flags!r}\n"
    source += f"from self_speculation.commands.{name} import main\nmain()"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --execute_code")
    assert "Traceback" not in done.stderr


def test_what_cannot_be_isolated_is_not_run() -> None:
    refuse = "\ndef enter_namespace(_): raise OSError(1, 'no network namespace')"
    sandbox = Sandbox(isolation=Isolation.NETWORK_NAMESPACE, process_source=PROCESS_SOURCE + refuse)
    with pytest.raises(RuntimeError, match="no network namespace"):
        pass_at_1(["pass"], sandbox)


def test_the_new_process_imports_nothing_but_the_standard_library() -> None:
    """Its source stands alone: what its functions name is built in, imported there, or one of them."""
    tree = ast.parse(PROCESS_SOURCE)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert {alias.name for node in nodes for alias in node.names} <= sys.stdlib_module_names
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"code_execution", "Isolation", "Limits", "tqdm"}
