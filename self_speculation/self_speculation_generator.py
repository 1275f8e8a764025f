"""Self-speculative decoding (section 4.3 of the paper): the first E layers draft, the others verify, one KV cache.

The step itself is `decoding/step.py`. E and d stay what is given, or are chosen at every step (`decoding/policy.py`).
"""

import dataclasses
import statistics
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from self_speculation.advice import Recommendation, advice_for
from self_speculation.decoding.acceptance_estimate import MEASURED_DRAFTS, Acceptance
from self_speculation.decoding.adaptive_step import AdaptiveStep, letting_adapter_wait
from self_speculation.decoding.cell import DRAFTS
from self_speculation.decoding.compiled_menu import CompiledMenu
from self_speculation.decoding.confidence import MOST_LOOKING, ConfidentRule, look_seconds
from self_speculation.decoding.draft_head import DraftHeads
from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.decoding.free_passes import takes_free_drafts
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.session import EagerStep, Step
from self_speculation.decoding.step import StepPlan
from self_speculation.decoding.step_costs import StepCosts, step_costs
from self_speculation.decoding.verification import GreedyRule
from self_speculation.exit_adapter import adapter_of, exit_adapter
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
    over, that is asked for once. An exit adapter drafts at its own exit only: with one, E stays, and d is chosen. So it
    is with steps that torch compiles. Another `policy` may choose: it gets the seconds of every cell, the exit to begin
    with, and what is known of exits.
    """

    compiled_step = CompiledMenu
    chooses = ("exit_layer", "num_speculations")
    # Choices depend on measured times. So Leviathan's rule would draw another answer from the same seed.
    sampling = "coupled"

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Callable[..., Policy] = Policy,
        backend: str | Callable[..., Any] | None = None,
        advice: Recommendation | None = None,
    ) -> None:
        super().__init__(model, backend)
        self.policy = policy
        self.given_advice = advice
        self.costs: dict[tuple[Hashable, ...], StepCosts] = {}
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
        adapter = adapter_of(self.model)
        return (config.exit_layer or self.advice.exit_layer) if adapter is None else adapter.exit_layer

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
        """Measure what steps cost, and compile them, if that is asked for."""
        self._step(request, self.plan(request.config))

    def _step(self, request: GenerationRequest, plan: StepPlan) -> Step:
        step, config = super()._step(request, plan), request.config
        exits = self._exits(step, config)
        own = exits[plan.exit_layer]
        seconds = self._costs(exits, _resting(own, request), config).after(_middle(request))
        policy = self.policy(seconds, plan.exit_layer, known=self._known_of(exits))
        if config.policy_memory == "run":
            self.learnt = policy = policy.taught_by(self.learnt)
        if self._may_stop(policy, step, config):
            exits = {exit_layer: _with_rule(one, ConfidentRule(step.passes.rule)) for exit_layer, one in exits.items()}
        # Another one: in the one that was timed states wait.
        return AdaptiveStep(exits, _resting(own, request), policy)

    def _exits(self, step: Step, config: GenerationConfig) -> dict[int, Step]:
        """A step for each exit to choose; where each takes minutes to compile, for the one to begin with."""
        plan = step.passes.plan
        if not isinstance(step, EagerStep):
            return {plan.exit_layer: step}
        plans = {
            exit_layer: dataclasses.replace(plan, exit_layer=exit_layer)
            for exit_layer in self.exit_layers(config, plan)
        }
        return {
            exit_layer: dataclasses.replace(step, passes=dataclasses.replace(step.passes, plan=own))
            for exit_layer, own in plans.items()
        }

    def _costs(self, exits: dict[int, Step], resting: Step, config: GenerationConfig) -> StepCosts:
        """What steps cost: measured once for requests like this one."""
        passes, lengths = exits[resting.passes.plan.exit_layer].passes, self.draft_lengths(config)
        how = (resting.is_fixed and config.compile, type(passes.kernels), type(resting.passes.kernels), config.sample)
        key = (len(resting.rows.lengths_B), *exits, lengths, passes.plan.draft_head, *how)
        if key not in self.costs:
            with Console(stderr=True).status("Timing steps, to choose among them …"):
                self.costs[key] = step_costs(exits, resting, lengths)
        return self.costs[key]

    def _may_stop(self, policy: Policy, step: Step, config: GenerationConfig) -> bool:
        """Whether drafts may stop: of one row, of open length, where looking how sure they are costs little."""
        may = policy.stops and isinstance(step, EagerStep) and len(self.draft_lengths(config)) > 2
        is_near = takes_free_drafts(step.rows) and step.rows.lengths_B.device.type == "cpu"
        return may and is_near and self.look_seconds <= MOST_LOOKING * policy.draft_seconds(policy.first)

    def _known_of(self, exits: Iterable[int]) -> dict[int, Acceptance]:
        """What the checkpoint says of exits."""
        said = self.advice.acceptance
        return {
            exit_layer: Acceptance(said[exit_layer], weight=MEASURED_DRAFTS)
            for exit_layer in exits
            if exit_layer in said
        }


def _middle(request: GenerationRequest) -> float:
    """How many tokens a row has in the middle of its answer, by the mean of the prompts."""
    return statistics.mean(map(len, request.prompts)) + request.config.max_new_tokens / 2


def _resting(step: Step, request: GenerationRequest) -> Step:
    """The step without drafts. Of one prompt, an exit adapter waits; a conversation's tokens are read once only."""
    is_alone = len(request.prompts) == 1 and not request.continues
    return letting_adapter_wait(step) if isinstance(step, EagerStep) and is_alone else step


def _with_rule(step: Step, rule: ConfidentRule) -> EagerStep:
    return EagerStep(dataclasses.replace(step.passes, rule=rule), step.rows)


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
