"""Ways out of a program's process: open without isolation, which is the control, and closed by each that is safe.

A program that gets out passes; one that does not fails, or is ended.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from self_speculation.measuring.code_execution import Limits, Outcome, Sandbox, run
from self_speculation.measuring.isolation import SAFE, Isolation

ROOT = Path(__file__).parents[2]
TOKEN = "hf_not_a_real_token"
SMALL = Limits(wall_seconds=8, written_bytes=2**22, total_memory_bytes=2**27)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no isolation but Linux'")


@pytest.fixture(scope="module")
def isolations() -> list[Isolation]:
    """The safe isolations that this machine has."""
    found = [isolation for isolation in SAFE if is_had(isolation)]
    return found or pytest.skip("the kernel allows neither namespaces nor Landlock")


def is_had(isolation: Isolation) -> bool:
    """Whether this machine has it."""
    try:
        return run("", Sandbox(isolation=isolation)).passed
    except (RuntimeError, OSError):
        return False


def run_in(isolation: Isolation, source: str) -> Outcome:
    """Run a program with small limits."""
    return run(source, Sandbox(SMALL, isolation))


def escaped(isolations: list[Isolation], source: str) -> set[str]:
    """The isolations in which the program passes."""
    return {isolation for isolation in isolations if run_in(isolation, source).passed}


def reasons(isolations: list[Isolation], source: str) -> set[str]:
    """Why the program does not pass."""
    return {run_in(isolation, source).reason for isolation in isolations}


def run_freely(source: str) -> Outcome:
    """Run a program that nothing keeps from files and processes."""
    return run_in(Isolation.BLOCKED_SOCKETS, source)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of the user, whose environment has a secret."""
    environment = os.environ | {"HF_TOKEN": TOKEN}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment) as process:
        # Only then it is Python, and no fork of ours.
        while TOKEN.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
            time.sleep(0.01)
        yield process
        process.kill()


# Files


def test_no_home(isolations: list[Isolation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    key = tmp_path / ".ssh" / "id_ed25519"
    key.parent.mkdir()
    key.write_text("secret")
    source = f"assert open({str(key)!r}).read() == 'secret'"
    assert run_freely(source).passed
    refused = {"FileNotFoundError", "PermissionError"}
    assert reasons(isolations, source) <= refused
    assert reasons(isolations, f"import os\nos.listdir({str(tmp_path)!r})") <= refused


def test_no_repository(isolations: list[Isolation]) -> None:
    source = f"open({str(ROOT / 'pyproject.toml')!r}).read()"
    assert run_freely(source).passed
    assert not escaped(isolations, source)


def test_nothing_is_written_outside(isolations: list[Isolation], tmp_path: Path) -> None:
    path = tmp_path / "file"
    source = f"open({str(path)!r}, 'a').write('x')"
    assert run_freely(source).passed
    assert not escaped(isolations, source)
    assert path.read_text() == "x"
    name = f"escape-{os.getpid()}"
    for folder in (ROOT, Path("/etc"), Path("/usr/lib"), Path(sys.prefix) / "lib", Path("/dev/shm")):
        reasons(isolations, f"open({str(folder / name)!r}, 'a').write('x')")
        assert not (folder / name).exists()


@pytest.mark.parametrize(
    "change",
    ["os.chmod(p, 0o777)", "os.utime(p, (0, 0))", "os.truncate(p, 0)", "os.remove(p)", "os.rename(p, p + '2')"],
)
def test_nothing_is_changed_outside(change: str, isolations: list[Isolation], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    path.chmod(0o600)
    before = path.stat()
    source = f"import os\np = {str(path)!r}\n{change}"
    assert not escaped(isolations, source)
    assert path.stat() == before
    assert run_freely(source).passed
    assert not path.exists() or path.stat() != before


# Sockets


@pytest.mark.parametrize(
    ("kind", "knock"),
    [
        (socket.SOCK_STREAM, "socket.socket(socket.AF_UNIX).connect(path)"),
        (socket.SOCK_DGRAM, "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', path)"),
    ],
)
def test_no_socket_of_a_path(kind: socket.SocketKind, knock: str, isolations: list[Isolation]) -> None:
    """Docker's is one. A plain process is the control, since blocked sockets are what is in Python's reach."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, kind) as server:
        path = f"{folder}/socket"
        server.bind(path)
        if kind is socket.SOCK_STREAM:
            server.listen()
        source = f"import socket\npath = {path!r}\n{knock}"
        subprocess.run([sys.executable, "-c", source], check=True)
        assert not escaped(isolations, source)


# Processes


def test_600_forks(isolations: list[Isolation]) -> None:
    source = "import os, time\nfor _ in range(600):\n    if not os.fork(): time.sleep(60)"
    assert reasons(isolations, source) == {"BlockingIOError"}


@pytest.mark.skipif(os.geteuid() != 0, reason="the user's limit holds without isolation too")
def test_600_forks_of_root_are_not_limited_otherwise() -> None:
    source = "import os\nfor _ in range(600):\n    if not os.fork(): os._exit(0)"
    assert run_freely(source).passed


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(pid, signal.SIGKILL)",
        "signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL)",
        "r, w = os.pipe()\n"
        "fcntl.fcntl(r, fcntl.F_SETOWN, pid)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\n"
        "os.write(w, b'x')",
        "resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))",
    ],
)
def test_no_other_process_is_reached(
    attack: str, isolations: list[Isolation], bystander: subprocess.Popen[bytes]
) -> None:
    limits = Path(f"/proc/{bystander.pid}/limits")
    before = limits.read_text()
    source = f"import fcntl, os, resource, signal\npid = {bystander.pid}\n{attack}"
    assert not escaped(isolations, source)
    assert bystander.poll() is None
    assert limits.read_text() == before
    run_freely(source)
    for _ in range(100):
        if bystander.poll() is not None or limits.read_text() != before:
            break
        time.sleep(0.01)
    else:
        pytest.fail("not even the control has reached the process")


def test_the_run_is_not_killed(isolations: list[Isolation]) -> None:
    source = f"import os\nos.kill({os.getpid()}, 0)"
    assert not escaped(isolations, source)
    assert run_freely(source).passed


def test_no_environment(isolations: list[Isolation], bystander: subprocess.Popen[bytes]) -> None:
    source = f"""
import glob, os
found = []
for path in [*glob.glob("/proc/[0-9]*/environ"), "/proc/{bystander.pid}/environ"]:
    try: found.append(open(path, "rb").read())
    except OSError: pass
assert any(b"HF_" in text for text in found)
"""
    assert run_freely(source).passed
    assert reasons(isolations, source) == {"AssertionError"}


NAMED = """
import ctypes, os, time
def stay():
    ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
    time.sleep(30)
    os._exit(0)
"""
LEAVING = {
    "a new session": "if not os.fork():\n    os.setsid()\n    stay()",
    "a new group": "if not os.fork():\n    os.setpgid(0, 0)\n    stay()",
    "two forks": "if not os.fork():\n    os.setsid()\n    if not os.fork(): stay()\n    os._exit(0)",
    "a fork of one that ends": "if not os.fork():\n    if not os.fork(): stay()\n    os._exit(0)",
}


def named(name: str) -> list[int]:
    """The processes of that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("ending", ["", "os._exit(0)"])
@pytest.mark.parametrize("way", LEAVING)
def test_nobody_outlives_the_program(way: str, ending: str, isolations: list[Isolation]) -> None:
    name = f"left-{os.getpid()}"
    reasons(isolations, f"{NAMED.format(name=name)}\n{LEAVING[way]}\ntime.sleep(0.1)\n{ending}")
    # To kill takes the kernel a moment.
    deadline = time.monotonic() + 2
    while named(name) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not named(name)


def test_without_isolation_one_that_leaves_the_session_outlives_the_program() -> None:
    name = f"left-{os.getpid()}"
    assert run_freely(f"{NAMED.format(name=name)}\n{LEAVING['two forks']}\ntime.sleep(0.2)").passed
    survivors = named(name)
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert survivors


# Sums


@pytest.mark.parametrize(
    "source",
    [
        # Each file is within the limit of one.
        "for i in range(64): open(str(i), 'wb').write(bytes(2**18))",
        "f = []\nfor i in range(64):\n"
        "    f.append(open(str(i), 'wb', 0))\n    os.remove(str(i))\n    f[i].write(bytes(2**18))",
        "for i in range(64): os.write(os.open('.', os.O_TMPFILE | os.O_WRONLY), bytes(2**18))",
        "for i in range(64): open(f'/dev/shm/NAME-{i}', 'wb').write(bytes(2**18))",
        "for i in range(1500): open(str(i), 'wb')",
        "for i in range(64):\n    if not os.fork():\n"
        "        open(str(i), 'wb').write(bytes(2**18))\n        os._exit(0)\n"
        "for i in range(64): assert not os.wait()[1]",
    ],
)
def test_the_disk_is_not_filled(source: str, isolations: list[Isolation]) -> None:
    name = f"escape-{os.getpid()}"
    source = f"import os\n{source.replace('NAME', name)}"
    assert reasons(isolations, source) <= {"out of disk space", "OSError", "PermissionError", "AssertionError"}
    assert run_freely(source).passed
    for path in Path("/dev/shm").glob(f"{name}-*"):
        path.unlink()


@pytest.mark.parametrize(
    "source",
    [
        "for i in range(4):\n    if not os.fork():\n"
        "        x = bytearray(b'x' * 2**26)\n        time.sleep(30)\ntime.sleep(1)",
        "f = []\nfor i in range(512):\n    f.append(os.memfd_create('x'))\n    os.write(f[i], bytes(2**19))",
        # System V's, which is nobody's.
        "import ctypes\nc = ctypes.CDLL(None)\nc.shmat.restype = ctypes.c_void_p\n"
        "for i in range(4):\n    m = c.shmget(0, ctypes.c_size_t(2**26), 0o1600)\n"
        "    assert m >= 0\n    p = c.shmat(m, None, 0)\n"
        "    ctypes.memset(ctypes.c_void_p(p), 1, 2**26)\n    c.shmdt(ctypes.c_void_p(p))\n    c.shmctl(m, 0, None)",
    ],
)
def test_memory_is_not_filled_together(source: str, isolations: list[Isolation]) -> None:
    source = f"import os, time\n{source}"
    assert reasons(isolations, source) <= {"out of memory", "PermissionError", "AssertionError"}
    assert run_freely(source).passed


def test_what_forks_share_counts_once(isolations: list[Isolation]) -> None:
    source = "import os, time\nx = bytearray(b'x' * 2**25)\nfor i in range(16):\n    if not os.fork(): time.sleep(30)\n"
    assert reasons(isolations, source + "time.sleep(0.2)") == {"passed"}
