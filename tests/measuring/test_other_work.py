"""What other processes take of the machine, and what is said of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import psutil
import pytest
import torch

from self_speculation.measuring import other_work
from self_speculation.measuring.other_work import CpuSeconds, OtherWork, busy_cores, first_process, most_busy_cores

CPU = torch.device("cpu")
# The real one: tests see a quiet machine.
cpu_seconds = other_work.cpu_seconds
BURN = "import time\nwhile time.process_time() < 0.3: pass"


@pytest.mark.parametrize(
    ("first", "last", "cores"),
    [
        # Four seconds of work in two, three of them ours.
        (CpuSeconds(10, 100, 7), CpuSeconds(12, 104, 10), 0.5),
        (CpuSeconds(10, 100, 7), CpuSeconds(12, 100, 7), 0.0),
        # Ours are counted a little later than everyone's.
        (CpuSeconds(10, 100, 7), CpuSeconds(12, 102, 9.01), 0.0),
        # Too near, or nothing is counted here.
        (CpuSeconds(10, 100, 7), CpuSeconds(10.01, 101, 7), None),
        (CpuSeconds(10, 0, 7), CpuSeconds(12, 0, 9), None),
    ],
)
def test_cores_of_others(first: CpuSeconds, last: CpuSeconds, cores: float | None) -> None:
    assert busy_cores(first, last) == (cores if cores is None else pytest.approx(cores))


@pytest.mark.parametrize(
    ("cores", "threads", "is_memory_shared", "most"),
    [
        (2, 1, True, 0.25),
        (2, 2, True, 0.5),
        (16, 8, True, 2.0),
        # A quarter of each thread would be four cores, and no thread has one to spare.
        (16, 16, True, 0.5),
        (1, 4, True, 0.5),
        # A GPU is driven by one thread, and has memory of its own.
        (16, 1, False, 15.5),
        (1, 1, False, 0.5),
    ],
)
def test_how_much_is_much(cores: int, threads: int, is_memory_shared: bool, most: float) -> None:
    assert most_busy_cores(cores, threads, is_memory_shared) == most


def computed(run: Callable[[], object]) -> float:
    """Seconds that count as ours meanwhile."""
    before = cpu_seconds().ours
    run()
    return cpu_seconds().ours - before


def burn() -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


def test_our_own_work_and_our_children_s_is_not_others_() -> None:
    assert computed(burn) > 0.25
    assert computed(partial(subprocess.run, [sys.executable, "-c", BURN], check=True)) > 0.25
    found = cpu_seconds()
    assert found.everyone == 0 or found.everyone > found.ours


def test_ranks_that_were_begun_together_are_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert first_process() == os.getpid()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert first_process() == os.getppid()


def test_a_process_that_has_ended_counts_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        found = psutil.Process(process.pid)
        process.kill()
    assert other_work._seconds_of(found) == 0.0


def test_a_machine_that_becomes_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([CpuSeconds(0, 10, 0), CpuSeconds(1, 10.1, 0), CpuSeconds(11, 26.1, 10)])
    monkeypatch.setattr(other_work, "cpu_seconds", lambda: next(readings))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    said: list[str] = []
    others = OtherWork(CPU, said.append)
    assert said == []
    assert others.as_json() == {"busy_cores": {"before": pytest.approx(0.1), "during": None}}
    others.end()
    assert said == ["While this was measured, other processes took 0.6 of 2 cores: these times mean little."]
    assert others.as_json()["caveat"] == "Other processes took 0.6 of 2 cores: these times mean little."
    assert json.loads(json.dumps(others.as_json())) == others.as_json()
