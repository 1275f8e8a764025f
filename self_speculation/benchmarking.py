# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""Speed, measured: strategies interleaved over the same prompts, what an answer cost, and the totals.

All figures are counted from token ids. The decode rate counts the tokens after the first delivery and the time since
then; every figure says whether it is a total, which weighs long answers more, or a mean over samples.
"""

import dataclasses
import gc
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    HuggingfaceLlamaGenerator,
)
from self_speculation.hardware import live_tensor_bytes
from self_speculation.loading import make_strategy

WARM_UP_TOKENS = 32
# How often the CPU's live tensors are counted during an answer: a count takes longer than a step.
MEMORY_LOOKS = 8
# What a speed-up is over: the first of these that was measured.
BASELINES = ("autoregressive", "hf_generate")


@dataclass(frozen=True)
class Measurement:
    """One answer: its tokens, its times in seconds, and each step's drafted, accepted and committed tokens."""

    tokens: list[int]
    text: str
    stop_reason: str
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    drafted: list[int]
    accepted: list[int]
    committed: list[int]

    @classmethod
    def of(cls, result: GenerationResult) -> "Measurement":
        """What is kept of an answer."""
        return cls(
            tokens=result.tokens,
            text=result.text,
            stop_reason=str(result.stop_reason),
            prefill_seconds=result.prefill_seconds,
            first_token_seconds=result.first_token_seconds,
            decode_seconds=result.decode_seconds,
            drafted=[len(step.drafted) for step in result.steps],
            accepted=result.accepted_per_step,
            committed=[len(step.tokens) for step in result.steps],
        )

    @property
    def seconds(self) -> float:
        """From the prompt to the last token."""
        return self.first_token_seconds + self.decode_seconds

    @property
    def decode_tokens(self) -> int:
        """Tokens after the first delivery."""
        return sum(self.committed[1:])


@dataclass(frozen=True)
class Contestant:
    """A strategy with its settings."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig

    @classmethod
    def of(cls, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> "Contestant":
        """The strategy that the config names."""
        return cls(HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config)), config)

    def run(self, prompt: list[int]) -> Measurement:
        """Answer a prompt."""
        return Measurement.of(self.generator.generate([prompt], self.config)[0])

    def warm_up(self, prompt: list[int]) -> None:
        """A short answer that no one counts."""
        config = dataclasses.replace(self.config, max_steps=min(self.config.max_steps, WARM_UP_TOKENS))
        self.generator.generate([prompt], config)

    def peak_bytes(self, prompt: list[int]) -> int:
        """The most memory during an answer: the allocator's peak on CUDA, bytes of live tensors on the CPU."""
        if self.generator.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.run(prompt)
            return torch.cuda.max_memory_allocated()
        return self._peak_live_bytes(prompt)

    def _peak_live_bytes(self, prompt: list[int]) -> int:
        """Live tensors are counted when an LM head has just run, now and then and so near the end too."""
        gc.collect()
        peak, calls = 0, itertools.count(1)
        every = max(1, self.config.max_steps // MEMORY_LOOKS)

        def look(*_: object) -> None:
            nonlocal peak
            if next(calls) % every == 0:
                peak = max(peak, live_tensor_bytes())

        handle = self.generator.model.lm_head.register_forward_hook(look)
        try:
            self.run(prompt)
        finally:
            handle.remove()
        return peak


def interleaved(contestants: dict[Any, Contestant], prompt: list[int], turn: int) -> dict[Any, Measurement]:
    """Every contestant's answer to a prompt; who begins changes with the turn."""
    names = list(contestants)
    start = turn % len(names)
    answers = {name: contestants[name].run(prompt) for name in names[start:] + names[:start]}
    return {name: answers[name] for name in names}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights that decoding reads; embeddings are looked up, not read."""

    layers: list[int]
    head: int

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> "WeightBytes":
        """The layers, and the final norm with the LM head."""
        layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.model.layers]
        return cls(layers, model.model.norm.weight.nbytes + model.lm_head.weight.nbytes)

    @property
    def all(self) -> int:
        """What an autoregressive step reads."""
        return sum(self.layers) + self.head

    def read(self, measurement: Measurement, config: GenerationConfig) -> int:
        """Bytes read after the first delivery: a draft reads layers [0, E) and the head, a step all that verify."""
        early = sum(self.layers[: config.exit_layer]) + self.head
        step = early if config.generation_strategy == "early_exit" else self.all
        return sum(measurement.drafted[1:]) * early + len(measurement.committed[1:]) * step


@dataclass
class Round:
    """One strategy's answers to all prompts, once."""

    measurements: list[Measurement] = field(default_factory=list)

    def total(self, value: Callable[[Measurement], float]) -> float:
        """The sum of a figure over the answers."""
        return sum(map(value, self.measurements))

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included."""
        return ratio(self.total(lambda m: len(m.tokens)), self.total(lambda m: m.seconds))

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first deliveries over the time since then."""
        return ratio(self.total(lambda m: m.decode_tokens), self.total(lambda m: m.decode_seconds))

    @property
    def times(self) -> dict[str, float]:
        """The figures that change from round to round; a mean over samples says so. No prefill without its own."""
        samples = self.measurements
        prefill = mean(m.prefill_seconds for m in samples)
        return {
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "mean_tokens_per_second": mean(ratio(len(m.tokens), m.seconds) for m in samples),
            "mean_decode_tokens_per_second": mean(ratio(m.decode_tokens, m.decode_seconds) for m in samples),
            "decode_seconds_per_token": ratio(
                self.total(lambda m: m.decode_seconds), self.total(lambda m: m.decode_tokens)
            ),
            "mean_first_token_seconds": mean(m.first_token_seconds for m in samples),
            "seconds": self.total(lambda m: m.seconds),
        } | ({"mean_prefill_seconds": prefill} if prefill else {})

    @property
    def counts(self) -> dict[str, Any]:
        """The figures that follow from the tokens alone."""
        steps = self.total(lambda m: len(m.committed))
        drafted, accepted = self.total(lambda m: sum(m.drafted)), self.total(lambda m: sum(m.accepted))
        rates = [sum(m.accepted) / sum(m.drafted) for m in self.measurements if sum(m.drafted)]
        return {
            "samples": len(self.measurements),
            "tokens": self.total(lambda m: len(m.tokens)),
            "steps": steps,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": accepted / drafted if drafted else None,
            "mean_acceptance_rate": statistics.mean(rates) if rates else None,
            "tokens_per_step": ratio(self.total(lambda m: len(m.tokens)), steps),
            "mean_tokens_per_step": mean(ratio(len(m.tokens), len(m.committed)) for m in self.measurements),
            "acceptance_by_position": acceptance_by_position(self.measurements),
        }


def ratio(over: float, under: float) -> float:
    """A quotient; 0 where there is nothing to divide by."""
    return over / under if under else 0.0


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; 0 of nothing."""
    values = list(values)
    return statistics.mean(values) if values else 0.0


def acceptance_by_position(measurements: list[Measurement]) -> list[float]:
    """For the first, second, … token of a draft: how often it was accepted when it was drafted."""
    steps = [pair for m in measurements for pair in zip(m.drafted, m.accepted, strict=True)]
    longest = max((drafted for drafted, _ in steps), default=0)
    return [
        ratio(sum(accepted > position for _, accepted in steps), sum(drafted > position for drafted, _ in steps))
        for position in range(longest)
    ]


def totals(rounds: list[Round]) -> dict[str, Any]:
    """A strategy's figures: times as medians over the rounds with their least and greatest, counts of the first."""
    times: dict[str, Any] = {}
    for name in rounds[0].times:
        values = [one.times[name] for one in rounds]
        times[name] = statistics.median(values)
        times[f"{name}_spread"] = [min(values), max(values)]
    return times | rounds[0].counts


def speedup(rounds: list[Round], baseline: list[Round]) -> dict[str, Any]:
    """Tokens a second, end to end, over the baseline's: round by round, and sample by sample in all rounds."""
    ratios = [ratio(a.tokens_per_second, b.tokens_per_second) for a, b in zip(rounds, baseline, strict=True)]
    samples = [
        ratio(len(m.tokens) * b.seconds, len(b.tokens) * m.seconds)
        for one, base in zip(rounds, baseline, strict=True)
        for m, b in zip(one.measurements, base.measurements, strict=True)
    ]
    decode = [
        ratio(a.decode_tokens_per_second, b.decode_tokens_per_second) for a, b in zip(rounds, baseline, strict=True)
    ]
    return {
        "speedup": statistics.median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "decode_speedup": statistics.median(decode),
        "sample_speedup_median": statistics.median(samples),
        "sample_speedup_spread": [min(samples), max(samples)],
    }


def bandwidth_share(rounds: list[Round], config: GenerationConfig, weights: WeightBytes, bandwidth: float) -> float:
    """The share of the memory bandwidth that decoding reached, from the weights that it read."""
    shares = [
        ratio(one.total(lambda m: weights.read(m, config)), one.total(lambda m: m.decode_seconds)) / bandwidth
        for one in rounds
    ]
    return statistics.median(shares)
