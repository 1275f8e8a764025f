"""What decoding could reach: by the weights that it reads from memory, and by the passes that it is made of."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from self_speculation.decoding.cell import Cell
from self_speculation.exit_adapter import ExitAdapter
from self_speculation.families import is_decoder
from self_speculation.generator_base import GenerationConfig
from self_speculation.measuring.contestants import Contestant
from self_speculation.measuring.measurements import Batch, Round, ratio
from self_speculation.measuring.pass_costs import PassCosts
from self_speculation.measuring.probes import PROBES, Probes


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights that decoding reads; embeddings are looked up, not read."""

    layers: list[int]
    head: int
    vocabulary: int
    # By the exit that has an adapter.
    adapters: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "WeightBytes":
        """The layers, the final norm with the LM head, and an exit adapter; all as one layer where no exit can be."""
        if not is_decoder(model):
            return cls([_num_bytes_read(model)], model.get_output_embeddings().weight.nbytes, model.config.vocab_size)
        layers = [_num_bytes(layer) for layer in model.model.layers]
        adapters = {one.exit_layer: _num_bytes(one) for one in model.children() if isinstance(one, ExitAdapter)}
        head = model.model.norm.weight.nbytes + model.lm_head.weight.nbytes
        return cls(layers, head, model.config.vocab_size, adapters)

    @property
    def all(self) -> int:
        """What an autoregressive step reads."""
        return sum(self.layers) + self.head

    def read(self, batch: Batch, config: GenerationConfig, num_layers: int) -> int:
        """Bytes read after the first delivery, for all rows at once, where `num_layers` choose the tokens.

        A draft reads layers [0, E), the exit adapter there, and the head, or as much of it as `draft_vocab` leaves; a
        step all that choose.
        """
        head = self.head if config.draft_vocab is None else config.draft_vocab * self.head // self.vocabulary
        draft = sum(self.layers[: config.exit_layer]) + self.adapters.get(config.exit_layer or 0, 0) + head
        return batch.drafting_passes * draft + batch.steps * (sum(self.layers[:num_layers]) + self.head)


def _num_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _num_bytes_read(model: PreTrainedModel) -> int:
    """Of all weights but the LM head's, and embeddings that are looked up."""
    others = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(module.weight) for module in (*others, model.get_output_embeddings())}
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in left_out)


@dataclass(frozen=True)
class Memory:
    """A device's memory: the bytes a second that it can be read at, and the bytes of the cache in front of it."""

    bytes_per_second: float
    cache_bytes: int | None

    @classmethod
    def measure(cls, device: torch.device, probes: Probes = PROBES) -> "Memory":
        """Time a read-only pass."""
        return cls(probes.bytes_per_second(device), probes.cache_bytes(device))

    def bounds(self, weights: WeightBytes) -> bool:
        """Whether the weights must come from memory each time: they are larger than the last-level cache."""
        return self.cache_bytes is not None and weights.all > self.cache_bytes


@dataclass(frozen=True)
class Ceiling:
    """What the memory allows: its bandwidth, and the weights that autoregressive decoding reads for each token."""

    memory: Memory
    weights: WeightBytes

    @classmethod
    def measure(cls, model: PreTrainedModel, probes: Probes = PROBES) -> "Ceiling":
        """Of the memory of the model's device."""
        return cls(Memory.measure(model.device, probes), WeightBytes.of(model))

    @property
    def most_tokens_per_second(self) -> float | None:
        """Of autoregressive decoding, batch 1; None where the weights may stay in the cache."""
        return self.memory.bytes_per_second / self.weights.all if self.memory.bounds(self.weights) else None

    def share(self, rounds: list[Round], contestant: Contestant) -> float | None:
        """The share of the bandwidth that a contestant reached.

        None where the weights may stay in the cache, or where how many of them draft changes from step to step.
        """
        if not self.memory.bounds(self.weights) or contestant.generator.strategy.chooses:
            return None
        read = partial(self.weights.read, config=contestant.config, num_layers=contestant.num_layers)
        return bandwidth_share(rounds, read, self.memory.bytes_per_second)

    @property
    def sentence(self) -> str:
        """The ceiling in words."""
        bandwidth = f"Memory is read at {self.memory.bytes_per_second / 1e9:.1f} GB/s"
        weights = f"an autoregressive token reads {self.weights.all / 1e6:.1f} MB of weights"
        if self.most_tokens_per_second is not None:
            return f"{bandwidth}, {weights}: at most {self.most_tokens_per_second:.1f} tokens/s, batch 1."
        size = self.memory.cache_bytes
        cache = "a cache of unknown size" if size is None else f"{size / 1e6:.1f} MB of cache"
        return f"{bandwidth}; {weights}, and there is {cache} in front of it: no ceiling, no share of it is given."

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "bytes_per_second": self.memory.bytes_per_second,
            "weights": asdict(self.weights),
            "cache_bytes": self.memory.cache_bytes,
        }


def bandwidth_share(rounds: list[Round], read: Callable[[Batch], int], bytes_per_second: float) -> float:
    """The share of the memory bandwidth that decoding reached, from the bytes that a batch read; median of rounds."""
    shares = [
        ratio(one.batch_total(read), one.batch_total(lambda b: b.decode_seconds)) / bytes_per_second for one in rounds
    ]
    return statistics.median(shares)


def ideal_speedup(one: Round, baseline: Round, costs: PassCosts, cell: Cell, num_layers: int) -> float:
    """What self-speculative decoding at an (E, d) could reach over autoregressive decoding, were there only passes.

    For one prompt and drafts that are all d long it is

        S_ideal = tokens per step · t_AR / (d · t_draft + t_verify)

    where t_draft is a pass of layers [0, E) and the head, t_verify one of layers [0, E) over the last draft and of
    layers [E, L) and the head over d+1 tokens, and t_AR one of all layers and the head over one token. Here the
    steps and drafts are those that were counted after the first delivery, of both strategies, so that drafts shorter
    than d, at an answer's end, and rows of a batch that wait for others are part of the ideal. What is not: the host's
    work between passes, and whatever a pass costs more in decoding than when it is timed by itself.

    Passes are timed with all rows of a batch, and E = L, d = 0 stands for the autoregressive step. 0 without tokens
    after the first delivery.
    """

    def rate(own: Round, own_cell: Cell) -> float:
        steps, drafts = own.batch_total(lambda b: b.steps), own.batch_total(lambda b: b.drafting_passes)
        return ratio(own.batch_total(lambda b: b.decode_tokens), costs.seconds(own_cell, steps, drafts))

    return ratio(rate(one, cell), rate(baseline, Cell(num_layers, 0)))
