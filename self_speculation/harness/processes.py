"""The processes that torchrun has started, and the device of each."""

import os

import torch


def num_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_device(name: str | None) -> str | None:
    """The device of this process: the one named, else its own CUDA device where several processes share them."""
    if name in (None, "cuda") and num_processes() > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name
