"""How many cores other processes take before and while something is measured: on a busy machine times mean little."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

# How long the machine is looked at before anything is measured.
LOOK_SECONDS = 0.3
# The system counts processors' time in hundredths of a second: over less time it says nothing.
LEAST_SECONDS = 0.1
# On CPUs other work takes its share of the memory's bandwidth, too, even where every thread has a core of its own.
SHARE_OF_A_THREAD = 0.25
# A few small processes always run.
ALWAYS_BUSY = 0.5
# What processors' time is counted as, beside work; what guests take is in the user's time.
NO_WORK = {"idle", "iowait", "guest", "guest_nice"}


@dataclass(frozen=True)
class CpuSeconds:
    """A moment, and what has been computed until then, in seconds: by all processes since the start, and by our own."""

    moment: float
    everyone: float
    ours: float


def cpu_seconds() -> CpuSeconds:
    """Now; ours are those of the run's first process, and of its children."""
    first = psutil.Process(first_process())
    ours = sum(map(_seconds_of, [first, *first.children(recursive=True)]))
    counted = psutil.cpu_times()._asdict()
    everyone = sum(value for name, value in counted.items() if name not in NO_WORK)
    return CpuSeconds(time.monotonic(), everyone, ours)


def num_processes() -> int:
    """How many processes `torchrun` has begun here, or one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def first_process() -> int:
    """The process by which the run began: this one, or `torchrun`."""
    return os.getppid() if num_processes() > 1 else os.getpid()


def _seconds_of(process: psutil.Process) -> float:
    """What it has computed, with its children that have ended."""
    try:
        times = process.cpu_times()
    # It has ended since it was found; its parent counts it then.
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system


def busy_cores(first: CpuSeconds, last: CpuSeconds) -> float | None:
    """Cores that others took between two moments; None if these are too near one another, or nothing is counted."""
    seconds, everyone = last.moment - first.moment, last.everyone - first.everyone
    if seconds < LEAST_SECONDS or last.everyone == 0:
        return None
    return max(everyone - (last.ours - first.ours), 0.0) / seconds


def most_busy_cores(cores: int, threads: int, is_memory_shared: bool) -> float:
    """How many cores others may take: a quarter of one for each of our threads, and every thread still has its own."""
    most = max(cores - threads, 0) + ALWAYS_BUSY
    return min(most, SHARE_OF_A_THREAD * threads) if is_memory_shared else most


def say_beside_results(sentence: str) -> None:
    """On standard error."""
    print(sentence, file=sys.stderr)


class OtherWork:
    """What other processes take of the cores: looked at when this is made, and from then until `end`.

    `say` is told a sentence when it is much.
    """

    def __init__(self, device: torch.device, say: Callable[[str], object] = say_beside_results) -> None:
        self.say = say
        self.cores = psutil.cpu_count() or 1
        is_cpu = device.type == "cpu"
        # An accelerator is driven by one thread.
        threads = torch.get_num_threads() * num_processes() if is_cpu else 1
        self.most = most_busy_cores(self.cores, threads, is_memory_shared=is_cpu)
        first = cpu_seconds()
        time.sleep(LOOK_SECONDS)
        self.start = cpu_seconds()
        self.before = busy_cores(first, self.start)
        self.during: float | None = None
        self._warn("Other processes take", self.before)

    def end(self) -> None:
        """All is measured."""
        self.during = busy_cores(self.start, cpu_seconds())
        self._warn("While this was measured, other processes took", self.during)

    @property
    def sentence(self) -> str:
        """That times mean little, where it is so."""
        return self._sentence("Other processes took", max(self.before or 0.0, self.during or 0.0))

    def as_json(self) -> dict[str, Any]:
        """For the record: cores that others took before and during the measurement, and the sentence, if there is."""
        found: dict[str, Any] = {"busy_cores": {"before": self.before, "during": self.during}}
        return found | ({"caveat": self.sentence} if self.sentence else {})

    def _warn(self, beginning: str, busy: float | None) -> None:
        sentence = self._sentence(beginning, busy or 0.0)
        if sentence:
            self.say(sentence)

    def _sentence(self, beginning: str, busy: float) -> str:
        return f"{beginning} {busy:.1f} of {self.cores} cores: these times mean little." if busy > self.most else ""
