"""Strategies that are measured against each other: interleaved over the same prompts, in one process."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.request import GenerationStep
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
)
from self_speculation.measuring.figures import Times
from self_speculation.measuring.measurements import Measurement
from self_speculation.measuring.probes import PROBES, Probes
from self_speculation.stepwise_strategy import StepwiseStrategy

Name = TypeVar("Name")

WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class WarmUp:
    """Answers that do not count: the seconds until they were there, and the tokens of the longest."""

    seconds: float
    tokens: int

    def preparing_seconds(self, times: Times) -> float:
        """What they took more than as many tokens take later: building, compiling, loading."""
        answering = times.mean_first_token_seconds + max(self.tokens - 1, 0) * times.decode_seconds_per_token
        return max(self.seconds - answering, 0.0)


@dataclass(frozen=True)
class Contestant:
    """A strategy with its settings; it answers at most `batch_size` prompts of a list at once."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    batch_size: int | None = None

    @property
    def num_layers(self) -> int:
        """How many layers choose its tokens."""
        return self.generator.strategy.num_layers(self.config)

    @property
    def cell(self) -> Cell:
        """Its exit layer and draft length.

        Raises:
            ValueError: one of them is not set.
        """
        exit_layer, num_speculations = self.config.exit_layer, self.config.num_speculations
        if exit_layer is None or num_speculations is None:
            raise ValueError(f"{self.config.generation_strategy} needs --exit_layer and --num_speculations.")
        return Cell(exit_layer, num_speculations)

    @property
    def drafting(self) -> dict[str, int | str | None]:
        """Its exit layer and draft length, as results tell them."""
        return self.generator.strategy.drafting(self.config)

    @property
    def has_a_cell(self) -> bool:
        """Whether its exit layer and draft length are numbers, and stay what they are."""
        return all(isinstance(value, int) for value in self.drafting.values())

    def run(self, prompts: list[list[int]]) -> list[Measurement]:
        """Answer a list of prompts."""
        results = self.generator.generate(prompts, self.config, batch_size=self.batch_size)
        return [Measurement.of(result) for result in results]

    def warm_up(self, prompts: list[list[int]], num_tokens: int = WARM_UP_TOKENS) -> WarmUp:
        """Answers that no one counts: short ones, or whole ones where a longer answer would be compiled for anew."""
        most = self.config.max_new_tokens
        if not self.generator.strategy.warms_up_whole:
            most = min(most, num_tokens)
        start = time.perf_counter()
        results = self.generator.generate(prompts, dataclasses.replace(self.config, max_new_tokens=most))
        return WarmUp(time.perf_counter() - start, max((len(result.tokens) for result in results), default=0))

    def peak_bytes(self, prompts: list[list[int]], probes: Probes = PROBES) -> int | None:
        """The most memory during a list's answers: the allocator's peak on CUDA, live tensors' bytes on the CPU.

        None where neither is known: a program that is not torch has its own.
        """
        if self.generator.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.run(prompts)
            return torch.cuda.max_memory_allocated()
        return self._peak_live_bytes(prompts, probes) or None

    def _peak_live_bytes(self, prompts: list[list[int]], probes: Probes) -> int:
        """Live tensors are counted when an LM head has just run, or a step, now and then and so near the end too.

        What torch compiles runs as it is written: no one can look into it, and the hook would have it compiled anew.
        Passes of our own run no module, and have no hooks: there are the steps.
        """
        gc.collect()
        peak, calls = 0, itertools.count(1)
        every = max(1, self.config.max_new_tokens // probes.memory_looks)

        def look(*_: object) -> None:
            nonlocal peak
            if next(calls) % every == 0:
                peak = max(peak, probes.live_bytes())

        handle = self.generator.model.get_output_embeddings().register_forward_hook(look)
        try:
            with torch.compiler.set_stance("force_eager"), after_steps(self.generator.strategy, look):
                self.run(prompts)
        finally:
            handle.remove()
        return peak


@contextmanager
def after_steps(strategy: GenerationStrategy, look: Callable[[], None]) -> Iterator[None]:
    """Look after each step of a strategy that has steps, while what they use is there."""
    if not isinstance(strategy, StepwiseStrategy):
        yield
        return
    steps = strategy.steps

    def looked_after(request: GenerationRequest) -> Iterator[GenerationStep]:
        for step in steps(request):
            look()
            yield step

    vars(strategy)["steps"] = looked_after
    try:
        yield
    finally:
        del vars(strategy)["steps"]


def interleaved(
    contestants: Mapping[Name, Contestant], prompts: list[list[int]], turn: int
) -> dict[Name, list[Measurement]]:
    """Every contestant's answers to a list of prompts; who begins changes with the turn."""
    names = list(contestants)
    start = turn % len(names)
    answers = {name: contestants[name].run(prompts) for name in names[start:] + names[:start]}
    return {name: answers[name] for name in names}
