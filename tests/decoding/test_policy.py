"""The policy by literal tables, and decoding under it and under random choices: always the full model's tokens."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation import self_speculation_generator
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.policy import MOST_LOST, Acceptance, Policy
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import AdaptiveStrategy

MakeModel = Callable[..., LlamaForCausalLM]
LENGTHS = (1, 17, 64, 5)


def costs(*exit_layers: int, drafts: Sequence[int] = (0, 1, 2, 4, 8), layers: int = 10) -> dict[Cell, float]:
    """Seconds of a model whose verification costs what one token costs."""
    return {Cell(exit_layer, d): layers + d * (exit_layer + 0.5) for exit_layer in exit_layers for d in drafts}


def learn(policy: Policy, *steps: tuple[Cell, int]) -> Policy:
    for cell, accepted in steps:
        policy.observe(cell, [cell.num_speculations], [accepted])
    return policy


@pytest.mark.parametrize(
    ("history", "choice"),
    [
        ([], Cell(2, 2)),
        ([(Cell(2, 4), 4)] * 10, Cell(2, 8)),
        ([(Cell(2, 4), 3), (Cell(2, 4), 4)] * 10, Cell(2, 4)),
        ([(Cell(2, 4), 2), (Cell(2, 4), 3)] * 10, Cell(2, 2)),
        ([(Cell(2, 4), 1)] * 20, Cell(2, 1)),
        ([(Cell(2, 4), 0)] * 10, Cell(2, 0)),
        # The last ones count most.
        ([(Cell(2, 4), 4)] * 50 + [(Cell(2, 4), 0)] * 90, Cell(2, 0)),
        ([(Cell(2, 4), 0)] * 90 + [(Cell(2, 8), 8)] * 30, Cell(2, 8)),
    ],
)
def test_the_draft_length_follows_the_counts(history: list[tuple[Cell, int]], choice: Cell) -> None:
    policy = learn(Policy(costs(2), first=2), *history)
    policy.elapsed = 0.0
    assert policy.choose(8) == choice


def test_what_there_is_no_room_for_is_not_chosen() -> None:
    policy = learn(Policy(costs(2), first=2), *[(Cell(2, 8), 8)] * 10)
    assert [policy.choose(most).num_speculations for most in (8, 7, 3, 1, 0)] == [8, 4, 2, 1, 0]


def test_another_exit_is_found_and_kept() -> None:
    """Exit 2 drafts badly and exit 5 well."""
    policy = Policy(costs(2, 5), first=2)
    chosen = []
    for _ in range(600):
        cell = policy.choose(8)
        chosen.append(cell)
        policy.observe(cell, [cell.num_speculations], [cell.num_speculations if cell.exit_layer == 5 else 0])
    assert chosen[0].exit_layer == 2
    assert {cell.exit_layer for cell in chosen[-100:] if cell.num_speculations > 1} == {5}


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5, 0.9])
def test_it_is_hardly_slower_than_the_best_and_than_no_drafts(alpha: float) -> None:
    """Over 1,500 tokens of seconds that are counted: 3 % at most, whatever is accepted."""
    seconds, generator = costs(2, 4, 7), random.Random(1)

    def tokens_per_second(choose: Callable[[], Cell], observe: Callable[[Cell, int], None]) -> float:
        tokens, total = 0, 0.0
        while tokens < 1500:
            cell = choose()
            accepted = 0
            while accepted < cell.num_speculations and generator.random() < alpha:
                accepted += 1
            observe(cell, accepted)
            tokens, total = tokens + accepted + 1, total + seconds[cell]
        return tokens / total

    policy = Policy(seconds, first=4)
    own = tokens_per_second(
        lambda: policy.choose(8), lambda cell, accepted: policy.observe(cell, [cell.num_speculations], [accepted])
    )
    tau = {cell: sum(alpha**n for n in range(cell.num_speculations + 1)) for cell in seconds}
    assert own >= 0.97 / seconds[Cell(2, 0)]
    if alpha in (0.0, 0.05):
        assert policy.lost <= MOST_LOST * policy.elapsed
    assert own >= 0.9 * max(tau[cell] / seconds[cell] for cell in seconds if cell.exit_layer == 4)


def test_the_estimate_is_a_number_from_the_beginning() -> None:
    known = Acceptance(0.6)
    assert known.rate == pytest.approx(0.6)
    known.add(drafted=4, accepted=4)
    assert known.rate == pytest.approx((4 + 0.6 * 2) / (4 + 2))
    known.add(drafted=4, accepted=0)
    assert known.rate == pytest.approx((4 * 0.98 + 1.2) / (4 * 0.98 + 1 + 2))


# Decoding


class RandomPolicy(Policy):
    """Anything in the menu."""

    def choose(self, most_drafts: int) -> Cell:
        return random.choice([cell for cell in self.seconds if cell.num_speculations <= most_drafts])


@pytest.fixture
def answer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[int]]]:
    def answer(strategy: GenerationStrategy, prompts: list[list[int]], **fields: object) -> list[list[int]]:
        config = GenerationConfig(**{"max_new_tokens": 30, "sample": False, "exit_layer": 2} | fields)
        return [result.tokens for result in HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)]

    return answer


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("policy", [Policy, RandomPolicy])
@pytest.mark.parametrize("sampling", [{}, {"sample": True, "sampling": "coupled", "temperature": 1.3}], ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["torch", "exact"])
def test_answers_are_autoregressive_decodings(
    exact: bool,
    sampling: dict[str, object],
    policy: type[Policy],
    make_model: MakeModel,
    answer: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is chosen, alone and in ragged batches, up to the end of the context, and at stops within a draft."""
    random.seed(3)
    monkeypatch.setattr(self_speculation_generator, "Policy", policy)
    model = make_model()
    strategy, fields = AdaptiveStrategy(model), sampling | {"exact": exact}
    baseline = AutoregressiveStrategy(model)
    for prompts in (prompts_of(*LENGTHS), prompts_of(250), prompts_of(3)):
        expected = answer(baseline, prompts, **fields, exit_layer=None)
        for stops in ({}, {"stop_token_ids": [expected[0][min(9, len(expected[0]) - 1)]]}):
            expected = answer(baseline, prompts, **fields, **stops, exit_layer=None)
            assert answer(strategy, prompts, **fields, **stops) == expected
            assert answer(strategy, prompts, **fields, **stops, draft_vocab=150) == expected


def test_an_exit_adapter_keeps_up(
    make_model: MakeModel, answer: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has cached every token, also after steps without drafts: then a copy of the model drafts nothing wrong."""
    model = make_model(num_hidden_layers=3)
    adapter = ExitAdapter.of(model, 2).eval()
    expected = answer(AutoregressiveStrategy(model), prompts_of(5, 30), exit_layer=None)
    model.add_module(ATTRIBUTE, adapter)
    cells = []

    class Alternating(Policy):
        def choose(self, most_drafts: int) -> Cell:
            return Cell(2, min(len(cells) % 3, most_drafts))

        def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int]) -> None:
            cells.append(cell)
            assert list(drafted) == list(accepted)

    monkeypatch.setattr(self_speculation_generator, "Policy", Alternating)
    assert answer(AdaptiveStrategy(model), prompts_of(5, 30), exit_layer=1) == expected
    assert {cell.num_speculations for cell in cells} == {0, 1, 2}


def test_what_was_learnt_is_forgotten_unless_asked(
    make_model: MakeModel, answer: Callable[..., list[list[int]]]
) -> None:
    strategy = AdaptiveStrategy(make_model())
    answer(strategy, prompts_of(9))
    assert strategy.learnt is None
    answer(strategy, prompts_of(9), policy_memory="run")
    elapsed = strategy.learnt.elapsed
    assert elapsed > 0
    answer(strategy, prompts_of(9), policy_memory="run")
    assert strategy.learnt.elapsed > elapsed


def test_steps_are_timed_once(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    strategy = AdaptiveStrategy(make_model())
    for prompts in (prompts_of(9), prompts_of(20), prompts_of(1, 2)):
        answer(strategy, prompts)
    assert len(strategy.seconds) == 2
    assert all(seconds > 0 for menu in strategy.seconds.values() for seconds in menu.values())
    assert {cell.exit_layer for cell in next(iter(strategy.seconds.values()))} == {1, 2, 3}


def test_compiled_steps_are_refused(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    with pytest.raises(ValueError, match=r"--generation_strategy adaptive: .* --compile none"):
        answer(AdaptiveStrategy(make_model(attention_bias=True)), prompts_of(9), compile="default")


def test_a_model_of_one_layer_has_nothing_to_choose(
    make_model: MakeModel, answer: Callable[..., list[list[int]]]
) -> None:
    model = make_model(num_hidden_layers=1)
    expected = answer(AutoregressiveStrategy(model), prompts_of(9), exit_layer=None)
    assert answer(AdaptiveStrategy(model), prompts_of(9), exit_layer=1) == expected
