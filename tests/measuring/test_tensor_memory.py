"""The count of live tensor bytes, and what the early-exit loss adds to a training step's peak by it."""

import sys
from pathlib import Path

import pytest
import torch

from self_speculation.measuring.tensor_memory import TensorMemory

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.training_cost import BASE, CostArguments, peak_bytes, variants


def test_live_bytes_are_counted_once_and_forgotten() -> None:
    with TensorMemory() as memory:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:]
        assert memory.live_bytes == 4000
        second = first + 1
        assert (memory.live_bytes, memory.peak_bytes) == (8000, 8000)
        del first, second
        assert memory.live_bytes == 4000  # The view holds the first one's storage.
        del view
        assert (memory.live_bytes, memory.peak_bytes) == (0, 8000)
        memory.reset_peak()
        torch.zeros(10)
        assert memory.peak_bytes == 40


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("bf16", "gradient_checkpointing"), [(False, False), (True, True)])
def test_early_exits_take_hardly_more_memory_and_less_than_transformers_loss(
    bf16: bool, gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = CostArguments(
        num_layers=3,
        hidden_size=32,
        vocab_size=6000,
        batch_size=4,
        block_size=32,
        loss_chunk_tokens=8,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
    )
    named = variants(arguments.num_layers)
    plain, base, every = (
        peak_bytes(named[name], arguments) for name in ("transformers' loss", BASE, "early exits, R = 1")
    )
    assert base <= every <= 1.15 * base
    assert every < plain
    # Chunks are what keeps it low: with all positions at once the logits show.
    arguments.loss_chunk_tokens = 128
    assert peak_bytes(named[BASE], arguments) > 1.15 * base


@pytest.mark.gpu
def test_early_exits_take_hardly_more_of_the_gpus_memory() -> None:
    arguments = CostArguments(num_layers=8, hidden_size=512, batch_size=8, block_size=1024, bf16=True)
    named = variants(arguments.num_layers)
    plain, base, every = (
        peak_bytes(named[name], arguments) for name in ("transformers' loss", BASE, "early exits, R = 1")
    )
    assert every <= 1.15 * base
    assert every < plain
