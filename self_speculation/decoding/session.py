"""Decoding by steps: the tensors on the device, the host's record of them, and the step, eager or compiled.

Shapes: B batch, N numbers that a step returns for each row.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.decoding.cache import BUCKET, PositionAddressedCache, power_of_two, round_up
from self_speculation.decoding.compilation import CompiledStep, Step
from self_speculation.decoding.fused_layers import fuse, weight_version
from self_speculation.decoding.rows import DecodingState, new_state
from self_speculation.decoding.sampling import warpers
from self_speculation.decoding.verification import GreedyRule, SamplingRule, VerificationRule
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStep,
    GenerationStrategy,
    RowStep,
    token_device,
)

# A compiled step's tensors hold the model's whole context, if it is no longer than this.
SHORT_CONTEXT = 4096


class Decoding:
    """One run of a strategy: the tensors of its state, and the host's record of what each row has generated.

    The state starts with a row for each prompt; as soon as half of its rows have ended it goes on without them. A
    compiled step has tensors of its own, and keeps all rows.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        request: GenerationRequest,
        num_speculations: int,
        compiled: CompiledStep | None = None,
    ) -> None:
        fuse(model)
        config, prompts = request.config, request.prompts
        self.model = model
        self.request = request
        self.compiled = compiled
        self.context = model.config.max_position_embeddings
        self.limits = [min(len(prompt) + config.max_new_tokens, self.context) for prompt in prompts]
        self.generated: list[list[int]] = [[] for _ in prompts]
        # The prompt of each row of the state.
        self.rows = list(range(len(prompts)))
        self.ended = [len(prompt) >= limit for prompt, limit in zip(prompts, self.limits, strict=True)]
        if compiled is None:
            capacity = round_up(max(self.limits) + num_speculations + 1)
            cache = PositionAddressedCache(model.config.num_hidden_layers, capacity, token_device(model))
            self.state = new_state(cache, len(prompts), config.sample)
        else:
            self.state = compiled.state
        self.state.rule = verification_rule(config)
        self.state.processors = request.all_processors()
        self.state.begin(prompts, self.limits, config.seed)

    def prefilled(self) -> GenerationStep:
        """The step that stands for prefill; rows that may not generate at all end with it."""
        rows = [
            RowStep(stop_reason=self.request.limit_reason(row, self.context) if ended else None)
            for row, ended in enumerate(self.ended)
        ]
        return GenerationStep(rows)

    def begin_step(self, num_speculations: int) -> int:
        """Tell the cache how far the next step looks; returns its d: no more than any row can use, unless compiled."""
        lengths = {row: self._length(row) for row in self.rows}
        remaining = max(self.limits[row] - length for row, length in lengths.items() if not self.ended[row])
        num_drafted = num_speculations if self.compiled else min(num_speculations, remaining - 1)
        self.state.cache.see(max(lengths.values()) + num_drafted)
        return num_drafted

    def run(self, step: Step, *sizes: Any) -> Tensor:
        """The step itself, or its compiled form."""
        return self.compiled() if self.compiled else step(self.model, self.state, *sizes)

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
        if active and 2 * len(active) <= len(self.rows) and not self.compiled:
            self.state.keep(active)
            self.rows = [self.rows[index] for index in active]
        self.state.active_B.copy_(torch.tensor([not self.ended[row] for row in self.rows]))

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


class DecodingStrategy(GenerationStrategy):
    """A strategy that decodes by steps, and has them compiled where that is asked for: one generation at a time."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model)
        self.states: dict[tuple[Any, ...], DecodingState] = {}
        self.compiled_steps: dict[tuple[Any, ...], CompiledStep] = {}
        self.weights: list[tuple[int, int]] = []

    def compiled_step(
        self, request: GenerationRequest, num_speculations: int, step: Step, *sizes: Any
    ) -> CompiledStep | None:
        """The step compiled for requests like this one, now or earlier; None where it is to run eagerly.

        Logits processors are Python, row by row, so a step with any is not compiled.
        """
        config = request.config
        if config.compile == "none" or request.all_processors():
            return None
        fuse(self.model)
        self._forget_other_weights()
        context = self.model.config.max_position_embeddings
        longest = min(max(len(prompt) for prompt in request.prompts) + config.max_new_tokens, context)
        state = self._state(len(request.prompts), longest, num_speculations + 1, config.sample)
        state.rule = verification_rule(config)
        sampling = (config.temperature, config.top_k, config.top_p) if config.sample else None
        key = (id(state), sampling, config.compile, step, sizes)
        if key not in self.compiled_steps:
            self.compiled_steps[key] = CompiledStep(self.model, state, config.compile, step, *sizes)
        self.compiled_steps[key].warm_up(longest + num_speculations + 1)
        return self.compiled_steps[key]

    def _forget_other_weights(self) -> None:
        """Compiled steps may hold copies of the weights: make new ones when the model's have moved or changed."""
        weights = [(weight.data_ptr(), weight_version(weight)) for weight in self.model.parameters()]
        if weights != self.weights:
            self.compiled_steps.clear()
            self.weights = weights

    def _state(self, num_rows: int, longest: int, room: int, sample: bool) -> DecodingState:
        """Tensors that stay, for the whole context if it is short, else for the next power of two positions."""
        context = self.model.config.max_position_embeddings
        most = context if context <= SHORT_CONTEXT else min(power_of_two(max(longest, SHORT_CONTEXT)), context)
        # Never full, so that the visible prefix is always shorter.
        capacity = round_up(most + room) + BUCKET
        key = (num_rows, capacity, sample)
        if key not in self.states:
            device = token_device(self.model)
            bucket = power_of_two if device.type == "cuda" else round_up
            cache = PositionAddressedCache(self.model.config.num_hidden_layers, capacity, device, bucket)
            self.states[key] = new_state(cache, num_rows, sample)
        return self.states[key]


def verification_rule(config: GenerationConfig) -> VerificationRule:
    """Greedy decoding, or sampling with the config's filters."""
    if not config.sample:
        return GreedyRule()
    return SamplingRule(warpers(config.temperature, config.top_k, config.top_p))
