"""The judge of greedy answers: honest ones pass, and every fault that is put into one is found."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.commands import correctness
from self_speculation.decoding.early_exit import TorchKernels
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.measuring.equivalence import CellReport, EquivalenceCheck, NoiseFloor, read_again
from self_speculation.measuring.judge import Difference, Judge, Judgement, Scores
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

NUM_ANSWERS = 200
VOCABULARY = 300
GREEDY = GenerationConfig(max_new_tokens=12, sample=False, exit_layer=1, num_speculations=3)
DTYPES = [
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float64, marks=pytest.mark.slow),
    pytest.param(torch.float16, marks=pytest.mark.slow),
]


def make_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


def generator_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> HuggingfaceLlamaGenerator:
    return HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))


def answers_of(
    generator: HuggingfaceLlamaGenerator, prompts: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    return [answer.tokens for answer in generator.generate(prompts, config)]


@torch.inference_mode()
def logits_of(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The full model's (T, V), one for each token of the answer."""
    return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def bounds_of(
    model: LlamaForCausalLM, exact: LlamaForCausalLM, prompt: list[int], tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, V) in float32 at least, and the bounds (T) of their rounding."""
    own_TV = logits_of(model, prompt, tokens)
    if model.dtype.itemsize > 2:
        return own_TV, 4 * torch.finfo(model.dtype).eps * own_TV.abs().amax(-1)
    exact_TV = logits_of(exact, prompt, tokens)
    return exact_TV, 8 * (own_TV - exact_TV).std(-1)


# Tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_runner_up_at_three_times_the_bound_is_found_in_every_answer(
    dtype: torch.dtype, make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """One committed token in each of 200 answers becomes the runner-up; before, none is reported."""
    model = make_model(num_hidden_layers=2, initializer_range=0.1).to(dtype)
    generator, prompts = generator_of(model, tokenizer), make_prompts(2 * NUM_ANSWERS)
    judge = Judge(model, generator.request([], GREEDY))
    answers = zip(prompts, answers_of(generator, prompts, GREEDY), strict=True)
    exact = copy.deepcopy(model).to(torch.promote_types(dtype, torch.float32))
    num_faults = 0
    while num_faults < NUM_ANSWERS:
        prompt, answer = next(answers)
        assert not judge.judge(prompt, answer).failures
        logits_TV, bounds_T = bounds_of(model, exact, prompt, answer)
        (best_T, second_T), (_, runner_up_T) = (values_T2.unbind(-1) for values_T2 in logits_TV.topk(2))
        margins_T = best_T - second_T
        places = ((margins_T >= 3 * bounds_T) & (runner_up_T != 1)).nonzero().flatten().tolist()
        if not places:
            continue
        num_faults += 1
        # Where the fault is hardest to see.
        place = min(places, key=lambda place, excess_T=margins_T / bounds_T: float(excess_T[place]))
        runner_up = int(runner_up_T[place])
        found = judge.judge(prompt, [*answer[:place], runner_up, *answer[place + 1 :]]).failures[0]
        assert (found.position, found.expected_token, found.actual_token) == (place, answer[place], runner_up)
        assert found.margin == pytest.approx(float(margins_T[place]), rel=1e-3)
        assert found.tolerance == pytest.approx(float(bounds_T[place]), rel=1e-3)


def test_a_token_within_rounding_is_a_tie(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A token's logit is less than the greatest by 1 part in 256, or by half."""
    model, config = make_model().to(torch.bfloat16), GREEDY.generation(max_new_tokens=1)
    generator, [prompt] = generator_of(model, tokenizer), make_prompts(1)
    [[token]] = answers_of(generator, [prompt], config)
    rival, head = (token + 1) % VOCABULARY, model.lm_head.weight.data
    for factor, is_tie in ((1.0 - 2**-8, True), (0.5, False)):
        head[rival] = head[token] * factor
        judge = Judge(model, generator.request([], config))
        [found] = judge.judge(prompt, [rival]).differences
        assert (found.expected_token, found.actual_token, found.is_tie) == (token, rival, is_tie)
        [[logits_V], [bound]] = bounds_of(model, copy.deepcopy(model).float(), prompt, [rival])
        assert found.margin == pytest.approx(float(logits_V[token] - logits_V[rival]), rel=1e-3)
        assert found.tolerance == pytest.approx(float(bound), rel=1e-3)


COUPLED = GREEDY.generation(sample=True, sampling="coupled", temperature=0.8, top_k=40, top_p=0.9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_coupled_answers_are_judged_token_by_token(
    dtype: torch.dtype, make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Honest ones pass, two of one prompt too; any other token in the place of one drawn is found."""
    model = make_model(num_hidden_layers=2, initializer_range=0.1).to(dtype)
    generator, prompts = generator_of(model, tokenizer), make_prompts(60)
    prompts[1] = prompts[0]
    judge = Judge(model, generator.request([], COUPLED))
    answers = answers_of(generator, prompts, COUPLED)
    assert answers[0] != answers[1]
    assert not judge.judge(prompts[1], answers[1], copy=1).failures
    assert judge.judge(prompts[1], answers[1]).failures
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if number == 1:
            continue
        judged = judge.judge(prompt, answer)
        assert not judged.failures
        assert dtype == torch.bfloat16 or not judged.differences
        place = number % len(answer)
        # A rival that the filters keep may be within rounding by chance, one of the least probable is not.
        rival = int(logits_of(model, prompt, answer)[place].argmin())
        found = judge.judge(prompt, [*answer[:place], rival, *answer[place + 1 :]]).failures[0]
        assert (found.position, found.expected_token, found.actual_token) == (place, answer[place], rival)


def test_rounding_at_the_border_of_a_filter_is_not_held_against_an_answer() -> None:
    """Two of four tokens are kept; the second and the third are nearly equal, and the third has the greatest noise."""
    logits_TV, keys_T = torch.tensor([[3.0, 1.0, 0.999, -4.0]]).repeat(2000, 1), torch.rand(2000, dtype=torch.double)
    config = GenerationConfig(sample=True, sampling="coupled", temperature=1.0, top_k=2, top_p=1.0)
    for bound, has_ties in ((1e-4, False), (1e-2, True)):
        scores = Scores.coupled(logits_TV, torch.full((2000,), bound), config, keys_T)
        assert not (scores.exact_TV[:, 2:].isfinite()).any()
        found = [Judge._at(place, 2, scores) for place in range(2000)]
        assert any(one is not None and one.is_tie for one in found) == has_ties
        assert all(one is not None and (one.is_tie or one.margin > bound) for one in found)
    # Nor is what the filter may have left out: where the second has the greatest noise, the first may stand instead.
    found = [Judge._at(place, 0, scores) for place in range(2000)]
    assert all(one is None or one.is_tie for one in found)


def test_the_float32_copy_is_made_once_and_each_answer_is_read_once(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model().to(torch.bfloat16)
    generator, prompts = generator_of(model, tokenizer), make_prompts(2)
    judge = Judge(model, generator.request([], GREEDY))
    read = []
    judge.exact_model.register_forward_hook(lambda *_: read.append(1))
    answers = answers_of(generator, prompts, GREEDY)
    for _ in range(3):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert judge.judge(prompt, answer).num_tokens == len(answer)
    assert len(read) == 2
    assert (judge.exact_model.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    wide = make_model()
    assert Judge(wide, generator_of(wide, tokenizer).request([], GREEDY)).exact_model is wide


def test_logits_processors_are_applied(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy decoding without them is wrong by their rule."""
    generator, prompts = generator_of(model, tokenizer), make_prompts(6)
    config = GREEDY.generation(max_new_tokens=30, no_repeat_ngram_size=1)
    judge = Judge(model, generator.request([], config))
    answers = answers_of(generator, prompts, config)
    assert not [one for pair in zip(prompts, answers, strict=True) for one in judge.judge(*pair).differences]
    plain = answers_of(generator, prompts, GREEDY.generation(max_new_tokens=30))
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, plain, strict=True) if set(prompt) & set(answer)]
    assert pairs
    assert all(judge.judge(*pair).failures for pair in pairs)


def test_sampled_answers_are_not_judged(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    request = generator_of(model, tokenizer).request([], GREEDY.generation(sample=True))
    with pytest.raises(ValueError, match="distribution"):
        Judge(model, request)


def test_logits_that_are_no_numbers_are_wrong(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """No token is greater than NaN; decoding itself would refuse such a model."""
    model = make_model()
    generator, [prompt] = generator_of(model, tokenizer), make_prompts(1)
    [answer] = answers_of(generator, [prompt], GREEDY)
    model.lm_head.weight.data[:] = float("nan")
    assert len(Judge(model, generator.request([], GREEDY)).judge(prompt, answer).failures) == len(answer)


# The end


def test_an_answer_that_does_not_end_where_it_should_is_wrong(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """40 answers, some of which meet a stop: each one shorter, and one longer."""
    generator, prompts = generator_of(model, tokenizer), make_prompts(40)
    unstopped = answers_of(generator, prompts, GREEDY)
    stops = sorted({answer[5] for answer in unstopped[::4] if len(answer) > 5} - {1})
    config = GREEDY.generation(stop_token_ids=stops)
    judge = Judge(model, generator.request([], config))
    results = generator.generate(prompts, config)
    reasons = {str(result.stop_reason) for result in results}
    assert reasons >= {"stop_token", "max_steps"}
    for prompt, result in zip(prompts, results, strict=True):
        tokens = result.tokens
        assert not judge.judge(prompt, tokens).differences
        [early] = judge.judge(prompt, tokens[:-1]).failures
        assert early == Difference(len(tokens) - 1, tokens[-1], None)
        [late] = judge.judge(prompt, [*tokens, 7]).failures
        assert late == Difference(len(tokens), None, 7)
        assert judge.judge(prompt, [*tokens, 7]).num_tokens == len(tokens)


def test_stop_words_and_the_context_end_answers_too(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    generator, [prompt] = generator_of(model, tokenizer), make_prompts(1)
    [answer] = answers_of(generator, [prompt], GREEDY)
    word = tokenizer.decode(answer[3:5])
    config = GREEDY.generation(stop_words=[word])
    judge = Judge(model, generator.request([], config))
    [stopped] = answers_of(generator, [prompt], config)
    assert len(stopped) < len(answer)
    assert not judge.judge(prompt, stopped).differences
    assert [one.actual_token for one in judge.judge(prompt, answer).failures] == [answer[len(stopped)]]

    long = (prompt * 256)[:250]
    judge = Judge(model, generator.request([], GREEDY))
    [filled] = answers_of(generator, [long], GREEDY)
    assert not judge.judge(long, filled).differences
    assert judge.judge(long, filled[:-1]).failures


# Reports


def test_a_cell_s_verdict() -> None:
    """Ties in more than the share that may be are a failure, a wrong token or end always is."""
    tie, failure = Difference(3, 5, 6, 1e-7, 1e-6), Difference(3, 5, 6, 1e-5, 1e-6)
    end = Difference(3, 5, None)
    assert [difference.is_tie for difference in (tie, failure, end)] == [True, False, False]
    for most_ties, samples, is_correct in ((0.01, 100, True), (0.01, 99, False), (0.0, 1000, False), (1.0, 1, True)):
        cell = CellReport(1, 1, most_ties)
        cell.add(0, Judgement(8, (tie,)), is_as_expected=False)
        for sample in range(1, samples):
            cell.add(sample, Judgement(8), is_as_expected=True)
        assert cell.is_correct == is_correct
        assert (cell.num_ties, cell.num_failures, cell.num_tokens, cell.num_exact) == (
            1,
            0,
            8 * samples,
            8 * samples - 1,
        )
    for wrong in (failure, end):
        cell = CellReport(1, 1)
        cell.add(0, Judgement(8, (tie, wrong)), is_as_expected=True)
        assert (cell.is_correct, cell.num_ties, cell.num_failures, cell.num_wrong) == (False, 0, 1, 1)
        assert cell.num_exact == 8 - len({tie, wrong} - {end})
        assert cell.largest_tie == tie
        found = json.loads(json.dumps(cell.as_json()))
        assert (found["wrong"], found["tokens_within_rounding"], found["largest_margin"]) == (1, 1, 1e-7)
        assert [one["sample"] for one in found["differences"]] == [0, 0]


def test_the_noise_floor_reads_the_answers_again(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """In float64 nothing changes at any width, whatever else is in the batch; an altered token is seen."""
    model, prompts = make_model(), make_prompts(5)
    generator, kernels = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)), TorchKernels(model)
    for config in (GREEDY, GREEDY.generation(no_repeat_ngram_size=2)):
        request = generator.request(prompts, config)
        answers = answers_of(generator, prompts, config)
        answers[1] = answers[1][:5]
        for width in (1, 2, 5, 20):
            assert read_again(kernels, request, answers, width) == answers
    altered = [list(answer) for answer in answers]
    altered[0][2] = answers[0][2] + 1
    again = read_again(kernels, request, altered, 4)
    assert again[0][:3] == answers[0][:3]
    assert again[1:] == answers[1:]
    floor = NoiseFloor(3)
    for tokens, at_width in zip(altered[1:], again[1:], strict=True):
        floor.add(tokens, at_width)
    floor.add([1, 2, 3, 4], [1, 5, 3, 6])
    assert (floor.answers, floor.changed_answers, floor.changed_tokens) == (5, 1, 2)
    assert "read 4 tokens at a time" in floor.sentence()


def test_in_exact_mode_there_is_no_noise(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """In bfloat16 too, and where an exit adapter has a cache of its own."""
    model = make_model().bfloat16()
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, 2).eval())
    config = GREEDY.generation(exact=True, exit_layer=2)
    check = EquivalenceCheck(model, tokenizer, config, [CellReport(2, 3, most_ties=0.0)])
    for _ in check.run(["def add(", "class", "for i in range"]):
        pass
    [cell], [floor] = check.cells, check.noise_floors
    assert (cell.num_samples, cell.num_ties, cell.num_failures) == (3, 0, 0)
    assert (floor.answers, floor.changed_tokens) == (3, 0)


@pytest.mark.slow
def test_a_real_model_passes_in_16_bits(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M-Instruct, whose answers often differ by rounding."""
    model = os.environ.get("LAYERSKIP_SMOLLM2")
    if not model:
        pytest.skip("LAYERSKIP_SMOLLM2 is not set")
    flags = ["--model", model, "--dtype", "bfloat16", "--num_samples", 3, "--max_steps", 16]
    assert run(correctness.main, *flags, "--exit_layer", 20, "--num_speculations", 4) == 0
    found = json.loads((tmp_path / "logs" / "correctness.json").read_text())
    assert found["dtype"] == "torch.bfloat16"
    assert all(cell["tokens"] > 0 == cell["wrong"] for cell in found["cells"])
    assert "PASS: 3 runs" in capsys.readouterr().out
