"""How programs end when somebody or something ends them: one sentence, an exit code, and what is done is kept."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_scripts import PROMPT, QUICK, typing
from tqdm import tqdm

from self_speculation.commands import benchmark, correctness, generate, sweep
from self_speculation.ending import one_sentence_errors

ROOT = Path(__file__).parents[2]
Run = Callable[..., int]


class Signalled(io.StringIO):
    """A stream in the middle of whose output the process gets a signal, once."""

    def __init__(self, number: signal.Signals, after: str) -> None:
        super().__init__()
        self.number: signal.Signals | None = number
        self.after = after

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.number and self.after in self.getvalue():
            number, self.number = self.number, None
            signal.raise_signal(number)
        return written


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


SIGNALS = pytest.mark.parametrize(
    ("number", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)


@SIGNALS
def test_a_stopped_answer_is_logged(
    number: signal.Signals,
    code: int,
    how: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", Signalled(number, after=" "))
    flags = ["--generation_strategy", "self_speculative", "--sample", "False", "--max_steps", 200]
    assert run(generate.main, "--prompt", PROMPT, *flags) == code
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence == f"{how}. Answers so far are in --output_dir, in generate.jsonl."
    [row] = map(json.loads, (tmp_path / "logs" / "generate.jsonl").read_text().splitlines())
    assert row["prompt"] == PROMPT
    assert row["text"]
    assert row["stop_reason"] is None
    assert 0 < len(row["tokens"]) < 200
    assert row["decode_seconds"] >= 0 < row["first_token_seconds"]


@SIGNALS
@pytest.mark.parametrize(
    ("main", "flags", "kept", "hint"),
    [
        (partial(benchmark.main, QUICK), [], "benchmark.jsonl", "--resume True"),
        (sweep.main, ["--exit_layer_last", 2, "--num_speculations_last", 2], "sweep.jsonl", "--resume True"),
        (correctness.main, ["--exit_layer", "1:5"], "correctness.unfinished.json", "correctness.unfinished.json"),
    ],
    ids=["benchmark", "sweep", "correctness"],
)
def test_a_stopped_run_keeps_what_is_done_and_says_how_it_goes_on(
    main: Callable[[], None],
    flags: list[object],
    kept: str,
    hint: str,
    number: signal.Signals,
    code: int,
    how: str,
    run: Run,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes when the progress bar shows what a first piece of work has given."""
    shown = []

    def refresh(self: tqdm, *_: object, **__: object) -> None:
        if self.postfix and not shown:
            shown.append(self.n)
            signal.raise_signal(number)

    monkeypatch.setattr(tqdm, "refresh", refresh)
    assert run(main, *flags, "--data_path", rows, "--max_steps", 4, "--sample", "False") == code
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith(f"{how}. ")
    assert hint in errors.splitlines()[-1]
    assert "Traceback" not in errors
    found = (tmp_path / "logs" / kept).read_text()
    assert found
    if main is correctness.main:
        document = json.loads(found)
        assert not document["is_correct"]
        assert sum(cell["num_samples"] for cell in document["cells"]) == 1
        assert not (tmp_path / "logs" / "correctness.json").exists()


def test_sigterm_does_what_it_did_before_once_the_program_has_ended() -> None:
    with pytest.raises(SystemExit), one_sentence_errors():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_prompt_that_is_too_long_ends_the_turn_and_not_the_conversation(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "x" * 400, "def second():", EOFError)
    assert run(generate.main, "--max_steps", 3) == 0
    assert "the model's context is 256" in capsys.readouterr().err
    [row] = (tmp_path / "logs" / "generate.jsonl").read_text().splitlines()
    assert json.loads(row)["prompt"] == "def second():"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "--batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), "--batch_size"),
        (OSError(28, "No space left on device", "logs/benchmark.jsonl"), "logs/benchmark.jsonl: no space"),
        (OSError(28, "No space left on device"), "--output_dir: no space"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/3"), "--output_dir: no space"),
        (ValueError("--seed is\nwrong."), "--seed is wrong."),
        (PermissionError(13, "Permission denied", "logs"), "logs: Permission denied."),
    ],
)
def test_what_a_user_can_cause_is_one_line(error: Exception, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_sentence_errors():
        raise error
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_an_error_that_is_no_user_s_is_raised() -> None:
    with pytest.raises(RuntimeError, match="a bug"), one_sentence_errors():
        raise RuntimeError("a bug")


def test_a_full_disk_names_the_file(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no file that is always full")
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "generate.jsonl"
    log.symlink_to("/dev/full")
    assert run(generate.main, "--prompt", PROMPT, "--max_steps", 2) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {log}: no space is left")


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts a script of the repository as its users do, on the tiny model."""

    def start_script(script: str, *flags: object, **options: object) -> subprocess.Popen[str]:
        own = ["--model", folder, "--output_dir", tmp_path / "logs"]
        command = [sys.executable, ROOT / script, *own, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen([*map(str, command)], text=True, **pipes)

    return start_script


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@SIGNALS
def test_a_process_that_is_stopped_goes_on(
    number: signal.Signals,
    code: int,
    how: str,
    start: Callable[..., subprocess.Popen[str]],
    rows: Path,
    tmp_path: Path,
) -> None:
    log = tmp_path / "logs" / "benchmark.jsonl"
    flags = ["--data_path", rows, "--max_steps", 32, "--score_text", "False", "--repeats", 9]
    process = start("benchmark.py", *flags)
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 1)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == code
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"{how}. ")
    done = log.read_text()
    resumed = start("benchmark.py", *flags, "--resume", "True")
    assert resumed.communicate()[1]
    assert resumed.returncode == 0
    assert log.read_text().startswith(done[: done.rfind("\n") + 1])
    assert log.read_text().count("\n") == 36


@pytest.mark.slow
@pytest.mark.parametrize("script", ["generate", "correctness", "benchmark", "sweep", "eval", "train"])
def test_ctrl_c_while_packages_are_imported_ends_with_one_word(
    script: str, start: Callable[..., subprocess.Popen[str]]
) -> None:
    # Without any, it would end before it imports anything.
    process = start(f"{script}.py", *(["--tasks", "arc_easy"] if script == "eval" else []))
    mapped = Path(f"/proc/{process.pid}/maps")
    if mapped.exists():
        wait_for(lambda: "libtorch" in mapped.read_text())
    else:
        time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "interrupted.\n"
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "result"),
    [
        ("generate.py", ["--max_steps", 40, "--prompt", PROMPT], "generate.jsonl"),
        ("correctness.py", ["--max_steps", 8, "--exit_layer", "1:5"], "correctness.json"),
        ("benchmark.py", ["--max_steps", 8, "--verbose", "True", "--score_text", "False"], "benchmark.json"),
    ],
)
def test_a_pipe_that_is_closed_ends_nothing(
    script: str,
    flags: list[object],
    result: str,
    start: Callable[..., subprocess.Popen[str]],
    rows: Path,
    tmp_path: Path,
) -> None:
    data = [] if script == "generate.py" else ["--data_path", rows]
    reading, writing = os.pipe()
    os.close(reading)
    process = start(script, *flags, *data, stdout=writing)
    os.close(writing)
    errors = process.communicate()[1]
    assert process.returncode == 0
    assert "Broken" not in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "logs" / result).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii", "COLUMNS": "0"}, {"LC_ALL": "C", "TERM": "dumb", "HOME": None}],
    ids=str,
)
@pytest.mark.parametrize("script", ["generate.py", "correctness.py", "benchmark.py"])
def test_odd_surroundings_do_no_harm(
    script: str,
    environment: dict[str, str | None],
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "漢字 🙂", "response": "é"}\n' * 2)
    flags = {
        "generate.py": ["--prompt", "漢字 🙂", "--streamer", "speculative"],
        "correctness.py": ["--data_path", rows],
        "benchmark.py": ["--data_path", rows, "--verbose", "True"],
    }[script]
    own = {name: value for name, value in (os.environ | environment).items() if value is not None}
    process = start(script, *flags, "--max_steps", 4, env=own)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [("benchmark.py", []), ("eval.py", ["--tasks", "local_piqa"]), ("train.py", ["--data_path", ROOT / "docs"])],
)
def test_a_process_that_never_comes_is_missed_in_a_sentence(
    script: str, flags: list[object], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (tmp_path / "data").mkdir()
    if script == "eval.py":
        flags = [*flags, "--data_dir", tmp_path / "data"]
        path = tmp_path / "data" / "multiple_choice" / "piqa.jsonl"
        path.parent.mkdir()
        path.write_text('{"question": "a", "choices": ["b", "c"], "label": 0}\n' * 4)
    process = start(script, *flags, "--rendezvous_timeout", 2, env=os.environ | own)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 2, errors
    assert errors.splitlines()[-1].startswith("error: --rendezvous_timeout: not all of 2 processes")
    assert "Traceback" not in errors
