"""Steps, drafts and acceptances told from one pass, against decoding itself; and the speed predicted from them."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.cache import CacheAccess
from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
)
from self_speculation.measuring.acceptance import step_counts
from self_speculation.measuring.pass_costs import PassCosts
from self_speculation.measuring.passes import TIMING, Timing, measure_passes
from self_speculation.measuring.prediction import Profile, acceptance_chances, predict, profile
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

LAYERS = 6
PROMPTS = ["def add(a, b):", "for i in", "class Näme"]
NUM_STEPS = 16
MORE_THAN_THE_ANSWER = 30


@pytest.fixture(scope="module")
def agreeing_model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """The tiny Llama with later layers damped, so that its exits agree with it now and then."""
    return damped(make_model(), 0.15)


def damped(model: LlamaForCausalLM, factor: float) -> LlamaForCausalLM:
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    return model


def greedy(**fields: object) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NUM_STEPS, "sample": False} | fields)


Generator = Callable[[type[GenerationStrategy]], HuggingfaceLlamaGenerator]


@pytest.fixture
def generator(agreeing_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Generator:
    """The model with a strategy."""
    return lambda strategy: HuggingfaceLlamaGenerator(tokenizer, strategy(agreeing_model))


# Counts from chances, by hand


@pytest.mark.parametrize(
    ("chances", "num_speculations", "limit", "expected"),
    [
        # All accepted, and the limit ends the answer: the last draft is cut to leave room for the full model's token.
        ("111111", 1, 6, (3, 3, 3)),
        ("111111", 3, 6, (2, 4, 4)),
        ("11111", 1, 5, (3, 2, 2)),
        ("11111", 3, 5, (2, 3, 3)),
        ("111111", 8, 6, (1, 5, 5)),
        # None accepted: a step for each token, whose drafts shrink at the limit.
        ("0000", 1, 4, (4, 3, 0)),
        ("0000", 3, 4, (4, 6, 0)),
        # The third token is rejected and recovered.
        ("110111", 1, 6, (4, 3, 2)),
        ("110111", 3, 6, (2, 5, 4)),
        # A stop ends the answer: drafted and accepted tokens end there too.
        ("111111", 1, 99, (3, 3, 3)),
        ("111111", 3, 99, (2, 5, 5)),
        ("11111", 1, 99, (3, 3, 3)),
        ("11111", 3, 99, (2, 4, 4)),
        ("111111", 8, 99, (1, 6, 6)),
        ("0000", 1, 99, (4, 4, 0)),
        ("0000", 3, 99, (4, 10, 0)),
        ("110111", 3, 99, (2, 6, 5)),
        ("110111", 3, 7, (2, 6, 5)),
        # The full model's own token is the stop.
        ("1111", 3, 99, (1, 3, 3)),
        ("1110", 3, 99, (1, 3, 3)),
        # One token, and no drafts.
        ("1", 3, 1, (1, 0, 0)),
        ("1", 3, 99, (1, 1, 1)),
        ("0", 3, 99, (1, 1, 0)),
        ("111", 0, 3, (3, 0, 0)),
        ("111", 0, 99, (3, 0, 0)),
        ("", 3, 99, (0, 0, 0)),
    ],
)
def test_counts_of_certain_chances(
    chances: str, num_speculations: int, limit: int, expected: tuple[int, int, int]
) -> None:
    chances_EN = np.array([[float(chance) for chance in chances]])
    counts = step_counts(chances_EN, num_speculations, limit)
    assert (counts.steps_E[0], counts.drafted_E[0], counts.accepted_E[0]) == expected


def test_every_exit_has_its_own_counts() -> None:
    chances_EN = np.array([[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=float)
    counts = step_counts(chances_EN, num_speculations=2, limit=4)
    assert counts.steps_E.tolist() == [4, 2, 2]
    assert counts.drafted_E.tolist() == [5, 3, 2]
    assert counts.accepted_E.tolist() == [0, 2, 2]
    assert chances_EN.tolist() == [[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]]


def test_counts_of_a_coin() -> None:
    """Two tokens, one draft: with even chances the first step covers both, half of the time."""
    counts = step_counts(np.array([[0.5, 0.5]]), num_speculations=1, limit=2)
    assert (counts.steps_E[0], counts.drafted_E[0], counts.accepted_E[0]) == (1.5, 1.0, 0.5)


def walk(is_accepted: tuple[bool, ...], num_speculations: int, limit: int) -> np.ndarray:
    """Steps, drafted and accepted tokens, step by step, of an answer whose draft's fate is known at every token."""
    counts, done = np.zeros(3), 0
    while done < len(is_accepted):
        drafted = min(num_speculations, limit - done - 1)
        accepted = len(list(itertools.takewhile(bool, is_accepted[done : done + drafted])))
        new = min(accepted + 1, len(is_accepted) - done)
        done += new
        is_stopped = done == len(is_accepted) < limit
        counts += 1, min(drafted, new) if is_stopped else drafted, accepted
    return counts


@pytest.mark.parametrize("limit", [6, 7, 99])
@pytest.mark.parametrize("num_speculations", [0, 1, 2, 3, 4, 5, 9])
def test_counts_are_expectations_over_every_outcome(num_speculations: int, limit: int) -> None:
    chances_EN = np.random.default_rng(0).random((2, 6))
    counts = step_counts(chances_EN, num_speculations, limit)
    found_EC = np.stack([counts.steps_E, counts.drafted_E, counts.accepted_E], axis=1)
    for chances_N, found_C in zip(chances_EN, found_EC, strict=True):
        expected_C = np.zeros(3)
        for outcome in itertools.product((False, True), repeat=6):
            probability = math.prod(
                chance if fate else 1 - chance for chance, fate in zip(chances_N, outcome, strict=True)
            )
            expected_C += probability * walk(outcome, num_speculations, limit)
        np.testing.assert_allclose(found_C, expected_C, rtol=0, atol=1e-12)


# Greedy: exactly what decoding does

EVERY_CELL = list(itertools.product(range(1, LAYERS), (1, 2, 3, 4, 5, MORE_THAN_THE_ANSWER)))
SOME_CELLS = [(1, 1), (1, MORE_THAN_THE_ANSWER), (3, 4), (5, 2), (5, MORE_THAN_THE_ANSWER)]


def assert_counts_are_those_of_decoding(
    generator: Generator, config: GenerationConfig, cells: list[tuple[int, int]]
) -> list[GenerationResult]:
    """Every cell's answers to all prompts, next to what the autoregressive answers' profiles say of them."""
    exit_layers = sorted({exit_layer for exit_layer, _ in cells})
    profiles = [profile(generator(AutoregressiveStrategy), config, prompt, exit_layers) for prompt in PROMPTS]
    for exit_layer, drafts in cells:
        cell = GenerationConfig(**vars(config) | {"exit_layer": exit_layer, "num_speculations": drafts})
        results = generator(SelfSpeculativeStrategy).generate(PROMPTS, cell)
        for result, known in zip(results, profiles, strict=True):
            assert result.tokens == known.result.tokens
            counts = step_counts(known.chances_EN, drafts, known.limit)
            row = exit_layers.index(exit_layer)
            told = (counts.steps_E[row], counts.drafted_E[row], counts.accepted_E[row])
            assert told == (len(result.steps), result.num_drafted, result.num_accepted), (exit_layer, drafts)
    return [known.result for known in profiles]


def test_greedy_counts_of_every_cell(generator: Generator) -> None:
    results = assert_counts_are_those_of_decoding(generator, greedy(), EVERY_CELL)
    assert {result.stop_reason for result in results} == {"max_steps"}


def test_the_model_of_these_tests_accepts_some_drafts_and_rejects_some(generator: Generator) -> None:
    for exit_layer in range(1, LAYERS):
        config = greedy(exit_layer=exit_layer, num_speculations=2)
        results = generator(SelfSpeculativeStrategy).generate(PROMPTS, config)
        rate = sum(result.num_accepted for result in results) / sum(result.num_drafted for result in results)
        assert 0.2 < rate < 0.95


def test_greedy_counts_of_answers_that_end_at_an_end_token(
    generator: Generator, agreeing_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = generator(AutoregressiveStrategy).generate(PROMPTS, greedy())
    ends = [answer.tokens[index] for answer, index in zip(answers, (7, 9, 12), strict=True)]
    monkeypatch.setattr(agreeing_model.generation_config, "eos_token_id", ends)
    results = assert_counts_are_those_of_decoding(generator, greedy(), SOME_CELLS)
    assert {result.stop_reason for result in results} == {"end_of_sequence"}
    assert any(len(result.tokens) > 6 for result in results)


@pytest.mark.parametrize("index", [0, 2, 5, 15])
def test_greedy_counts_of_answers_that_end_at_a_stop_token(generator: Generator, index: int) -> None:
    """At any place in an accepted run or behind it; other prompts' answers may go on to the limit."""
    [answer] = generator(AutoregressiveStrategy).generate(PROMPTS[:1], greedy())
    config = greedy(stop_token_ids=[answer.tokens[index]])
    results = assert_counts_are_those_of_decoding(generator, config, [(1, 3), (5, 2), (5, 5)])
    assert results[0].stop_reason == "stop_token"


def test_greedy_counts_of_answers_that_end_at_a_stop_word(generator: Generator) -> None:
    answers = generator(AutoregressiveStrategy).generate(PROMPTS, greedy())
    config = greedy(stop_words=[answer.text[5:7] for answer in answers])
    results = assert_counts_are_those_of_decoding(generator, config, SOME_CELLS)
    assert {result.stop_reason for result in results} == {"stop_word"}


def test_greedy_counts_of_answers_that_fill_the_context(
    generator: Generator, agreeing_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreeing_model.config, "max_position_embeddings", 20)
    results = assert_counts_are_those_of_decoding(generator, greedy(max_new_tokens=30), SOME_CELLS)
    assert {result.stop_reason for result in results} == {"length"}


def test_greedy_counts_with_a_logits_processor(generator: Generator) -> None:
    plain = generator(AutoregressiveStrategy).generate(PROMPTS, greedy())
    results = assert_counts_are_those_of_decoding(generator, greedy(no_repeat_ngram_size=1), SOME_CELLS)
    assert [result.tokens for result in results] != [result.tokens for result in plain]


# Sampling: the overlap of two distributions


def filtered(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Softmax at a temperature, cut to the fewest tokens of at least probability top_p."""
    p_V, tokens_V = (logits_V / temperature).softmax(-1).sort(descending=True)
    kept_V = p_V.cumsum(-1) - p_V < top_p
    return torch.zeros_like(p_V).scatter(0, tokens_V, p_V * kept_V / (p_V * kept_V).sum())


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0), (1.5, 0.5)])
def test_a_sampled_token_s_chance_is_the_overlap_of_draft_and_target(
    generator: Generator, agreeing_model: LlamaForCausalLM, temperature: float, top_p: float
) -> None:
    config = GenerationConfig(max_new_tokens=8, temperature=temperature, top_p=top_p)
    known = profile(generator(AutoregressiveStrategy), config, PROMPTS[0], [1, 4, LAYERS])
    prompt = generator(AutoregressiveStrategy).encode(PROMPTS[0])
    with torch.inference_mode():
        tokens_1T = torch.tensor([prompt + known.result.tokens])
        states = agreeing_model(tokens_1T, output_hidden_states=True).hidden_states
        norm, head = agreeing_model.model.norm, agreeing_model.lm_head
        for index in (0, 3, 7):
            position = len(prompt) - 1 + index
            p_V = filtered(head(states[LAYERS][0, position]), temperature, top_p)
            for row, exit_layer in enumerate((1, 4)):
                q_V = filtered(head(norm(states[exit_layer][0, position])), temperature, top_p)
                overlap = torch.minimum(p_V, q_V).sum().item()
                assert known.chances_EN[row, index] == pytest.approx(overlap, abs=1e-5)
    assert known.chances_EN.shape == (3, 8)
    assert known.chances_EN[2] == pytest.approx(1.0, abs=1e-5)
    assert 0 < known.chances_EN[:2].min() < known.chances_EN[:2].max() < 1


# Profiles


def test_a_profile_is_the_full_model_s_answer_and_how_each_exit_would_draft_it(
    generator: Generator, agreeing_model: LlamaForCausalLM
) -> None:
    known = profile(generator(AutoregressiveStrategy), greedy(), PROMPTS[0], [2, LAYERS])
    [answer] = generator(AutoregressiveStrategy).generate(PROMPTS[:1], greedy())
    assert known.result.tokens == answer.tokens
    assert known.limit == NUM_STEPS
    assert known.chances_EN.dtype == np.float64
    assert set(known.chances_EN[0]) == {0.0, 1.0}
    assert known.chances_EN[1].tolist() == [1.0] * NUM_STEPS
    request = generator(AutoregressiveStrategy).request(PROMPTS[:1], greedy())
    again = acceptance_chances(agreeing_model, request, answer.tokens, [LAYERS, 2])
    assert again.tolist() == known.chances_EN[::-1].tolist()


@pytest.mark.parametrize(("max_new_tokens", "context", "limit"), [(5, 256, 5), (30, 20, None), (1, 256, 1)])
def test_a_profile_s_limit_is_the_least_of_max_steps_and_context(
    generator: Generator,
    agreeing_model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    max_new_tokens: int,
    context: int,
    limit: int | None,
) -> None:
    monkeypatch.setattr(agreeing_model.config, "max_position_embeddings", context)
    prompt = generator(AutoregressiveStrategy).encode(PROMPTS[0])
    known = profile(generator(AutoregressiveStrategy), greedy(max_new_tokens=max_new_tokens), PROMPTS[0], [1])
    assert known.limit == len(known.result.tokens) == (limit or context - len(prompt))


# The cost of passes


@pytest.fixture
def request_of_passes(generator: Generator) -> GenerationRequest:
    """A prompt to time passes after."""
    return generator(AutoregressiveStrategy).request(PROMPTS[:1], greedy())


def test_passes_are_timed_and_leave_no_trace(
    generator: Generator, agreeing_model: LlamaForCausalLM, request_of_passes: GenerationRequest
) -> None:
    def answers() -> list[list[int]]:
        ways = (AutoregressiveStrategy, SelfSpeculativeStrategy)
        config = greedy(exit_layer=3, num_speculations=4)
        return [result.tokens for way in ways for result in generator(way).generate(PROMPTS, config)]

    before = answers()
    cells = [Cell(1, 1), Cell(1, 3), Cell(4, 1), Cell(4, 3), Cell(LAYERS, 3)]
    costs = measure_passes(agreeing_model, request_of_passes, cells)
    assert costs.draft.keys() == {1, 4, LAYERS}
    assert costs.verification.keys() == set(cells)
    assert all(seconds > 0 for seconds in (*costs.draft.values(), *costs.verification.values()))
    assert answers() == before


def test_a_pass_costs_the_median_of_its_rounds(
    agreeing_model: LlamaForCausalLM, request_of_passes: GenerationRequest
) -> None:
    """A clock by which the passes of a cell take 1 and 2 seconds; they come in turns, a few calls at a time."""
    durations = [factor * key for factor in (100, 1, 10) for key in (1, 2)]
    assert len(durations) == 2 * TIMING.rounds
    readings = iter([reading for duration in durations for reading in (0.0, duration * TIMING.calls)])
    timing = Timing(clock=lambda: next(readings))
    costs = measure_passes(agreeing_model, request_of_passes, [Cell(2, 3)], timing)
    assert costs == PassCosts({2: 10}, {Cell(2, 3): 20})
    assert list(readings) == []


@pytest.mark.parametrize(("longest", "visible"), [(61, 64), (62, 128)])
def test_passes_of_a_ragged_batch_see_their_longest_row(
    generator: Generator, agreeing_model: LlamaForCausalLM, longest: int, visible: int
) -> None:
    """And its three drafts, whatever the first row's length: 64 positions are the first bucket of the cache.

    The prefill reads row by row all tokens but the pending one.
    """
    seen: list[int] = []

    def note(_: nn.Module, __: tuple[Tensor, ...], inputs: dict[str, CacheAccess]) -> None:
        seen.append(inputs["past_key_values"].cache.visible)

    prompts = [[7] * 3, [5] * longest, [9] * 10]
    request = generator(AutoregressiveStrategy).request(prompts, greedy())
    handle = agreeing_model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        costs = measure_passes(agreeing_model, request, [Cell(2, 3), Cell(LAYERS, 0)], Timing(rounds=1))
    finally:
        handle.remove()
    assert set(seen[: len(prompts)]) == {64}
    assert set(seen[len(prompts) :]) == {visible}
    assert costs.draft.keys() == {2}
    assert costs.verification.keys() == {(2, 3), (LAYERS, 0)}


def test_a_pass_runs_the_layers_that_it_stands_for(
    agreeing_model: LlamaForCausalLM, request_of_passes: GenerationRequest
) -> None:
    """E = 2, d = 3: prefill and three drafts set up; each pass runs once, and before each round not timed."""
    timed = TIMING.rounds * (TIMING.calls + TIMING.calls // 4) + 1
    modules = dict(enumerate(agreeing_model.model.layers)) | {"head": agreeing_model.lm_head}
    shapes: dict[object, Counter[int]] = {name: Counter() for name in modules}

    def count(name: object, _: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
        shapes[name][inputs[0].shape[1]] += 1

    handles = [module.register_forward_hook(partial(count, name)) for name, module in modules.items()]
    try:
        measure_passes(agreeing_model, request_of_passes, [Cell(2, 3)])
    finally:
        for handle in handles:
            handle.remove()
    prefilled = len(request_of_passes.prompts[0]) - 1
    assert [shapes[layer] for layer in (0, 1)] == [{prefilled: 1, 1: 3 + 2 * timed}] * 2
    assert [shapes[layer] for layer in range(2, LAYERS)] == [{prefilled: 1, 4: timed}] * 4
    assert shapes["head"] == {1: 3 + timed, 4: timed}


# Predictions


def test_seconds_of_steps_and_drafts() -> None:
    costs = PassCosts(draft={3: 10.0, 5: 0.0}, verification={Cell(3, 2): 1.0, Cell(3, 4): 0.0, Cell(6, 0): 2.0})
    assert costs.seconds(Cell(3, 2), steps=4, drafted=7) == 7 * 10 + 4 * 1
    assert costs.seconds(Cell(6, 0), steps=4, drafted=0) == 4 * 2


def test_predictions_by_hand() -> None:
    """Two answers, of 4 tokens up to the limit and of 2 up to a stop; exits 2 and 5.

    Exit 2, d = 1: 4 steps with 3 drafts, none accepted; 1 step with 1 draft, accepted.
    Exit 2, d = 3: 4 steps with 3 + 2 + 1 + 0 drafts; 1 step with 2 drafts, both accepted.
    Exit 5, d = 1: 2 steps with 2 drafts, both accepted; 2 steps with 2 drafts, the second accepted.
    Exit 5, d = 3: 1 step with 3 drafts, all accepted; 2 steps with 3 + 1 drafts, the last accepted.
    """
    profiles = [
        Profile(GenerationResult(tokens=[7] * 4, prefill_seconds=0.25), 4, np.array([[0.0] * 4, [1.0] * 4])),
        Profile(GenerationResult(tokens=[7] * 2, prefill_seconds=0.5), 9, np.array([[1.0, 1.0], [0.0, 1.0]])),
    ]
    costs = PassCosts({2: 1.5, 5: 3.5}, {Cell(5, 3): 4.0, Cell(5, 1): 2.0, Cell(2, 3): 8.0, Cell(2, 1): 7.0})
    expected = {
        Cell(2, 1): (6 / (0.75 + 4 * 1.5 + 5 * 7), 1 / 4, 6 / 5),
        Cell(2, 3): (6 / (0.75 + 8 * 1.5 + 5 * 8), 2 / 8, 6 / 5),
        Cell(5, 1): (6 / (0.75 + 4 * 3.5 + 4 * 2), 3 / 4, 6 / 4),
        Cell(5, 3): (6 / (0.75 + 7 * 3.5 + 3 * 4), 4 / 7, 6 / 3),
    }
    for cells in (list(expected), list(expected)[::-1]):
        predictions = predict(profiles, cells, costs)
        assert [one.cell for one in predictions] == cells
        for one in predictions:
            rates = (one.tokens_per_second, one.acceptance_rate, one.tokens_per_step)
            assert rates == pytest.approx(expected[one.cell])


def test_a_prediction_without_drafts_has_no_acceptance() -> None:
    profiles = [Profile(GenerationResult(tokens=[7]), 1, np.array([[1.0]]))]
    [one] = predict(profiles, [Cell(1, 3)], PassCosts({1: 1.0}, {Cell(1, 3): 2.0}))
    assert (one.tokens_per_second, one.acceptance_rate, one.tokens_per_step) == (0.5, 0.0, 1.0)
