"""How the machine is looked at while strategies are measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from self_speculation.measuring.surroundings import last_level_cache_bytes, live_tensor_bytes, memory_bandwidth


@dataclass(frozen=True)
class Probes:
    """What measures the machine; a test hands over its own.

    `bytes_per_second` and `cache_bytes` are of the memory of a device, and of the cache in front of it. `live_bytes`
    are those of all tensors; they are counted so many times during an answer (`memory_looks`), for a count takes longer
    than a step.
    """

    bytes_per_second: Callable[[torch.device], float] = memory_bandwidth
    cache_bytes: Callable[[torch.device], int | None] = last_level_cache_bytes
    live_bytes: Callable[[], int] = live_tensor_bytes
    memory_looks: int = 8


PROBES = Probes()
