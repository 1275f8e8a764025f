"""Speed, measured: strategies interleaved over the same prompts, what an answer cost, and the totals.

All figures are counted from token ids. The decode rate counts the tokens after the first delivery and the time since
then; every figure says whether it is a total, which weighs long answers more, or a mean.

Prompts are answered in batches, of one by default. A batch's seconds are those of all its rows together, and each row
has them in its measurement: *throughput* is the tokens of all rows over the batch's seconds, counted once, and
*latency* is what a row waits: the seconds until its whole batch is done, and these over the row's own tokens.
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
from self_speculation.loading import make_strategy
from self_speculation.measuring.passes import PassCosts
from self_speculation.measuring.rivals import HuggingfaceStaticStrategy
from self_speculation.measuring.surroundings import live_tensor_bytes

WARM_UP_TOKENS = 32
# How often the CPU's live tensors are counted during an answer: a count takes longer than a step.
MEMORY_LOOKS = 8
# What a speed-up is over: the first of these that was measured.
BASELINES = ("autoregressive", "hf_generate")


@dataclass(frozen=True)
class Measurement:
    """One answer: its tokens, each step's drafted, accepted and committed tokens, and its batch's times in seconds."""

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

    def run(self, prompts: list[list[int]]) -> list[Measurement]:
        """Answer a batch of prompts, all at once."""
        return [Measurement.of(result) for result in self.generator.generate(prompts, self.config)]

    def warm_up(self, prompts: list[list[int]]) -> None:
        """Answers that no one counts: short ones, or whole ones where a longer answer would be compiled for anew."""
        is_whole = isinstance(self.generator.strategy, HuggingfaceStaticStrategy)
        max_new_tokens = self.config.max_new_tokens if is_whole else min(self.config.max_new_tokens, WARM_UP_TOKENS)
        self.generator.generate(prompts, dataclasses.replace(self.config, max_new_tokens=max_new_tokens))

    def peak_bytes(self, prompts: list[list[int]]) -> int:
        """The most memory during a batch's answers: the allocator's peak on CUDA, live tensors' bytes on the CPU."""
        if self.generator.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.run(prompts)
            return torch.cuda.max_memory_allocated()
        return self._peak_live_bytes(prompts)

    def _peak_live_bytes(self, prompts: list[list[int]]) -> int:
        """Live tensors are counted when an LM head has just run, now and then and so near the end too.

        What is compiled runs as it is written: no one can look into it, and the hook would have it compiled anew.
        """
        gc.collect()
        peak, calls = 0, itertools.count(1)
        every = max(1, self.config.max_new_tokens // MEMORY_LOOKS)

        def look(*_: object) -> None:
            nonlocal peak
            if next(calls) % every == 0:
                peak = max(peak, live_tensor_bytes())

        handle = self.generator.model.lm_head.register_forward_hook(look)
        try:
            with torch.compiler.set_stance("force_eager"):
                self.run(prompts)
        finally:
            handle.remove()
        return peak


def interleaved(
    contestants: dict[Any, Contestant], prompts: list[list[int]], turn: int
) -> dict[Any, list[Measurement]]:
    """Every contestant's answers to a batch of prompts; who begins changes with the turn."""
    names = list(contestants)
    start = turn % len(names)
    answers = {name: contestants[name].run(prompts) for name in names[start:] + names[:start]}
    return {name: answers[name] for name in names}


@dataclass(frozen=True)
class Batch:
    """Answers that were given together, in the same seconds."""

    rows: list[Measurement]

    @property
    def seconds(self) -> float:
        """From the prompts to the last row's last token."""
        return max(row.seconds for row in self.rows)

    @property
    def decode_seconds(self) -> float:
        """From the first delivery to the last row's last token."""
        return max(row.decode_seconds for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def decode_tokens(self) -> int:
        """All rows' tokens after the first delivery."""
        return sum(row.decode_tokens for row in self.rows)

    @property
    def steps(self) -> int:
        """Steps after the first delivery: rows step together, until the last of them ends."""
        return max(len(row.committed[1:]) for row in self.rows)

    @property
    def drafting_passes(self) -> int:
        """Drafts made after the first delivery, by one pass for all rows each."""
        drafted = itertools.zip_longest(*(row.drafted[1:] for row in self.rows), fillvalue=0)
        return sum(map(max, drafted))


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights that decoding reads; embeddings are looked up, not read."""

    layers: list[int]
    head: int
    vocabulary: int

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> "WeightBytes":
        """The layers, and the final norm with the LM head."""
        layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.model.layers]
        return cls(layers, model.model.norm.weight.nbytes + model.lm_head.weight.nbytes, model.config.vocab_size)

    @property
    def all(self) -> int:
        """What an autoregressive step reads."""
        return sum(self.layers) + self.head

    def read(self, batch: Batch, config: GenerationConfig) -> int:
        """Bytes read after the first delivery, for all rows at once.

        A draft reads layers [0, E) and the head, or as much of it as `draft_vocab` leaves; a step all that verify.
        """
        early = sum(self.layers[: config.exit_layer])
        draft = early + (self.head if config.draft_vocab is None else config.draft_vocab * self.head // self.vocabulary)
        step = early + self.head if config.generation_strategy == "early_exit" else self.all
        return batch.drafting_passes * draft + batch.steps * step


@dataclass
class Round:
    """One strategy's answers to all prompts, once, in batches of `batch_size`; the last one may be smaller."""

    measurements: list[Measurement] = field(default_factory=list)
    batch_size: int = 1

    @property
    def batches(self) -> list[Batch]:
        """The answers, by batch."""
        starts = range(0, len(self.measurements), self.batch_size)
        return [Batch(self.measurements[start : start + self.batch_size]) for start in starts]

    def total(self, value: Callable[[Measurement], float]) -> float:
        """The sum of a figure over the answers."""
        return sum(map(value, self.measurements))

    def batch_total(self, value: Callable[[Batch], float]) -> float:
        """The sum of a figure over the batches: what rows share, like time, counts once."""
        return sum(map(value, self.batches))

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included: throughput."""
        return ratio(self.batch_total(lambda b: b.num_tokens), self.batch_total(lambda b: b.seconds))

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first deliveries over the time since then: throughput."""
        return ratio(self.batch_total(lambda b: b.decode_tokens), self.batch_total(lambda b: b.decode_seconds))

    @property
    def decode_seconds_per_token(self) -> float:
        """What a row waits for each of its tokens after the first delivery, until its whole batch is done: latency."""
        return ratio(self.total(lambda m: m.decode_seconds), self.total(lambda m: m.decode_tokens))

    @property
    def times(self) -> dict[str, float]:
        """The figures that change from round to round. No prefill without its own."""
        samples, batches = self.measurements, self.batches
        prefill = mean(m.prefill_seconds for m in samples)
        return {
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "mean_tokens_per_second": mean(ratio(b.num_tokens, b.seconds) for b in batches),
            "mean_decode_tokens_per_second": mean(ratio(b.decode_tokens, b.decode_seconds) for b in batches),
            "decode_seconds_per_token": self.decode_seconds_per_token,
            "mean_first_token_seconds": mean(m.first_token_seconds for m in samples),
            "mean_batch_seconds": mean(b.seconds for b in batches),
            "seconds": self.batch_total(lambda b: b.seconds),
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
    """Tokens a second, end to end, over the baseline's: round by round, and batch by batch in all rounds.

    At batch 1 a batch is a sample, and the figures' names say so.
    """
    ratios = [ratio(a.tokens_per_second, b.tokens_per_second) for a, b in zip(rounds, baseline, strict=True)]
    samples = [
        ratio(ours.num_tokens * other.seconds, other.num_tokens * ours.seconds)
        for one, base in zip(rounds, baseline, strict=True)
        for ours, other in zip(one.batches, base.batches, strict=True)
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
        ratio(one.batch_total(lambda b: weights.read(b, config)), one.batch_total(lambda b: b.decode_seconds))
        / bandwidth
        for one in rounds
    ]
    return statistics.median(shares)


def ideal_speedup(
    rounds: list[Round], baseline: list[Round], costs: PassCosts, cell: tuple[int, int], num_layers: int
) -> float:
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

    def rate(one: Round, own_cell: tuple[int, int]) -> float:
        steps, drafts = one.batch_total(lambda b: b.steps), one.batch_total(lambda b: b.drafting_passes)
        return ratio(one.batch_total(lambda b: b.decode_tokens), costs.seconds(own_cell, steps, drafts))

    return ratio(rate(rounds[0], cell), rate(baseline[0], (num_layers, 0)))
