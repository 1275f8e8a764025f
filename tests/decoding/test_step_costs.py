"""What a policy believes that steps cost."""

from collections.abc import Callable
from functools import partial

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.decoding import step_costs
from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.free_passes import FreePasses
from self_speculation.decoding.step_costs import NEAR, StepCosts, evened_out
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import AdaptiveStrategy

CONTEXT = 256


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        ({1: 2.0, 2: 3.0, 3: 4.0}, {1: 2.0, 2: 3.0, 3: 4.0, 5: 6.0}),
        ({1: 2.0, 2: 3.2, 3: 3.8}, {1: 2.1, 2: 3.0, 3: 3.9, 5: 5.7}),
        # Other work slowed the last one: the line would begin below zero.
        ({1: 1.0, 2: 1.0, 3: 1.0, 8: 30.0}, {1: 1.0, 2: 1.5, 8: 28.5}),
    ],
    ids=["a line", "noise", "a slow one"],
)
def test_costs_are_evened_out(timed: dict[int, float], expected: dict[int, float]) -> None:
    line = evened_out(timed)
    assert {drafts: line(drafts) for drafts in expected} == pytest.approx(expected, abs=0.05)


def linear(exit_layer: int, drafts: int, context: int) -> float:
    """Seconds of a made-up machine, where exits and verification read the context at costs of their own."""
    own = 0 if exit_layer == FREE else exit_layer
    return 30 + 0.2 * context + drafts * (1 + 2 * own) * (1 + 0.01 * context)


def test_costs_grow_with_the_context(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timed at the ends, known for every exit, length and context."""
    timed = set()

    def seconds(step: partial[object]) -> float:
        passes, rows, drafts = step.args
        step()
        exit_layer = FREE if isinstance(passes, FreePasses) else passes.plan.exit_layer
        timed.add((exit_layer if drafts else None, drafts, int(rows.lengths_B[0])))
        return linear(exit_layer, drafts, int(rows.lengths_B[0]))

    monkeypatch.setattr(step_costs, "_seconds", seconds)
    strategy = AdaptiveStrategy(make_model(max_position_embeddings=CONTEXT))
    request = HuggingfaceLlamaGenerator(tokenizer, strategy).request(
        [[5] * 60], GenerationConfig(max_new_tokens=80, sample=False, exit_layer=2)
    )
    session = strategy.begin(request)
    [costs] = strategy.costs.values()
    assert costs.context == CONTEXT - 10
    assert {length for *_, length in timed} == {NEAR, costs.context}
    assert {exit_layer for exit_layer, *_ in timed} == {None, FREE, 1, 3}
    for length in (NEAR, 100, costs.context, 1000):
        expected = {cell: linear(*cell, length) for cell in costs.near}
        assert costs.after(length) == pytest.approx(expected)
    assert session.step.policy.seconds == costs.after(60 + 40)


def test_more_context_costs_no_less() -> None:
    """Whatever other work did meanwhile."""
    cells = Cell(2, 0), Cell(2, 4)
    costs = StepCosts(dict(zip(cells, (1.0, 3.0), strict=True)), dict(zip(cells, (2.0, 2.0), strict=True)), 102)
    assert costs.after(52) == dict(zip(cells, (1.5, 3.0), strict=True))


def test_many_rows_are_timed_after_fewer_tokens(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_costs, "MOST_HELD", 300)
    strategy = AdaptiveStrategy(make_model())
    config = GenerationConfig(max_new_tokens=4, sample=False, exit_layer=2)
    for num_rows in (1, 2, 3):
        strategy.begin(HuggingfaceLlamaGenerator(tokenizer, strategy).request([[5, 6]] * num_rows, config))
    contexts = {key[0]: costs.context for key, costs in strategy.costs.items() if costs.far is not costs.near}
    assert contexts == {1: 246, 2: 150}
