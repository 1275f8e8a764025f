"""Self-speculative decoding (section 4.3 of the paper): the first E layers draft, the others verify, one KV cache.

The step itself is `decoding/step.py`. E and d stay what they are, or are chosen at every step (`decoding/policy.py`).
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from transformers import PreTrainedModel

from self_speculation.decoding.adaptive_step import DRAFTS, AdaptiveStep, step_seconds
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.draft_head import DraftHeads
from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.decoding.kernels import Kernels
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.session import Step
from self_speculation.decoding.step import StepPlan
from self_speculation.exit_adapter import ExitAdapter, exit_adapter
from self_speculation.generator_base import GenerationConfig, GenerationRequest
from self_speculation.stepwise_strategy import StepwiseStrategy

# Exits that adaptive decoding may choose, as shares of the layers, beside the one that is given or recommended.
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
    """Begins at `config.exit_layer`, and goes where its counts and the measured seconds of steps lead.

    An exit adapter drafts at its own exit only: with one, E stays, and d is chosen. Another `policy` may choose.
    """

    def __init__(self, model: PreTrainedModel, policy: Callable[[dict[Cell, float], int], Policy] = Policy) -> None:
        super().__init__(model)
        self.policy = policy
        self.seconds: dict[tuple[Hashable, ...], dict[Cell, float]] = {}
        self.learnt: Policy | None = None

    def plan(self, config: GenerationConfig) -> StepPlan:
        """The cut at the exit to begin with; room for the longest draft."""
        adapters = (module for module in self.model.children() if isinstance(module, ExitAdapter))
        exit_layer = next((adapter.exit_layer for adapter in adapters), config.exit_layer)
        return super().plan(dataclasses.replace(config, exit_layer=exit_layer, num_speculations=max(DRAFTS)))

    def prepare(self, request: GenerationRequest) -> None:
        """Measure what steps cost."""
        self._step(request, self.plan(request.config))

    def kernels(self, config: GenerationConfig) -> Kernels:
        """What runs the passes: of every exit, and of drafts of every length."""
        kernels = super().kernels(config)
        if config.compile != "none" and kernels.backend is not None:
            raise ValueError(
                "--generation_strategy adaptive: torch's compiled steps have a fixed E and d; --compile none."
            )
        return kernels

    def _step(self, request: GenerationRequest, plan: StepPlan) -> Step:
        step = super()._step(request, plan)
        exits = {
            exit_layer: dataclasses.replace(step.passes, plan=dataclasses.replace(plan, exit_layer=exit_layer))
            for exit_layer in self._exit_layers(plan)
        }
        key = (request.num_rows, *exits, plan.draft_head, type(step.passes.kernels), request.config.sample)
        if key not in self.seconds:
            self.seconds[key] = step_seconds(exits, request.num_rows, request.config.sample)
        policy = self.policy(self.seconds[key], plan.exit_layer)
        if request.config.policy_memory == "run":
            self.learnt = policy = policy.taught_by(self.learnt)
        return AdaptiveStep(exits, step.rows, policy)

    def _exit_layers(self, plan: StepPlan) -> list[int]:
        if plan.adapter is not None:
            return [plan.exit_layer]
        others = {max(1, round(share * plan.num_layers)) for share in SHARES}
        return sorted({plan.exit_layer, *others} - {plan.num_layers} or {plan.exit_layer})
