"""Tokens a second at every (E, d), predicted: how many steps an answer takes, times what a step costs.

The steps follow from one teacher-forced pass over a few answers of the full model, which tells for every exit layer
at every position whether its draft would be accepted. The cost of a step is that of its passes, each timed by itself:
d drafted tokens, and a verification.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, E exit layers, N tokens of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.cache import Uncached
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.early_exit import forward_adapter, forward_exits, head_logits
from self_speculation.decoding.fused_layers import fuse
from self_speculation.decoding.sampling import noise, probabilities, process_logits, warpers
from self_speculation.exit_adapter import exit_adapter
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationResult,
    HuggingfaceLlamaGenerator,
)
from self_speculation.measuring.acceptance import step_counts
from self_speculation.measuring.pass_costs import PassCosts
from self_speculation.stepwise_strategy import verification_rule


@dataclass(frozen=True)
class Profile:
    """An answer of the full model: how long it might have been, and how each exit would have drafted it, (E, N)."""

    result: GenerationResult
    limit: int
    chances_EN: NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """What to expect of one cell of the grid, end to end."""

    exit_layer: int
    num_speculations: int
    tokens_per_second: float
    acceptance_rate: float
    tokens_per_step: float

    @property
    def cell(self) -> Cell:
        """Its place in the grid."""
        return Cell(self.exit_layer, self.num_speculations)


def profile(
    generator: HuggingfaceLlamaGenerator, config: GenerationConfig, prompt: str | list[int], exit_layers: list[int]
) -> Profile:
    """Answer a prompt with the generator's strategy, the full model's, and see what each exit would have drafted."""
    tokens = generator.encode(prompt)
    request = generator.request([tokens], config)
    [result] = generator.generate([tokens], config)
    chances_EN = acceptance_chances(generator.model, request, result.tokens, exit_layers)
    context = generator.model.config.max_position_embeddings
    return Profile(result, min(config.max_new_tokens, context - len(tokens)), chances_EN)


@torch.inference_mode()
def acceptance_chances(
    model: PreTrainedModel, request: GenerationRequest, tokens: list[int], exit_layers: list[int]
) -> NDArray[np.float64]:
    """How likely each token of the full model's answer is to be accepted as a draft of each exit layer, (E, N).

    Greedy, and coupled sampling: whether the exit's draft is the answer's token. Leviathan's sampling: the overlap
    Σ min(p, q). Exits draft with the tokens of `draft_vocab` alone, if it is set.
    """
    fuse(model)
    config = request.config
    draft_head = None if config.draft_vocab is None else DraftHead.of(model, config.draft_vocab)
    tokens_1T = torch.tensor([request.prompts[0] + tokens], device=model.device)
    first = len(request.prompts[0]) - 1
    positions_1N = torch.arange(first, first + len(tokens), device=model.device)[None]
    depths = range(1, model.config.num_hidden_layers + 1)
    states = [
        _read_by_head(model, depth, state_1TD)[:, first:-1]
        for depth, state_1TD in zip(depths, forward_exits(model, tokens_1T, depths), strict=True)
    ]

    def logits(depth: int, head: DraftHead | None = None) -> Tensor:
        normed_1ND = states[depth - 1]
        logits_1NV = head_logits(model, normed_1ND) if head is None else head.logits(normed_1ND)
        processors = request.all_processors()
        return process_logits(logits_1NV, processors, tokens_1T, positions_1N) if processors else logits_1NV

    if not config.sample or config.sampling == "coupled":
        rule = verification_rule(config)
        noise_1NS = noise(config.seed, request.row_keys, tokens_1T.shape[1])[:, first + 1 :].to(tokens_1T.device)
        drafts = [rule.propose(logits(exit_layer, draft_head), noise_1NS)[0] for exit_layer in exit_layers]
        return (torch.cat(drafts) == tokens_1T[:, first + 1 :]).double().cpu().numpy()
    filters = warpers(config.temperature, config.top_k, config.top_p)
    p_1NV = probabilities(logits(len(states)), filters)
    overlaps = [
        torch.minimum(p_1NV, probabilities(logits(layer, draft_head), filters)).sum(-1) for layer in exit_layers
    ]
    return torch.cat(overlaps).double().cpu().numpy()


def _read_by_head(model: PreTrainedModel, exit_layer: int, states_1TD: Tensor) -> Tensor:
    """What the LM head reads of an exit's states (1, T, D): behind the exit adapter there, or behind the final norm."""
    adapter = exit_adapter(model, exit_layer)
    if adapter is None:
        return model.model.norm(states_1TD)
    positions_1T = torch.arange(states_1TD.shape[1], device=states_1TD.device)[None]
    return forward_adapter(model, adapter, states_1TD, positions_1T, Uncached())


def predict(profiles: list[Profile], cells: Sequence[Cell], costs: PassCosts) -> list[Prediction]:
    """Every cell's tokens a second over the profiled answers; the profiles have the cells' exit layers in order."""
    rows = {exit_layer: row for row, exit_layer in enumerate(sorted({cell.exit_layer for cell in cells}))}
    counts = {
        drafts: [step_counts(one.chances_EN, drafts, one.limit) for one in profiles]
        for drafts in {cell.num_speculations for cell in cells}
    }
    num_tokens = sum(len(one.result.tokens) for one in profiles)
    prefill_seconds = sum(one.result.prefill_seconds for one in profiles)
    predictions = []
    for cell in cells:
        row, own = rows[cell.exit_layer], counts[cell.num_speculations]
        steps = sum(float(one.steps_E[row]) for one in own)
        drafted = sum(float(one.drafted_E[row]) for one in own)
        accepted = sum(float(one.accepted_E[row]) for one in own)
        seconds = prefill_seconds + costs.seconds(cell, steps, drafted)
        predictions.append(Prediction(*cell, num_tokens / seconds, accepted / max(drafted, 1), num_tokens / steps))
    return predictions
