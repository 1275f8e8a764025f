"""The policy by literal tables, and decoding under it and under random choices: always the full model's tokens."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation import self_speculation_generator
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.confidence import ConfidentRule
from self_speculation.decoding.early_exit import TorchKernels
from self_speculation.decoding.late_adapter import LateAdapterKernels
from self_speculation.decoding.lookup import NOTHING, FreeDraft, Lookup
from self_speculation.decoding.policy import MOST_LOST, Expected, Policy
from self_speculation.decoding.sampling import COUPLED_STREAM, NUM_STREAMS, noise
from self_speculation.decoding.verification import Draft, GreedyRule
from self_speculation.decoding.width_invariant import WidthInvariantKernels
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import AdaptiveStrategy
from self_speculation.stepwise_strategy import verification_rule

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


def test_another_text_is_noticed_soon() -> None:
    """Nothing was accepted for long, and drafts are tried now and then; then everything is."""
    policy = Policy(costs(2), first=2)
    for _ in range(2000):
        cell = policy.choose(8)
        policy.observe(cell, [cell.num_speculations], [0])
    assert policy.current == Cell(2, 0)
    steps = 0
    while policy.current != Cell(2, 8):
        cell = policy.choose(8)
        policy.observe(cell, [cell.num_speculations], [cell.num_speculations])
        steps += 1
    assert steps < 200


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


def test_an_exit_is_left_for_one_that_is_better_without_luck() -> None:
    """Where drafts pay; few lucky drafts of another exit are not enough. Where they do not pay, any will do."""
    policy = learn(Policy(costs(2, 3), first=2), *[(Cell(2, 4), 4), (Cell(2, 4), 3)] * 10)
    exits, is_better = [], []
    for _ in range(40):
        learn(policy, (Cell(3, 4), 4))
        policy.choose(8)
        exits.append(policy.home)
        is_better.append(policy.tokens_per_second(Cell(3, 8)) > policy.tokens_per_second(Cell(2, 4)))
    assert exits == sorted(exits)
    assert is_better == sorted(is_better)
    assert is_better.index(True) < exits.index(3)
    bad = learn(Policy(costs(2, 3), first=2), *[(Cell(2, 4), 0)] * 20)
    bad.choose(8)
    assert (bad.current, bad.home) == (Cell(2, 0), 2)
    learn(bad, (Cell(3, 4), 4)).choose(8)
    assert bad.home == 3


def test_the_exit_stays_where_there_is_no_room() -> None:
    """At the end of an answer nothing can be drafted; the next one begins where drafts paid."""
    policy = learn(Policy(costs(2, 5), first=2), *[(Cell(5, 4), 4)] * 20)
    assert policy.choose(8).exit_layer == 5
    assert policy.choose(0).num_speculations == 0
    assert policy.home == 5
    assert Policy(costs(2, 5), first=2).taught_by(policy).home == 5
    assert Policy(costs(2), first=2).taught_by(policy).home == 2


def test_what_was_learnt_goes_into_another_menu() -> None:
    """Exits that the new menu lacks are left out, and so is the cell where the old policy was."""
    old = learn(Policy(costs(2, 5), first=2), *[(Cell(2, 4), 4)] * 10)
    assert old.choose(8) == Cell(2, 8)
    new = Policy(costs(3, 5), first=3).taught_by(old)
    assert (new.known.keys(), new.current, new.elapsed) == ({3}, None, old.elapsed)
    assert new.choose(8).exit_layer == 3
    same = Policy(costs(2, 5), first=2).taught_by(old)
    assert same.choose(8) == Cell(2, 8)
    # The next prompt may be of another kind: what was learnt last is worth four drafts.
    assert same.known[2].short.drafts == pytest.approx(4)
    learn(same, (Cell(2, 4), 0), (Cell(2, 4), 0))
    assert same.choose(8) == Cell(2, 2)


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
        assert sum(policy.lost.values()) <= MOST_LOST * policy.elapsed
    assert own >= 0.9 * max(tau[cell] / seconds[cell] for cell in seconds if cell.exit_layer == 4)


@pytest.mark.parametrize(
    ("history", "confidences", "goes_on"),
    [
        # A token more costs 2.5 of a step's 10 seconds.
        ([], [0.9], True),
        ([], [0.9, 0.9, 0.9], True),
        ([], [0.5], True),
        ([], [0.1, 0.1], False),
        ([([0.1], 1)] * 20, [0.1, 0.1], True),
        ([([0.9], 0)] * 20, [0.9], False),
        # What follows a refused token says nothing.
        ([([0.9, 0.9, 0.9, 0.1], 3)] * 20 + [([0.1, 0.9, 0.9], 0)] * 20, [0.9, 0.9], True),
    ],
)
def test_a_draft_goes_on_while_it_is_sure_enough(
    history: list[tuple[list[float], int]], confidences: list[float], goes_on: bool
) -> None:
    policy = learn(Policy(costs(2), first=2), *[(Cell(2, 4), 4)] * 3)
    policy.best = Expected(Cell(2, 0), 0.1)
    for sure, accepted in history:
        policy.observe_confidences(2, sure, accepted)
    assert policy.goes_on(2, confidences) is goes_on


@pytest.mark.parametrize(
    ("history", "asked"),
    [
        ([], range(16)),
        ([([0.9, 0.1], 1), ([0.1, 0.9], 0)] * 10, range(16)),
        # What is not sure is accepted as often: to ask takes time, and the text may change.
        ([([0.1], 1), ([0.9], 1)] * 10, (0, 8)),
    ],
)
def test_how_sure_it_is_is_asked_where_that_tells(history: list[tuple[list[float], int]], asked: Sequence[int]) -> None:
    policy = Policy(costs(2), first=2)
    for sure, accepted in history:
        policy.observe_confidences(2, sure, accepted)
    steps = []
    for policy.steps in range(16):
        steps += [policy.steps] if policy.asks(2) else []
    assert steps == list(asked)
    assert Policy(costs(2), first=2).taught_by(policy).telling == policy.telling


def test_a_stopped_draft_costs_what_it_had() -> None:
    """Also of a length that is not in the menu."""
    policy = learn(Policy(costs(2), first=2), (Cell(2, 3), 3), (Cell(2, 5), 2))
    assert policy.elapsed == pytest.approx(10 + 3 * 2.5 + 10 + 5 * 2.5)
    assert policy.lost == {}


def test_how_sure_a_draft_was() -> None:
    rule, logits_11V = ConfidentRule(GreedyRule()), torch.tensor([[[0.0, 2.0, 1.0]]])
    token_B1, q_B1V = rule.propose(logits_11V, None)
    assert (token_B1.item(), q_B1V) == (1, None)
    assert rule.confidence() == pytest.approx(math.exp(2) / (1 + math.exp(2) + math.exp(1)))


# Drafts that cost nothing


@pytest.mark.parametrize(
    ("tokens", "most", "draft", "match"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 6, [4, 1, 2, 3, 4, 1], 3),
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1], 3),
        ([1, 2, 3, 4, 1, 2], 8, [], 0),
        ([1, 2, 3, 4, 1, 2, 3], 0, [], 0),
        # The longest match, though another one is later.
        ([7, 1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 1, 2, 3], 1, [4], 4),
        # Of equals, the latest.
        ([8, 1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 1, 2, 3], 1, [5], 3),
        ([6, 6, 6, 6, 6], 3, [6, 6, 6], 4),
        ([], 8, [], 0),
    ],
)
def test_what_followed_the_longest_match(tokens: list[int], most: int, draft: list[int], match: int) -> None:
    whole, bit_by_bit = Lookup(), Lookup()
    whole.extend(tokens)
    for token in tokens:
        bit_by_bit.extend([token])
    assert whole.draft(most) == bit_by_bit.draft(most) == FreeDraft(draft, match)


def test_free_drafts_are_taken_while_they_are_right() -> None:
    seconds = costs(2) | {Cell(FREE, d): 10.0 + 0.1 * d for d in range(1, 9)}
    policy = Policy(seconds, first=2)
    free = FreeDraft([1, 2, 3, 4, 5, 6], 12)
    assert policy.choose(8, free) == Cell(FREE, 6)
    assert policy.choose(4, free) == Cell(FREE, 4)
    assert policy.choose(8).exit_layer == 2
    for _ in range(20):
        policy.observe(Cell(FREE, 6), [6], [0], free)
    assert policy.choose(8, free).exit_layer == 2
    # Shorter matches are another matter.
    assert policy.choose(8, FreeDraft([1, 2, 3, 4], 5)) == Cell(FREE, 4)
    assert policy.lost == {}


@pytest.mark.parametrize("sampling", ["leviathan", "coupled"])
def test_a_certain_draft_is_judged_by_the_rule(sampling: str) -> None:
    """Leviathan's: accepted with the probability that the target gives it, by q one-hot. Coupled: if it is the draw."""
    rule = verification_rule(GenerationConfig(sample=True, sampling=sampling, temperature=1.0, top_p=1.0))
    probabilities_V = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rows = 4000
    logits_BTV = probabilities_V.log().expand(rows, 2, 4)
    token_B1 = torch.full((rows, 1), 2)
    noise_BTS = torch.rand(rows, 2, NUM_STREAMS, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    noise_BTS[..., COUPLED_STREAM] = noise(5, range(rows), 2)[..., COUPLED_STREAM]
    draft = Draft(token_B1, [rule.certain(token_B1, 4)], torch.ones(rows, dtype=torch.long))
    verdict = rule.judge(draft, logits_BTV, noise_BTS)
    assert verdict.accepted_B.double().mean() == pytest.approx(0.3, abs=0.03)
    first_B = verdict.tokens_BT[:, 0]
    drawn_V = first_B.bincount(minlength=4) / rows
    assert drawn_V.tolist() == pytest.approx(probabilities_V.tolist(), abs=0.03)


# Decoding


class RandomPolicy(Policy):
    """Anything in the menu."""

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        own = [cell for cell in self.seconds if cell.exit_layer != FREE and cell.num_speculations <= most_drafts]
        gratis = [Cell(FREE, d) for d in range(1, min(len(free.tokens), most_drafts) + 1)]
        return random.choice(gratis or own)

    def goes_on(self, exit_layer: int, confidences: Sequence[float]) -> bool:
        return random.random() < 0.6


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
    monkeypatch.setattr(self_speculation_generator, "MOST_LOOKING", math.inf)
    model = make_model()
    strategy, fields = AdaptiveStrategy(model, policy), sampling | {"exact": exact}
    baseline = AutoregressiveStrategy(model)
    for prompts in (prompts_of(*LENGTHS), prompts_of(250), prompts_of(3), [prompts_of(9)[0] * 4]):
        free = answer(baseline, prompts, **fields, exit_layer=None)
        assert answer(strategy, prompts, **fields) == free
        assert answer(strategy, prompts, **fields, draft_vocab=150) == free
        stops = {"stop_token_ids": [free[0][min(9, len(free[0]) - 1)]]}
        stopped = answer(baseline, prompts, **fields, **stops, exit_layer=None)
        assert answer(strategy, prompts, **fields, **stops) == stopped
        assert answer(strategy, prompts, **fields, **stops, draft_vocab=150) == stopped


@pytest.mark.parametrize(("most_looking", "asks"), [(0.0, True), (math.inf, False), (math.inf, True)])
def test_a_draft_that_is_not_sure_stops(
    most_looking: float,
    asks: bool,
    make_model: MakeModel,
    answer: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where looking pays, and tells something; random weights are never sure."""
    monkeypatch.setattr(self_speculation_generator, "MOST_LOOKING", most_looking)
    cells = []

    class DraftsMuch(Policy):
        def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
            return Cell(2, min(4, most_drafts))

        def asks(self, exit_layer: int) -> bool:
            return asks

        def observe(
            self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING
        ) -> None:
            cells.append(cell)

    answer(AdaptiveStrategy(make_model(), DraftsMuch), prompts_of(9))
    assert {cell.num_speculations for cell in cells[:5]} == ({1} if most_looking and asks else {4})


def test_an_exit_adapter_keeps_up(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    """It has cached every token, also after steps without drafts: then a copy of the model drafts nothing wrong."""
    model = make_model(num_hidden_layers=3)
    adapter = ExitAdapter.of(model, 2).eval()
    expected = answer(AutoregressiveStrategy(model), prompts_of(5, 30), exit_layer=None)
    model.add_module(ATTRIBUTE, adapter)
    cells = []

    class Alternating(Policy):
        def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
            num_free = min(len(free.tokens), most_drafts)
            return Cell(FREE, num_free) if num_free else Cell(2, min(len(cells) % 3, most_drafts))

        def observe(
            self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING
        ) -> None:
            cells.append(cell)
            assert cell.exit_layer == FREE or list(drafted) == list(accepted)

    assert answer(AdaptiveStrategy(model, Alternating), prompts_of(5, 30), exit_layer=1) == expected
    assert {cell.num_speculations for cell in cells} == {0, 1, 2}
    # With drafts that cost nothing in between, of which the adapter's cache must know, too.
    [prompt] = prompts_of(8)
    repeated = prompt * 3
    assert answer(AdaptiveStrategy(model, Alternating), [repeated]) == answer(
        AutoregressiveStrategy(model), [repeated], exit_layer=None
    )
    assert FREE in {cell.exit_layer for cell in cells}


@pytest.mark.parametrize("exact", [False, True], ids=["torch", "exact"])
def test_an_exit_adapter_reads_nothing_until_it_drafts(
    exact: bool, make_model: MakeModel, answer: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all at once, the prompt in pieces too; in a conversation and in a batch it reads with the others."""
    model = make_model(num_hidden_layers=3)
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, 2).eval())
    read: list[int] = []
    kernels = WidthInvariantKernels if exact else TorchKernels
    run_adapter = kernels.run_adapter

    def counted(self: Any, adapter: ExitAdapter, states_BTD: torch.Tensor, *others: Any) -> torch.Tensor:
        read.append(states_BTD.shape[1])
        return run_adapter(self, adapter, states_BTD, *others)

    class DraftsLate(Policy):
        stops = False

        def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
            return Cell(2, min(2, most_drafts) if self.steps >= 6 else 0)

    strategy, [prompt] = AdaptiveStrategy(model, DraftsLate), prompts_of(20)
    answer(strategy, [prompt], exact=exact, max_new_tokens=1)  # Measures what steps cost.
    monkeypatch.setattr(kernels, "run_adapter", counted)
    answer(strategy, [prompt], exact=exact, max_new_tokens=6, prefill_chunk=7)
    assert read == []
    answer(strategy, [prompt], exact=exact, max_new_tokens=9, prefill_chunk=7)
    # 19 of the prompt and six tokens; two drafts, and the last one of them once more.
    assert read == [25, 1, 1, 1]
    read.clear()
    answer(strategy, prompts_of(20, 20), exact=exact, max_new_tokens=1)
    assert read


def test_nothing_waits_but_the_prompt(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Also where steps were timed just before."""
    model = make_model(num_hidden_layers=3)
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, 2).eval())
    config = GenerationConfig(max_new_tokens=4, sample=False)
    strategy = AdaptiveStrategy(model)
    session = strategy.begin(HuggingfaceLlamaGenerator(tokenizer, strategy).request(prompts_of(20), config))
    kernels = session.step.passes.kernels
    assert isinstance(kernels, LateAdapterKernels)
    assert [positions_BT.tolist() for _, positions_BT in kernels.waiting] == [[list(range(19))]]


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
    assert len(strategy.costs) == 2
    assert all(seconds > 0 for costs in strategy.costs.values() for seconds in costs.near.values())
    assert [{cell.exit_layer for cell in costs.near} for costs in strategy.costs.values()] == [
        {FREE, 1, 2, 3},
        {1, 2, 3},
    ]


def test_a_model_of_one_layer_has_nothing_to_choose(
    make_model: MakeModel, answer: Callable[..., list[list[int]]]
) -> None:
    model = make_model(num_hidden_layers=1)
    expected = answer(AutoregressiveStrategy(model), prompts_of(9), exit_layer=None)
    assert answer(AdaptiveStrategy(model), prompts_of(9), exit_layer=1) == expected
