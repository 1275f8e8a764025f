# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""The contract of generation: what is asked, the strategy that writes steps, and what comes back.

A strategy writes one method, `steps`. Collecting, timing and streaming are clients of the steps it yields.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from self_speculation.cache import PositionAddressedCache, round_up
from self_speculation.decoding_state import DecodingState
from self_speculation.fused_layers import fuse
from self_speculation.hardware import synchronize
from self_speculation.sampling import noise, warpers
from self_speculation.stopping import StopReason, StopRule
from self_speculation.verification import GreedyRule, SamplingRule

LEAST_VALUES = {"max_steps": 0, "exit_layer": 1, "num_speculations": 0, "top_k": 0, "prefill_chunk": 1, "seed": 0}


@dataclass
class GenerationConfig:
    """What a user asks of generation."""

    max_steps: int = field(default=512, metadata={"help": "Most new tokens."})
    exit_layer: int | None = field(
        default=None, metadata={"help": "E: layers that draft (1 to L). Default: the checkpoint's recommendation."}
    )
    num_speculations: int | None = field(
        default=None, metadata={"help": "d: tokens drafted a step. Default: the checkpoint's recommendation."}
    )
    generation_strategy: str = field(
        default="autoregressive",
        metadata={
            "help": "autoregressive, early_exit or self_speculative; or transformers' own hf_generate or hf_early_exit."
        },
    )
    sample: bool = field(default=True, metadata={"help": "Sample; False takes the most probable token."})
    temperature: float = field(default=0.6, metadata={"help": "Divides the logits when sampling."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most probable tokens; 0: from all."})
    top_p: float = field(default=0.9, metadata={"help": "Sample from the smallest set of at least this probability."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "No n-gram of this size occurs twice."})
    stop_words: list[str] | None = field(default=None, metadata={"help": "Strings that end the answer."})
    stop_token_ids: list[int] | None = field(default=None, metadata={"help": "Token ids that end the answer."})
    prefill_chunk: int | None = field(
        default=None, metadata={"help": "Most prompt tokens read in one pass, to bound memory; all by default."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of every random draw."})

    def __post_init__(self) -> None:
        least_values = {
            "max_steps": 0,
            "exit_layer": 1,
            "num_speculations": 0,
            "top_k": 0,
            "prefill_chunk": 1,
            "seed": 0,
        }
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}.")
        if self.sample and self.temperature <= 0:
            raise ValueError(f"--temperature must be positive, not {self.temperature}; --sample False is greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must lie above 0 and be at most 1, not {self.top_p}.")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            raise ValueError(f"--no_repeat_ngram_size must be at least 1, not {self.no_repeat_ngram_size}.")
        if "" in (self.stop_words or []):
            raise ValueError("--stop_words must not be empty strings.")

    def generation(self, **changes: Any) -> "GenerationConfig":
        """A script's own config as generation knows it, with changes."""
        values = {item.name: getattr(self, item.name) for item in fields(GenerationConfig)}
        return GenerationConfig(**values | changes)


@dataclass(frozen=True)
class GenerationRequest:
    """A batch of prompts, as token ids, and how to go on from them."""

    prompts: list[list[int]]
    config: GenerationConfig
    stop_rule: StopRule
    logits_processors: LogitsProcessorList

    def all_processors(self) -> LogitsProcessorList:
        """The config's logits processors, then the caller's."""
        ngram_size = self.config.no_repeat_ngram_size
        own = [NoRepeatNGramLogitsProcessor(ngram_size)] if ngram_size else []
        return LogitsProcessorList([*own, *self.logits_processors])

    def limit_reason(self, row: int, context: int) -> StopReason:
        """Why a row that meets no stop ends: it has `max_steps` new tokens, or fills the model's context."""
        asked_for = len(self.prompts[row]) + self.config.max_steps
        return StopReason.LENGTH if asked_for > context else StopReason.MAX_STEPS


@dataclass(frozen=True)
class RowStep:
    """One row's part of a step: what was drafted, how much of it was accepted, and the tokens it committed.

    All three end at the row's stop. `tokens` are the accepted ones and, unless the stop was in front of it, one of
    the full model's: *recovered* if a draft was rejected, *bonus* if none was.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: int = 0
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason | None = None

    @property
    def is_rejected(self) -> bool:
        """Whether the last token is a recovered one."""
        return self.accepted < min(len(self.drafted), len(self.tokens))


@dataclass(frozen=True)
class GenerationStep:
    """One draft and its verification, for every row; rows that have ended are empty. Prefill is a step of no tokens.

    `seconds` is how long it took, from a strategy that knows better than who waits for the step.
    """

    rows: list[RowStep]
    seconds: float | None = None


@dataclass
class GenerationResult:
    """An answer, and what a benchmark needs to know of it. Times are of the row's whole batch, in seconds.

    `first_token_seconds` ends with the first delivery of tokens and contains the prefill; `decode_seconds` begins
    there. `prefill_seconds` is 0 where prefill and first tokens come as one.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason | None = None
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: list[RowStep] = field(default_factory=list)

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(len(step.drafted) for step in self.steps)

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted."""
        return sum(step.accepted for step in self.steps)

    @property
    def accepted_per_step(self) -> list[int]:
        """Drafted tokens accepted in each step."""
        return [step.accepted for step in self.steps]

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each pass of the full model."""
        return len(self.tokens) / len(self.steps) if self.steps else 0.0

    @property
    def seconds(self) -> float:
        """From the prompt to the last token."""
        return self.first_token_seconds + self.decode_seconds

    @property
    def decode_tokens(self) -> int:
        """New tokens after the first delivery."""
        return sum(len(step.tokens) for step in self.steps[1:])

    @property
    def tokens_per_second(self) -> float:
        """The decode rate: new tokens after the first delivery over the time since then."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class StepStreamer(Protocol):
    """Shows an answer while it is written; a client of the steps."""

    def begin(self, prompt: list[int], stop_rule: StopRule) -> None:
        """An answer to `prompt` (token ids) begins."""

    def update(self, step: RowStep) -> None:
        """One more step has been decided."""

    def end(self) -> None:
        """The answer is complete."""


class GenerationStrategy(ABC):
    """A way of choosing the next tokens: writes `steps`, and nothing else.

    `uses` names the settings of `GenerationConfig` that it cannot do without.
    """

    uses: tuple[str, ...] = ()

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    @abstractmethod
    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """Decode: first the prefill, a step without tokens, then step by step until every row has ended."""


class Decoding:
    """One run of a strategy: the tensors of its state, and the host's record of what each row has generated.

    The state starts with a row for each prompt; as soon as half of its rows have ended it goes on without them.
    """

    def __init__(self, model: LlamaForCausalLM, request: GenerationRequest, num_speculations: int) -> None:
        fuse(model)
        config, prompts = request.config, request.prompts
        device = token_device(model)
        context = model.config.max_position_embeddings
        limits = [min(len(prompt) + config.max_steps, context) for prompt in prompts]
        capacity = round_up(max(limits) + num_speculations + 1)
        self.request = request
        self.context = context
        self.limits = limits
        self.generated: list[list[int]] = [[] for _ in prompts]
        # The prompt of each row of the state.
        self.rows = list(range(len(prompts)))
        self.ended = [len(prompt) >= limit for prompt, limit in zip(prompts, limits, strict=True)]
        rule = SamplingRule(warpers(config.temperature, config.top_k, config.top_p)) if config.sample else GreedyRule()
        self.state = DecodingState(
            tokens_BC=_padded(prompts, capacity).to(device),
            lengths_B=torch.tensor([len(prompt) for prompt in prompts], device=device),
            limits_B=torch.tensor(limits, device=device),
            active_B=torch.tensor([not ended for ended in self.ended], device=device),
            noise_BCS=noise(config.seed, prompts, capacity, device) if config.sample else None,
            cache=PositionAddressedCache(model.config.num_hidden_layers, capacity),
            rule=rule,
            processors=request.all_processors(),
        )

    def prefilled(self) -> GenerationStep:
        """The step that stands for prefill; rows that may not generate at all end with it."""
        rows = [
            RowStep(stop_reason=self.request.limit_reason(row, self.context) if ended else None)
            for row, ended in enumerate(self.ended)
        ]
        return GenerationStep(rows)

    def begin_step(self, num_speculations: int) -> int:
        """Tell the cache how far the next step looks; returns its d, no more than any row can use."""
        lengths = {row: self._length(row) for row in self.rows}
        remaining = max(self.limits[row] - length for row, length in lengths.items() if not self.ended[row])
        num_drafted = min(num_speculations, remaining - 1)
        self.state.cache.see(max(lengths.values()) + num_drafted)
        return num_drafted

    def record(self, outcome_BN: Tensor) -> GenerationStep:
        """What a step's `commit` returned, on the host: one copy from the device. Rows are cut at their stops."""
        outcome = outcome_BN.tolist()
        num_drafted = (len(outcome[0]) - 2) // 2
        steps = [RowStep() for _ in self.ended]
        for row, values in zip(self.rows, outcome, strict=True):
            if not self.ended[row]:
                steps[row] = self._row_step(row, values, num_drafted)
        if any(step.stop_reason for step in steps):
            self._let_ended_rows_rest()
        return GenerationStep(steps)

    def _let_ended_rows_rest(self) -> None:
        """Rows that have ended do not advance; when they are half of the batch, the batch is made smaller."""
        active = [index for index, row in enumerate(self.rows) if not self.ended[row]]
        if active and 2 * len(active) <= len(self.rows):
            self.state.keep(active)
            self.rows = [self.rows[index] for index in active]
        self.state.active_B = torch.tensor(
            [not self.ended[row] for row in self.rows], device=self.state.lengths_B.device
        )

    @property
    def is_active(self) -> bool:
        """Whether any row goes on."""
        return not all(self.ended)

    def _row_step(self, row: int, values: list[int], num_drafted: int) -> RowStep:
        accepted, decided, drafted = values[0], values[1 : num_drafted + 2], values[num_drafted + 2 :]
        drafted = drafted[: self.limits[row] - self._length(row) - 1]
        new, reason = self.request.stop_rule.cut(self.generated[row], decided[: accepted + 1])
        if reason:
            drafted = drafted[: len(new)]
        self.generated[row] += new
        if reason is None and self._length(row) == self.limits[row]:
            reason = self.request.limit_reason(row, self.context)
        self.ended[row] = reason is not None
        return RowStep(drafted, min(accepted, len(new)), new, reason)

    def _length(self, row: int) -> int:
        return len(self.request.prompts[row]) + len(self.generated[row])


def check_exit_layer(exit_layer: int | None, model: LlamaForCausalLM) -> int:
    """The exit layer, if the model has it."""
    num_layers = model.config.num_hidden_layers
    if exit_layer is None or not 1 <= exit_layer <= num_layers:
        raise ValueError(f"--exit_layer must lie between 1 and {num_layers}, the model's layers, not {exit_layer}.")
    return exit_layer


def token_device(model: LlamaForCausalLM) -> torch.device:
    """Where tokens live: with the embeddings, or on the CPU while those are offloaded."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _padded(prompts: list[list[int]], capacity: int) -> Tensor:
    tokens_BC = torch.zeros(len(prompts), capacity, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BC[row, : len(prompt)] = torch.tensor(prompt)
    return tokens_BC


class TokenStreamer:
    """Feeds a streamer of transformers, which takes whole tokens: those that are certain to be shown."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer

    def begin(self, prompt: list[int], stop_rule: StopRule) -> None:
        """Hand over the prompt, as transformers' `generate` does."""
        self.stop_rule = stop_rule
        self.tokens: list[int] = []
        self.num_shown = 0
        self.streamer.put(torch.tensor([prompt]))

    def update(self, step: RowStep) -> None:
        """Hand over the tokens of a step, one by one."""
        self.tokens += step.tokens
        settled = self.stop_rule.settled_tokens(self.tokens, finished=step.stop_reason is not None)
        for token in settled[self.num_shown :]:
            self.streamer.put(torch.tensor([token]))
        self.num_shown = max(self.num_shown, len(settled))

    def end(self) -> None:
        """Let the streamer flush."""
        self.streamer.end()


class HuggingfaceLlamaGenerator:
    """Answers prompts with a model, its tokenizer and a strategy; times, collects and streams the strategy's steps."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strategy: GenerationStrategy) -> None:
        self.tokenizer = tokenizer
        self.strategy = strategy
        self.model = strategy.model

    def stop_rule(self, config: GenerationConfig) -> StopRule:
        """Every end-of-sequence id of tokenizer, config and generation config, and the user's own stops."""
        sources = (self.tokenizer, self.model.config, self.model.generation_config)
        end_ids = (ids if isinstance(ids, list) else [ids] for ids in (source.eos_token_id for source in sources))
        return StopRule(
            end_ids=frozenset(token for ids in end_ids for token in ids if token is not None),
            stop_token_ids=frozenset(config.stop_token_ids or ()),
            stop_words=tuple(config.stop_words or ()),
            decode=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True),
        )

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt has."""
        return len(self.tokenizer(text)["input_ids"])

    def encode(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids.

        Raises:
            ValueError: the prompt has no tokens, or leaves no room in the model's context.
        """
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        context = self.model.config.max_position_embeddings
        if not tokens:
            raise ValueError("The prompt is empty, and the tokenizer has no token to begin with.")
        if len(tokens) >= context:
            raise ValueError(f"The prompt has {len(tokens)} tokens; the model's context is {context}.")
        return tokens

    def request(
        self,
        prompts: list[str] | list[list[int]],
        config: GenerationConfig,
        logits_processors: LogitsProcessorList | None = None,
    ) -> GenerationRequest:
        """What the strategy is asked for a batch of prompts."""
        rows = [self.encode(prompt) for prompt in prompts]
        return GenerationRequest(rows, config, self.stop_rule(config), logits_processors or LogitsProcessorList())

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        config: GenerationConfig,
        streamer: StepStreamer | BaseStreamer | None = None,
        logits_processors: LogitsProcessorList | None = None,
    ) -> list[GenerationResult]:
        """Answer a ragged batch of prompts, texts or token ids; a streamer takes a batch of one."""
        if streamer is not None and len(prompts) != 1:
            raise ValueError(f"A streamer shows one answer, but there are {len(prompts)} prompts.")
        request = self.request(prompts, config, logits_processors)
        results = [GenerationResult() for _ in prompts]
        if isinstance(streamer, BaseStreamer):
            streamer = TokenStreamer(streamer)
        if streamer is not None:
            streamer.begin(request.prompts[0], request.stop_rule)
        for index, (step, seconds) in enumerate(self._timed_steps(request)):
            for result, row in zip(results, step.rows, strict=True):
                _collect(result, row, seconds, is_prefill=index == 0)
            if streamer is not None:
                streamer.update(step.rows[0])
        for result in results:
            result.text = request.stop_rule.text(result.tokens, finished=True)
        if streamer is not None:
            streamer.end()
        return results

    def _timed_steps(self, request: GenerationRequest) -> Iterator[tuple[GenerationStep, float]]:
        """Steps with the seconds that each took, without what clients do between them."""
        steps = self.strategy.steps(request)
        while True:
            start = time.perf_counter()
            step = next(steps, None)
            synchronize()
            if step is None:
                return
            yield step, time.perf_counter() - start if step.seconds is None else step.seconds


def _collect(result: GenerationResult, row: RowStep, seconds: float, is_prefill: bool) -> None:
    result.stop_reason = result.stop_reason or row.stop_reason
    if is_prefill:
        result.prefill_seconds = seconds
    if not result.steps:
        result.first_token_seconds += seconds
    else:
        result.decode_seconds += seconds
    if row.tokens:
        result.tokens += row.tokens
        result.steps.append(row)
