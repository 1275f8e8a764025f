"""Autoregressive decoding: a step with an empty draft. With fewer than all layers it is early exit (section 4.2)."""

from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.decoding.step import StepPlan
from self_speculation.generator_base import GenerationConfig
from self_speculation.stepwise_strategy import StepwiseStrategy


class AutoregressiveStrategy(StepwiseStrategy):
    """One token a step from all layers, whatever `config.exit_layer` says."""

    def plan(self, config: GenerationConfig) -> StepPlan:
        """All layers read the pending token, and nothing is drafted."""
        num_layers = self.model.config.num_hidden_layers
        return StepPlan(num_layers, 0, num_layers)


class EarlyExitStrategy(StepwiseStrategy):
    """One token a step from the first `config.exit_layer` layers: cheaper, and not the full model's output."""

    uses = ("exit_layer",)

    def plan(self, config: GenerationConfig) -> StepPlan:
        """Layers [0, E) read the pending token, and nothing is drafted or verified."""
        exit_layer = check_exit_layer(config.exit_layer, self.model)
        return StepPlan(exit_layer, 0, exit_layer)
