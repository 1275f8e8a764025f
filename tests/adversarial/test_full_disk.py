"""Every program on a disk that fills: one sentence, nothing finished is harmed, and with room again it ends well."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest
from inputs import SOUND
from places import harmed, in_quick_children, main_of, snapshot
from test_kills import GO_ON, RESULTS_OF, RUNS, counted, rows_of

pytestmark = pytest.mark.slow

PAGE = 4096
COMMANDS = {program: SOUND[program] for program in ("generate", "correctness")} | RUNS


def results(program: str, place: Path) -> Any:
    """What a program has found, times aside."""
    if program == "generate":
        return counted(rows_of(place / "logs/generate.jsonl")[-1])
    if program == "correctness":
        return json.loads((place / "logs/correctness.json").read_text())["cells"]
    return RESULTS_OF[program](place)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    """A disk of this size on a folder; the test is skipped where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """A file that leaves so many bytes of the folder's disk."""
    filler = folder / "filler"
    filler.write_bytes(bytes(max(shutil.disk_usage(folder).free - free, 0) // PAGE * PAGE))
    return filler


@pytest.fixture(autouse=True)
def _quick_children() -> Iterator[None]:
    with in_quick_children():
        yield


def run(program: str, place: Path, goes_on: bool = False) -> forked.Outcome:
    flags = f"{COMMANDS[program]} {GO_ON.get(program, '') if goes_on else ''}"
    return forked.start(main_of(program), flags.split(), place).outcome()


@pytest.mark.parametrize("program", COMMANDS)
def test_a_full_disk_harms_nothing(program: str, template: Path, fresh: Callable[[], Path]) -> None:
    """It is full from the beginning, or after a part of what the run writes."""
    output = "out" if program == "train" else "logs"
    place = fresh()
    assert run(program, place).code == 0
    expected = results(program, place)
    used = sum((path.stat().st_size // PAGE + 2) * PAGE for path in (place / output).rglob("*"))
    rng, refused = random.Random(program), 0
    for share in (0.0, rng.uniform(0.1, 0.4), rng.uniform(0.4, 0.8)):
        place = fresh()
        with small_disk(place / output, 8 * used + (4 << 20)):
            if program != "train":
                shutil.copytree(template / "logs", place / output, dirs_exist_ok=True)
                # Its last page has room for one more line.
                (place / output / "generate.jsonl").unlink()
            before = snapshot(place / output)
            filler = fill(place / output, int(share * used))
            ended = run(program, place)
            assert ended.code in (0, 2), ended.errors
            if ended.code:
                refused += 1
                [sentence] = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
                assert "no space" in sentence
                assert f"{output}" in sentence or "--output_dir" in sentence
            assert not harmed(before, snapshot(place / output))
            filler.unlink()
            ended = run(program, place, goes_on=bool(ended.code))
            if ended.code == 2 and "--resume" in ended.errors:
                ended = run(program, place)
            assert ended.code == 0, ended.errors
            assert results(program, place) == expected
    assert refused
