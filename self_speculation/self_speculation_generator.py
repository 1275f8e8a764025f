"""Self-speculative decoding (section 4.3 of the paper): the first E layers draft, the others verify, one KV cache.

Shapes: B batch, T = d+1 verified positions, d drafted tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.decoding.compilation import CompiledStep, Run, run_eagerly
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.early_exit import forward_early, forward_remainder
from self_speculation.decoding.rows import DecodingState, prefill
from self_speculation.decoding.session import Decoding, DecodingStrategy
from self_speculation.decoding.verification import Draft
from self_speculation.generator_base import GenerationConfig, GenerationRequest, GenerationStep, check_exit_layer

# What a drafted token leaves behind: its exit state (B, 1, D), and the q (B, 1, V) that the next one was drawn from.
Drafted = tuple[Tensor, Tensor | None]


class SelfSpeculativeStrategy(DecodingStrategy):
    """Drafts with the layers below `config.exit_layer`, verifies with the rest; the output is the full model's."""

    uses = ("exit_layer", "num_speculations")
    draft_head: DraftHead | None = None

    def prepare(self, request: GenerationRequest) -> None:
        """Compile the step, if that is asked for."""
        self._compiled(request)

    @torch.inference_mode()
    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """Prefill, then a draft of d tokens and its verification a step."""
        exit_layer, num_speculations, draft_head = self._sizes(request.config)
        decoding = Decoding(self.model, request, num_speculations, self._compiled(request))
        prefill(self.model, decoding.state, self.model.config.num_hidden_layers, request.config.prefill_chunk)
        yield decoding.prefilled()
        while decoding.is_active:
            num_drafted = decoding.begin_step(num_speculations)
            yield decoding.record(decoding.run(speculative_step, exit_layer, num_drafted, draft_head))

    def _sizes(self, config: GenerationConfig) -> tuple[int, int, DraftHead | None]:
        """E, d and the head that drafts, checked."""
        if config.num_speculations is None:
            raise ValueError("Self-speculative decoding needs --num_speculations.")
        exit_layer = check_exit_layer(config.exit_layer, self.model)
        if config.draft_vocab is None:
            self.draft_head = None
        elif self.draft_head is None or not self.draft_head.is_of(self.model, config.draft_vocab):
            self.draft_head = DraftHead.of(self.model, config.draft_vocab)
        return exit_layer, config.num_speculations, self.draft_head

    @torch.inference_mode()
    def _compiled(self, request: GenerationRequest) -> CompiledStep | None:
        sizes = self._sizes(request.config)
        return self.compiled_step(request, sizes[1], speculative_step, *sizes)


def speculative_step(
    model: LlamaForCausalLM,
    state: DecodingState,
    exit_layer: int,
    num_speculations: int,
    draft_head: DraftHead | None = None,
    run: Run = run_eagerly,
) -> Tensor:
    """One draft and its verification, a pure function of tensors; returns what `DecodingState.commit` does."""
    drafted = [
        run(draft_token, model, state, index, exit_layer, draft_head)
        for index in state.cache.positions_C[:num_speculations]
    ]
    return run(verify, model, state, exit_layer, drafted)


def draft_token(
    model: LlamaForCausalLM, state: DecodingState, index: Tensor, exit_layer: int, draft_head: DraftHead | None = None
) -> Drafted:
    """Layers [0, E) read the token that stands `index` (a scalar) places after the pending one, and draft the next."""
    position_B1 = state.positions(index, 1)
    exit_state_B1D = forward_early(model, state.read(position_B1), position_B1, state.cache, exit_layer)
    logits_B1V = state.logits(model, exit_state_B1D, position_B1, draft_head)
    token_B1, q_B1V = state.rule.propose(logits_B1V, state.noise(position_B1 + 1))
    state.write(position_B1 + 1, token_B1)
    return exit_state_B1D, q_B1V


def verify(model: LlamaForCausalLM, state: DecodingState, exit_layer: int, drafted: list[Drafted]) -> Tensor:
    """Layers [E, L) catch up on the exit states in one pass; the draft is judged by the full model's logits.

    The last drafted token has no exit state yet: layers [0, E) read it first. Returns what `DecodingState.commit` does.
    """
    num_speculations = len(drafted)
    last_B1, positions_BT = state.positions(num_speculations, 1), state.positions(0, num_speculations + 1)
    last_state_B1D = forward_early(model, state.read(last_B1), last_B1, state.cache, exit_layer)
    exit_states_BTD = torch.cat([*(exit_state_B1D for exit_state_B1D, _ in drafted), last_state_B1D], dim=1)
    hidden_BTD = forward_remainder(model, exit_states_BTD, positions_BT, state.cache, exit_layer)
    logits_BTV = state.logits(model, hidden_BTD, positions_BT)
    draft = Draft(
        state.read(positions_BT[:, 1:]), [q_B1V for _, q_B1V in drafted], state.draft_lengths(num_speculations)
    )
    return state.commit(draft, state.rule.verify(draft, logits_BTV, state.noise(positions_BT + 1)))
