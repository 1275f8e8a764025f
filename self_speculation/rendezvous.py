"""Where processes that torchrun has started meet: a process that never comes ends the others with a sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

RENDEZVOUS_SECONDS = 120
RENDEZVOUS_HELP = "Seconds in which all of torchrun's processes must come."


@contextmanager
def all_present(seconds: int = RENDEZVOUS_SECONDS) -> Iterator[None]:
    """While this lasts, all processes are there; in it their group is formed, which may then be as patient as it likes.

    Raises:
        ValueError: some did not come in time.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes < 2:
        yield
        return
    # Imports torch; the flags, which name the constants above, are known without.
    from torch import distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        yield
        return
    limit = timedelta(seconds=seconds)
    try:
        store, rank, _ = next(iter(rendezvous("env://", timeout=limit)))
        store.set(f"present/{rank}", "yes")
        store.wait([f"present/{other}" for other in range(num_processes)], limit)
    except dist.DistError as error:
        raise ValueError(
            f"--rendezvous_timeout: not all of {num_processes} processes (WORLD_SIZE) were there after {seconds} s; "
            "start each of them, or let torchrun do so."
        ) from error
    # The first process's store is where the others meet, and lasts as long as this.
    yield
