"""What a measurement depends on besides the code: the machine, its memory bandwidth, the versions, the commit."""

import datetime
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BANDWIDTH_BYTES = 2**30
BANDWIDTH_PASSES = 5
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
PACKAGES = ("torch", "transformers", "accelerate", "numpy")
# The top of this project's tree, and where this file is in it.
PROJECT = Path(__file__).parents[2]
OWN_FILE = Path(__file__).relative_to(PROJECT)


def memory_bandwidth(
    device: torch.device, num_bytes: int = BANDWIDTH_BYTES, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes a second that a read-only pass over 1 GiB reaches, with torch's threads: the best of five."""
    buffer = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(BANDWIDTH_PASSES):
        start = clock()
        buffer.sum().item()
        seconds.append(clock() - start)
    return buffer.nbytes / min(seconds)


def last_level_cache_bytes(device: torch.device, caches: Path = CACHES) -> int | None:
    """Size of the cache in front of the memory; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [file.read_text().strip() for file in caches.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=None)


def live_tensor_bytes() -> int:
    """Bytes of all tensors that are alive in this process, shared storage counted once.

    Weights that a compiler has packed have no storage to look at; they count as what they hold.
    """
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter) and not item.is_meta]
    plain = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
    packed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_mkldnn)
    return sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values()) + packed


def surroundings(device: torch.device) -> dict[str, Any]:
    """Date, machine, versions and commit, for the record."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def commit(project: Path = PROJECT) -> str | None:
    """The commit of the project's checkout, marked if the tree has changed since; None for an installed copy.

    An environment may lie in another project's repository, whose commit says nothing of this code: so the project's
    folder must be the top of a repository, and this file must be in it.
    """
    try:
        _git(project, "ls-files", "--error-unmatch", str(OWN_FILE))
        if not project.samefile(_git(project, "rev-parse", "--show-toplevel")):
            return None
        return _git(project, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    """The processor's name, from Linux if it is Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
