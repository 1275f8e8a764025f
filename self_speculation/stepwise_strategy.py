"""What our strategies have in common: the loop of steps, run as they are written, or compiled where that is asked for.

They differ in one thing, the plan: which layers draft how many tokens, and which verify.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from self_speculation.decoding.cache import PositionAddressedCache, power_of_two
from self_speculation.decoding.compilation import CompiledStep, CompiledSteps
from self_speculation.decoding.early_exit import TorchKernels, num_caches, token_device
from self_speculation.decoding.fused_layers import fuse, layout
from self_speculation.decoding.kernels import Kernels
from self_speculation.decoding.plain_llama import PlainLlamaKernels
from self_speculation.decoding.prefill import prefill
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import warpers
from self_speculation.decoding.session import EagerStep, Session, Step
from self_speculation.decoding.step import EagerPasses, StepPlan
from self_speculation.decoding.verification import CoupledRule, GreedyRule, SamplingRule, VerificationRule
from self_speculation.decoding.width_invariant import WidthInvariantKernels
from self_speculation.decoding.width_invariant_cuda import TritonKernels
from self_speculation.families import check_supported
from self_speculation.generator_base import GenerationConfig, GenerationRequest, GenerationStep, GenerationStrategy


class StepwiseStrategy(GenerationStrategy):
    """Decodes by steps that draft, verify and commit. A subclass writes `plan`.

    `backend` is torch.compile's, for steps that are compiled. A plain Llama on a CPU needs none, unless one is given:
    what is compiled for it is one library that runs its passes. One generation at a time.

    Raises:
        ValueError: the model cannot be cut at a layer.
    """

    keeps_batches_full = True
    compiled_step: type[CompiledStep] = CompiledStep

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] | None = None) -> None:
        check_supported(model)
        super().__init__(model)
        self.compiled_steps = CompiledSteps(model)
        self.backend = backend
        # The kernels of the last answer, and for what they were found.
        self.found: tuple[object, Kernels] | None = None
        # The rows of a conversation, and by which plan their tokens were cached.
        self.kept: Rows | None = None
        self.plan_of_kept: StepPlan | None = None

    @abstractmethod
    def plan(self, config: GenerationConfig) -> StepPlan:
        """How the model is cut for each step.

        Raises:
            ValueError: a setting that the strategy needs is missing, or the model does not have what it names.
        """

    def num_layers(self, config: GenerationConfig) -> int:
        """How many layers choose the tokens."""
        return self.plan(config).num_layers

    def prepare(self, request: GenerationRequest) -> None:
        """Compile the step, if that is asked for."""
        self._step(request, self.plan(request.config))

    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """Prefill, then step by step."""
        yield from self.begin(request).steps()

    @torch.inference_mode()
    def begin(self, request: GenerationRequest) -> Session:
        """Prefill the prompts; the session goes on from there."""
        plan, context = self.plan(request.config), self.model.config.max_position_embeddings
        step = self._step(request, plan)
        rows, limits = step.rows, request.limits(context)
        known = self._known(request, rows, plan)
        first = slice(request.num_rows)
        keys = request.row_keys[first] if request.config.sample else []
        rows.begin(request.prompts[first], limits[first], request.config.seed, keys)
        # Known at once, lest an interruption in the middle of the prefill makes all of it unknown.
        rows.known = known
        prefill(step.passes, rows, request.config.prefill_chunk, self.num_cached)
        if request.continues:
            rows.known = list(request.prompts[0])
        return Session(request, step, plan.num_speculations, context)

    def _known(self, request: GenerationRequest, rows: Rows, plan: StepPlan) -> list[int]:
        """What the prompt has in common with the conversation so far; notes how much of it is cached."""
        self.num_cached = 0
        if not request.continues:
            return []
        if self.kept is not None and self.kept is not rows:
            rows.take_over(self.kept)
        if plan != self.plan_of_kept:
            rows.known = []
        self.kept, self.plan_of_kept = rows, plan
        [prompt] = request.prompts
        self.num_cached = rows.num_cached(prompt)
        return prompt[: self.num_cached + 1]

    @torch.inference_mode()
    def _step(self, request: GenerationRequest, plan: StepPlan) -> Step:
        """The step over rows for the request. Logits processors are Python, row by row, and not compiled."""
        config, kernels = request.config, self.kernels(request.config)
        rule = verification_rule(config, self.sampling)
        passes = EagerPasses(self.model, plan, rule, request.all_processors(), kernels)
        if config.compile != "none" and kernels.backend is not None and not passes.processors:
            return self.compiled_steps.get(request, passes, self.backend or kernels.backend, self.compiled_step)
        return EagerStep(passes, self._rows(request, plan))

    def kernels(self, config: GenerationConfig) -> Kernels:
        """What runs the passes: kernels of our own where exactness is asked for, or compiling, and the model is plain.

        Raises:
            ValueError: exactness is asked for, and cannot be had.
        """
        own = own_kernels(self.model)
        replaces_compiling = config.compile != "none" and self.backend is None and own.backend is None
        asked = own, config.exact, replaces_compiling
        if self.found is None or self.found[0] != (asked, layout(self.model)):
            fuse(self.model)
            takes_own = config.exact or (replaces_compiling and own.why_not(self.model) is None)
            kernels = own.of(self.model) if takes_own else TorchKernels(self.model)
            self.found = (asked, layout(self.model)), kernels
        return self.found[1]

    def _rows(self, request: GenerationRequest, plan: StepPlan) -> Rows:
        """Rows for the request: a conversation's own while they have room, else new ones, of twice its size."""
        capacity = max(request.limits(self.model.config.max_position_embeddings)) + plan.num_speculations + 1
        if request.continues:
            if self.kept is not None and self.kept.cache.capacity >= capacity:
                return self.kept
            capacity = power_of_two(capacity)
        cache = PositionAddressedCache(num_caches(self.model), capacity, token_device(self.model))
        return Rows.empty(cache, request.num_rows, request.config.sample)


def own_kernels(model: PreTrainedModel) -> type[PlainLlamaKernels]:
    """Our own kernels for the device that the model begins on."""
    return TritonKernels if token_device(model).type == TritonKernels.device_type else WidthInvariantKernels


def verification_rule(
    config: GenerationConfig, otherwise: Literal["leviathan", "coupled"] = "leviathan"
) -> VerificationRule:
    """Greedy decoding, or sampling with the config's filters; by the other rule where the config names none."""
    if not config.sample:
        return GreedyRule()
    filters = warpers(config.temperature, config.top_k, config.top_p)
    return CoupledRule(filters) if (config.sampling or otherwise) == "coupled" else SamplingRule(filters)
