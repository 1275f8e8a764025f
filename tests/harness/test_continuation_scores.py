"""Scores of continuations at every exit layer, against transformers' own hidden states."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from self_speculation.harness.continuation_scores import ScoredText, score_continuations

TEXTS = [
    ScoredText((0, 5, 9, 17, 30, 42), [(30, 42, 7)]),
    ScoredText((0, 8), [(8, 11), (12,)]),
    ScoredText((3,), [(4,)]),
]
LAYERS = range(1, 7)


@torch.inference_mode()
def expected(model: LlamaForCausalLM, text: ScoredText, exit_layer: int) -> list[tuple[float, bool]]:
    """One text alone, from the hidden states that transformers gives out."""
    hidden_states = model.model(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states
    hidden_TD = hidden_states[exit_layer][0]
    normed_TD = hidden_TD if exit_layer == len(hidden_states) - 1 else model.model.norm(hidden_TD)
    log_p_TV = model.lm_head(normed_TD).log_softmax(-1)
    scores = []
    for continuation in text.continuations:
        own_TV = log_p_TV[len(log_p_TV) - len(continuation) :]
        picked = [own_V[token].item() for own_V, token in zip(own_TV, continuation, strict=True)]
        scores.append((sum(picked), own_TV.argmax(-1).tolist() == list(continuation)))
    return scores


@pytest.mark.parametrize("chunk_logits", [2**22, 1])
def test_scores_are_those_of_transformers_hidden_states(model: LlamaForCausalLM, chunk_logits: int) -> None:
    every = score_continuations(model, TEXTS, LAYERS, chunk_logits=chunk_logits)
    for exit_layer, scores in zip(LAYERS, every, strict=True):
        wanted = [score for text in TEXTS for score in expected(model, text, exit_layer)]
        assert [score.log_likelihood for score in scores] == pytest.approx([score[0] for score in wanted], rel=1e-6)
        assert [score.is_greedy for score in scores] == [score[1] for score in wanted]


def test_weights_that_were_replaced_are_read_anew(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    before = score_continuations(model, TEXTS, [6])
    for weight in model.model.layers.parameters():
        weight.data = weight.data * 1.5
    after = score_continuations(model, TEXTS, [6])
    assert after != before
    assert after == score_continuations(copy.deepcopy(model), TEXTS, [6])


def test_greedy_continuations_are_recognised(model: LlamaForCausalLM) -> None:
    for exit_layer in (2, 6):
        tokens = [0, 5, 9]
        for _ in range(3):
            every = ScoredText(tuple(tokens), [(token,) for token in range(300)])
            scores = [score.log_likelihood for score in score_continuations(model, [every], [exit_layer])[0]]
            tokens.append(scores.index(max(scores)))
        good, bad = tuple(tokens[3:]), (*tokens[3:5], (tokens[5] + 1) % 300)
        scores = score_continuations(model, [ScoredText(tuple(tokens[:-1]), [good, bad])], [exit_layer])[0]
        assert [score.is_greedy for score in scores] == [True, False]


def test_one_pass_serves_all_exits_and_the_head_sees_scored_positions_only(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model()
    layer_calls, head_rows = [], []
    hooks = [layer.register_forward_hook(lambda *_: layer_calls.append(1)) for layer in model.model.layers]
    hooks.append(model.lm_head.register_forward_hook(lambda _, given, __: head_rows.append(given[0].shape[0])))
    score_continuations(model, TEXTS, [2, 3, 5])
    for hook in hooks:
        hook.remove()
    assert len(layer_calls) == 5
    assert head_rows == [7, 7, 7]
