"""Self-speculative decoding (section 4.3 of the paper): the first E layers draft, the others verify, one KV cache.

The step itself is `decoding/step.py`.
"""

from collections.abc import Callable
from typing import Any

from transformers import LlamaForCausalLM

from self_speculation.decoding.draft_head import DraftHeads
from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.decoding.step import StepPlan
from self_speculation.exit_adapter import exit_adapter
from self_speculation.generator_base import GenerationConfig
from self_speculation.stepwise_strategy import StepwiseStrategy


class SelfSpeculativeStrategy(StepwiseStrategy):
    """Drafts with the layers below `config.exit_layer`, verifies with the rest; the output is the full model's."""

    uses = ("exit_layer", "num_speculations", "draft_vocab")

    def __init__(self, model: LlamaForCausalLM, backend: str | Callable[..., Any] | None = None) -> None:
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
