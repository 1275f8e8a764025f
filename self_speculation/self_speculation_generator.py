"""Self-speculative decoding (section 4.3 of the paper): the first E layers draft, the others verify, one KV cache.

The step itself is `decoding/step.py`. E and d stay what is given, or are chosen at every step (`decoding/policy.py`).
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from self_speculation.advice import Recommendation, advice_for
from self_speculation.decoding.adaptive_step import DRAFTS, AdaptiveStep, resting, step_seconds, takes_free_drafts
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.confidence import MOST_LOOKING, ConfidentRule, look_seconds
from self_speculation.decoding.draft_head import DraftHeads
from self_speculation.decoding.early_exit import TorchKernels, check_exit_layer
from self_speculation.decoding.kernels import Kernels
from self_speculation.decoding.policy import MEASURED_DRAFTS, Acceptance, Policy
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.session import Step
from self_speculation.decoding.step import EagerPasses, StepPlan
from self_speculation.decoding.verification import GreedyRule
from self_speculation.exit_adapter import ExitAdapter, exit_adapter
from self_speculation.generator_base import GenerationConfig, GenerationRequest
from self_speculation.settings import AUTO
from self_speculation.stepwise_strategy import StepwiseStrategy

# Exits to choose from, as shares of the layers, beside the one to begin with, where a checkpoint names none.
SHARES = (1 / 8, 1 / 4, 1 / 2)


class SelfSpeculativeStrategy(StepwiseStrategy):
    """Drafts with the layers below `config.exit_layer`, verifies with the rest; the output is the full model's."""

    uses = ("exit_layer", "num_speculations", "draft_vocab")

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] | None = None) -> None:
        super().__init__(model, backend)
        self.draft_heads = DraftHeads(model)

    def plan(self, config: GenerationConfig) -> StepPlan:
        """Layers [0, E) draft d tokens, with the exit adapter that the model may have there; layers [E, L) verify."""
        if config.num_speculations is None:
            raise ValueError("Self-speculative decoding needs --num_speculations.")
        exit_layer = check_exit_layer(config.exit_layer, self.model)
        draft_head = None if config.draft_vocab is None else self.draft_heads.get(config.draft_vocab)
        num_layers = self.model.config.num_hidden_layers
        adapter = exit_adapter(self.model, exit_layer)
        return StepPlan(exit_layer, config.num_speculations, num_layers, draft_head, adapter)


class AdaptiveStrategy(SelfSpeculativeStrategy):
    """Begins at the given exit layer, or the recommended one, and goes where counts and the measured seconds lead.

    What it chooses from, and what it expects of an exit, a checkpoint may say (`advice.py`): where nothing is handed
    over, that is asked for once. An exit adapter drafts at its own exit only: with one, E stays, and d is chosen.
    Another `policy` may choose: it gets the seconds of every cell, the exit to begin with, and what is known of exits.
    """

    chooses = ("exit_layer", "num_speculations")
    # Choices depend on measured times. So Leviathan's rule would draw another answer from the same seed.
    sampling = "coupled"

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Callable[..., Policy] = Policy,
        advice: Recommendation | None = None,
    ) -> None:
        super().__init__(model)
        self.policy = policy
        self.given_advice = advice
        self.seconds: dict[tuple[Hashable, ...], dict[Cell, float]] = {}
        self.look_seconds = look_seconds(GreedyRule(), model.config.vocab_size, model.dtype)
        self.learnt: Policy | None = None

    @cached_property
    def advice(self) -> Recommendation:
        """What is recommended for the model."""
        return self.given_advice or advice_for(self.model)

    def drafting(self, config: GenerationConfig) -> dict[str, int | str | None]:
        """E and d as results tell them: both are chosen, wherever it begins."""
        return dict.fromkeys(self.chooses, AUTO)

    def plan(self, config: GenerationConfig) -> StepPlan:
        """The cut at the exit to begin with; room for the longest draft."""
        longest = max(self.draft_lengths(config))
        return super().plan(dataclasses.replace(config, exit_layer=self.first_exit(config), num_speculations=longest))

    def first_exit(self, config: GenerationConfig) -> int:
        """The exit to begin with."""
        adapters = (module for module in self.model.children() if isinstance(module, ExitAdapter))
        return next((adapter.exit_layer for adapter in adapters), config.exit_layer or self.advice.exit_layer)

    def exit_layers(self, config: GenerationConfig, plan: StepPlan) -> list[int]:
        """The exits to choose from, from the first layers on."""
        if plan.adapter is not None:
            return [plan.exit_layer]
        others = self.advice.exit_layers or {max(1, round(share * plan.num_layers)) for share in SHARES}
        return sorted({plan.exit_layer, *others} - {plan.num_layers} or {plan.exit_layer})

    def draft_lengths(self, config: GenerationConfig) -> tuple[int, ...]:
        """The draft lengths to choose from, 0 the first of them."""
        return self.advice.draft_lengths or DRAFTS

    def prepare(self, request: GenerationRequest) -> None:
        """Measure what steps cost."""
        self._step(request, self.plan(request.config))

    def kernels(self, config: GenerationConfig) -> Kernels:
        """What runs the passes: of every exit, and of drafts of every length."""
        kernels = super().kernels(config)
        if config.compile != "none" and isinstance(kernels, TorchKernels):
            raise ValueError(
                "--generation_strategy adaptive: torch's compiled steps have a fixed E and d; --compile none."
            )
        return kernels

    def _step(self, request: GenerationRequest, plan: StepPlan) -> Step:
        config, step = request.config, super()._step(request, plan)
        lengths = self.draft_lengths(config)
        exits = {
            exit_layer: dataclasses.replace(step.passes, plan=dataclasses.replace(plan, exit_layer=exit_layer))
            for exit_layer in self.exit_layers(config, plan)
        }
        # A conversation's tokens are read once, so nothing may have missed them.
        is_alone = len(request.prompts) == 1 and not request.continues
        without_drafts = resting(exits[plan.exit_layer]) if is_alone else exits[plan.exit_layer]
        seconds = self._seconds(exits, without_drafts, request)
        policy = self.policy(seconds, plan.exit_layer, known=self._known_of(exits))
        if config.policy_memory == "run":
            self.learnt = policy = policy.taught_by(self.learnt)
        if self._may_stop(policy, step.rows):
            rule = ConfidentRule(step.passes.rule)
            exits = {exit_layer: dataclasses.replace(passes, rule=rule) for exit_layer, passes in exits.items()}
        return AdaptiveStep(exits, without_drafts, step.rows, policy)

    def _seconds(
        self, exits: dict[int, EagerPasses], without_drafts: EagerPasses, request: GenerationRequest
    ) -> dict[Cell, float]:
        """What steps cost: measured once for requests like this one."""
        plan, kernels, num_rows, sample = (
            without_drafts.plan,
            without_drafts.kernels,
            request.num_rows,
            request.config.sample,
        )
        key = (num_rows, *exits, plan.draft_head, type(kernels), type(exits[plan.exit_layer].kernels), sample)
        if key not in self.seconds:
            self.seconds[key] = step_seconds(
                exits, without_drafts, num_rows, sample, self.draft_lengths(request.config)
            )
        return self.seconds[key]

    def _may_stop(self, policy: Policy, rows: Rows) -> bool:
        """Whether drafts may stop: those of one row, where looking how sure they are costs little."""
        is_cheap = self.look_seconds <= MOST_LOOKING * policy.draft_seconds(policy.first)
        return policy.stops and is_cheap and takes_free_drafts(rows) and rows.lengths_B.device.type == "cpu"

    def _known_of(self, exits: Iterable[int]) -> dict[int, Acceptance]:
        """What the checkpoint says of exits."""
        said = self.advice.acceptance
        return {
            exit_layer: Acceptance(said[exit_layer], weight=MEASURED_DRAFTS)
            for exit_layer in exits
            if exit_layer in said
        }


class OpenStrategy(AdaptiveStrategy):
    """Self-speculative decoding where E or d is left open: what is given stays, and the rest is chosen.

    With E given, that exit drafts, an exit adapter there or none; with d given, a draft has so many tokens, or there is
    none. Drafts that cost nothing are at most as long.
    """

    def drafting(self, config: GenerationConfig) -> dict[str, int | str | None]:
        """E and d as results tell them: given, or `auto`."""
        return {name: getattr(config, name) or AUTO for name in self.chooses}

    def first_exit(self, config: GenerationConfig) -> int:
        """The exit that is given, or else to begin with."""
        return config.exit_layer or super().first_exit(config)

    def exit_layers(self, config: GenerationConfig, plan: StepPlan) -> list[int]:
        """The exit that is given, or those to choose from."""
        return super().exit_layers(config, plan) if config.exit_layer is None else [plan.exit_layer]

    def draft_lengths(self, config: GenerationConfig) -> tuple[int, ...]:
        """None and the length that is given, or those to choose from."""
        return super().draft_lengths(config) if config.num_speculations is None else (0, config.num_speculations)
