"""Where E or d is left open, what is given stays and the rest is chosen: the answer is autoregressive decoding's."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation import LayerSkip
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.acceptance_estimate import MEASURED_DRAFTS, PRIOR, Acceptance
from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.lookup import NOTHING, FreeDraft
from self_speculation.decoding.policy import Policy
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.kept_strategies import KeptStrategies
from self_speculation.loading import Recommendation
from self_speculation.self_speculation_generator import AdaptiveStrategy, OpenStrategy
from self_speculation.stepwise_strategy import StepwiseStrategy

MakeModel = Callable[..., LlamaForCausalLM]
PROMPTS = [[5, 6, 7, 8] * 4, [9], [11, 12, 13]]
SAMPLED = {"sample": True, "temperature": 1.3}


class Anything(Policy):
    """Any cell that there is room for; free drafts whenever there are any, every second time."""

    stops = False

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        own = [cell for cell in self.seconds if cell.exit_layer != FREE and cell.num_speculations <= most_drafts]
        num_free = min(len(free.tokens), most_drafts)
        return Cell(FREE, num_free) if num_free and random.random() < 0.5 else random.choice(own)


@pytest.fixture
def decode(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[GenerationResult]]:
    def decode(strategy: StepwiseStrategy, prompts: list[list[int]], **fields: object) -> list[GenerationResult]:
        config = GenerationConfig(**{"max_new_tokens": 40, "sample": False} | fields)
        return HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)

    return decode


def tokens_of(results: list[GenerationResult]) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize(
    ("given", "sampling", "exits", "drafts"),
    [
        ({}, SAMPLED, {1, 2, 3}, {0, 1, 2, 3, 4, 6, 8}),
        ({"exit_layer": 5}, {}, {5}, {0, 1, 2, 3, 4, 6, 8}),
        ({"num_speculations": 3}, SAMPLED, {1, 2, 3}, {0, 3}),
        ({"num_speculations": 1}, {}, {1, 2, 3}, {0, 1}),
        ({"exit_layer": 6}, {}, {6}, {0, 1, 2, 3, 4, 6, 8}),
    ],
    ids=str,
)
def test_what_is_given_stays(
    given: dict[str, int],
    sampling: dict[str, object],
    exits: set[int],
    drafts: set[int],
    make_model: MakeModel,
    decode: Callable[..., list[GenerationResult]],
) -> None:
    """Every cell of the menu is met, and the tokens are autoregressive decoding's, alone and in a ragged batch."""
    random.seed(1)
    model = make_model()
    strategy, rule = OpenStrategy(model, Anything), {"sampling": "coupled"} if sampling else {}
    cells = set()
    for prompts in [PROMPTS, PROMPTS[:1], PROMPTS[:1], PROMPTS[1:2]]:
        expected = decode(AutoregressiveStrategy(model), prompts, **sampling, **rule)
        answers = decode(strategy, prompts, **sampling, **given)
        assert tokens_of(answers) == tokens_of(expected)
        cells |= {step.cell for answer in answers for step in answer.steps}
    menu = {cell for own in strategy.costs.values() for cell in own.near if cell.exit_layer != FREE}
    assert menu == {Cell(exit_layer, d) for exit_layer in exits for d in drafts}
    assert {cell.exit_layer for cell in cells} <= {FREE, *exits}
    assert {cell.num_speculations for cell in cells if cell.exit_layer != FREE} == drafts
    assert max(cell.num_speculations for cell in cells) <= max(drafts)


def test_adaptive_decoding_always_chooses(make_model: MakeModel, decode: Callable[..., list[GenerationResult]]) -> None:
    strategy = AdaptiveStrategy(make_model())
    decode(strategy, PROMPTS[:1], exit_layer=5, num_speculations=3)
    [costs] = strategy.costs.values()
    assert {cell.exit_layer for cell in costs.near} == {FREE, 1, 2, 3, 5}
    assert {cell.num_speculations for cell in costs.near if cell.exit_layer == 5} == {0, 1, 2, 3, 4, 6, 8}
    assert strategy.drafting(GenerationConfig(exit_layer=5)) == dict.fromkeys(strategy.chooses, "auto")


def test_an_exit_that_is_given_drafts_without_the_adapter(
    make_model: MakeModel, decode: Callable[..., list[GenerationResult]]
) -> None:
    model = make_model()
    expected = tokens_of(decode(AutoregressiveStrategy(model), PROMPTS))
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, 2).eval())
    for given, exits in (({"exit_layer": 4}, {4}), ({"exit_layer": 2}, {2}), ({}, {2})):
        strategy = OpenStrategy(model, Anything)
        assert tokens_of(decode(strategy, PROMPTS, **given)) == expected
        assert {cell.exit_layer for costs in strategy.costs.values() for cell in costs.near} == exits


def test_a_checkpoint_says_what_to_choose_from_and_to_expect(
    make_model: MakeModel, decode: Callable[..., list[GenerationResult]], tmp_path: Path
) -> None:
    policies: list[Policy] = []

    class Kept(Policy):
        def __post_init__(self) -> None:
            super().__post_init__()
            policies.append(self)

    said = {"exit_layers": [4, 2], "draft_lengths": [5, 2], "acceptance": {"4": 0.9, "5": 0.8}}
    (tmp_path / "layerskip.json").write_text(json.dumps({"exit_layer": 3, "num_speculations": 1} | said))
    model = make_model()
    model.name_or_path = str(tmp_path)
    strategy = AdaptiveStrategy(model, Kept)
    decode(strategy, PROMPTS[:2])
    [costs] = strategy.costs.values()
    assert costs.near.keys() == {Cell(exit_layer, d) for exit_layer in (2, 3, 4) for d in (0, 2, 5)}
    known = {exit_layer: (own.prior, own.weight) for exit_layer, own in policies[0].known.items()}
    assert known[4] == (0.9, MEASURED_DRAFTS)
    assert known[3][0] == PRIOR
    assert known[3][1] < MEASURED_DRAFTS
    assert 5 not in known
    # What is handed over comes first: the recommendation for a task.
    advised = AdaptiveStrategy(model, Kept, advice=Recommendation(5, 1, "test", draft_lengths=(0, 1)))
    decode(advised, PROMPTS[:2])
    assert policies[-1].first == 5
    assert {cell.num_speculations for cell in policies[-1].seconds} == {0, 1}


def test_a_prior_that_was_measured_weighs_more() -> None:
    weak, strong = Acceptance(0.9), Acceptance(0.9, weight=10)
    for known in (weak, strong):
        known.add(1, 0)
    assert weak.rate == pytest.approx(0.9 * 2 / 3)
    assert strong.rate == pytest.approx(0.9 * 10 / 11)


def test_other_exits_are_tried_with_the_shortest_draft_there_is() -> None:
    seconds = {Cell(exit_layer, d): 10 + 0.1 * d * exit_layer for exit_layer in (1, 2) for d in (0, 3)}
    policy = Policy(seconds, first=1, known={1: Acceptance(0.9)}, elapsed=1e6)
    assert policy.choose(3) == Cell(2, 3)
    # There is no room for one.
    assert policy.choose(2) == Cell(1, 0)


@pytest.mark.parametrize("given", [{}, {"exit_layer": 2}, {"num_speculations": 4}], ids=str)
def test_a_seed_gives_its_answer_again(
    given: dict[str, int], make_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Autoregressive decoding's with the same noise, though what is chosen depends on the time that steps take."""
    llm = LayerSkip(make_model(), tokenizer)
    settings = {"sample": True, "seed": 7, "temperature": 1.2, "max_new_tokens": 40}
    prompts = ["def add(a, b):", "for"]
    expected = llm.generate(prompts, details=True, generation_strategy="autoregressive", sampling="coupled", **settings)
    assert expected[0].tokens != llm.generate(prompts[0], details=True, **settings | {"seed": 8}).tokens
    for _ in range(2):
        assert tokens_of(llm.generate(prompts, details=True, **given, **settings)) == tokens_of(expected)
    # Measured once more, with costs that make drafts of the deepest exit the cheapest.
    [strategy] = KeptStrategies.of(llm.model).idle[OpenStrategy]
    for costs in strategy.costs.values():
        cheap = {cell: 1 / (1 + cell.exit_layer + cell.num_speculations) for cell in costs.near}
        costs.near.update(cheap)
        costs.far.update(cheap)
    answers = llm.generate(prompts, details=True, **given, **settings)
    assert tokens_of(answers) == tokens_of(expected)
    assert sum(answer.num_drafted for answer in answers) > 0


def test_the_rule_of_sampling_fits_the_strategy(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    llm = LayerSkip(make_model(), tokenizer)
    for settings, rule in (
        ({}, "coupled"),
        ({"generation_strategy": "adaptive", "exit_layer": 2, "num_speculations": 3}, "coupled"),
        ({"exit_layer": 2, "num_speculations": "auto"}, "coupled"),
        ({"exit_layer": 2, "num_speculations": 3}, "leviathan"),
        ({"generation_strategy": "autoregressive"}, "leviathan"),
        ({"sampling": "leviathan"}, "leviathan"),
        ({"exit_layer": 2, "num_speculations": 3, "sampling": "coupled"}, "coupled"),
    ):
        assert llm.config(**settings).sampling == rule
