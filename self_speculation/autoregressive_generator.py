"""Autoregressive decoding: a step with an empty draft. With fewer than all layers it is early exit (section 4.2).

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.decoding.compilation import CompiledStep, Run, run_eagerly
from self_speculation.decoding.early_exit import forward_early
from self_speculation.decoding.rows import DecodingState, prefill
from self_speculation.decoding.session import Decoding, DecodingStrategy
from self_speculation.decoding.verification import Draft
from self_speculation.generator_base import GenerationConfig, GenerationRequest, GenerationStep, check_exit_layer


class AutoregressiveStrategy(DecodingStrategy):
    """One token a step from all layers, whatever `config.exit_layer` says."""

    def num_layers(self, config: GenerationConfig) -> int:
        """How many layers choose the tokens."""
        return self.model.config.num_hidden_layers

    def prepare(self, request: GenerationRequest) -> None:
        """Compile the step, if that is asked for."""
        self._compiled(request)

    @torch.inference_mode()
    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """Prefill, then one token of every row a step."""
        num_layers = self.num_layers(request.config)
        decoding = Decoding(self.model, request, 0, self._compiled(request))
        prefill(self.model, decoding.state, num_layers, request.config.prefill_chunk)
        yield decoding.prefilled()
        while decoding.is_active:
            decoding.begin_step(0)
            yield decoding.record(decoding.run(autoregressive_step, num_layers))

    @torch.inference_mode()
    def _compiled(self, request: GenerationRequest) -> CompiledStep | None:
        return self.compiled_step(request, 0, autoregressive_step, self.num_layers(request.config))


class EarlyExitStrategy(AutoregressiveStrategy):
    """One token a step from the first `config.exit_layer` layers: cheaper, and not the full model's output."""

    uses = ("exit_layer",)

    def num_layers(self, config: GenerationConfig) -> int:
        """E."""
        return check_exit_layer(config.exit_layer, self.model)


def autoregressive_step(
    model: LlamaForCausalLM, state: DecodingState, exit_layer: int, run: Run = run_eagerly
) -> Tensor:
    """One token by layers [0, E), a pure function of tensors; returns what `DecodingState.commit` does."""
    return run(choose_token, model, state, exit_layer)


def choose_token(model: LlamaForCausalLM, state: DecodingState, exit_layer: int) -> Tensor:
    """Read the pending token with layers [0, E) and choose the next; returns what `DecodingState.commit` does."""
    position_B1 = state.positions(0, 1)
    hidden_B1D = forward_early(model, state.read(position_B1), position_B1, state.cache, exit_layer)
    logits_B1V = state.logits(model, hidden_B1D, position_B1)
    no_draft = Draft(state.read(position_B1[:, :0]), [], state.draft_lengths(0))
    return state.commit(no_draft, state.rule.verify(no_draft, logits_B1V, state.noise(position_B1 + 1)))
