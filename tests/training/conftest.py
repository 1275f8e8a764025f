"""Runs of the trainer that take a second: a model of three layers, random blocks, and notes on every forward pass."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, TrainingArguments

from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.responses import collate
from self_speculation.training.trainer import LayerSkipTrainer


class RecordingTrainer(LayerSkipTrainer):
    """Notes where every forward pass of training is: step, micro-batch, and the loss's step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace: list[tuple[int, int, int]] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        self.trace.append((self.dropout.step, self.dropout.micro_batch, self.early_exit_loss.step))
        return super().compute_loss(*args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """Each run of the Trainer collects garbage: leave out what was imported before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., LlamaForCausalLM]) -> Callable[..., LlamaForCausalLM]:
    """A function that makes a model of 3 layers of width 16, in float32 unless told otherwise."""

    def make(dtype: torch.dtype = torch.float32, **overrides: object) -> LlamaForCausalLM:
        fields = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return make_model(**fields | overrides).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_blocks() -> Callable[..., list[dict[str, Tensor]]]:
    """A function that makes random blocks of 8 tokens out of 20; `ignored`: block n has n of its labels left out."""

    def make(num_blocks: int, ignored: bool = False) -> list[dict[str, Tensor]]:
        draws = torch.Generator().manual_seed(3)
        blocks = []
        for number in range(num_blocks):
            ids_T = torch.randint(20, (8,), generator=draws)
            labels_T = ids_T.clone()
            labels_T[1 : 1 + number * ignored] = -100
            blocks.append({"input_ids": ids_T, "labels": labels_T})
        return blocks

    return make


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., RecordingTrainer]:
    """A function that makes a trainer of a model on some examples, on which it evaluates too; fields override."""

    def make(
        model: LlamaForCausalLM,
        output_dir: Path,
        examples: Dataset | list[dict[str, Tensor]],
        layerskip: LayerSkipArguments,
        **overrides: Any,
    ) -> RecordingTrainer:
        fields = {
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "save_strategy": "no",
        }
        training = TrainingArguments(output_dir=str(output_dir), **fields | overrides)
        data = {"train_dataset": examples, "eval_dataset": examples, "data_collator": collate}
        return RecordingTrainer(model, training, **data, layerskip=layerskip)

    return make
