"""transformers' `generate` as a strategy: our tokens, stops, drafts and counts; a clock; and a model left as it was."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.stopping import StopReason, StopRule
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStep,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    RowStep,
)
from self_speculation.measuring.contestants import Contestant
from self_speculation.measuring.rivals import (
    HuggingfaceEarlyExitStrategy,
    HuggingfaceStaticStrategy,
    HuggingfaceStrategy,
)
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

NUM_LAYERS = 6
# Its first token, 0, is the tokenizer's first: what takes 0 for padding drafts from another prompt.
PROMPT = [0, 5, 6, 7, 8, 9, 30, 40]
CELLS = list(product((1, 3, NUM_LAYERS), (1, 4)))
RIVALS = [(HuggingfaceStrategy, None, None), *((HuggingfaceEarlyExitStrategy, E, d) for E, d in CELLS)]

each_rival = pytest.mark.parametrize(
    ("rival", "exit_layer", "num_speculations"), RIVALS, ids=lambda value: str(getattr(value, "__name__", value))
)
each_kind = pytest.mark.parametrize("rival", [HuggingfaceStrategy, HuggingfaceEarlyExitStrategy])


def make_request(
    prompt: list[int],
    end_ids: tuple[int, ...] = (),
    processors: tuple[LogitsProcessor, ...] = (),
    **fields: object,
) -> GenerationRequest:
    """A greedy request for one prompt; the model's own end token is 1. The text of an answer is its ids in brackets."""
    config = GenerationConfig(
        **{"max_new_tokens": 12, "sample": False, "exit_layer": 3, "num_speculations": 4} | fields
    )
    rule = StopRule(
        frozenset({1, *end_ids}),
        frozenset(config.stop_token_ids or ()),
        tuple(config.stop_words or ()),
        lambda tokens: "".join(f"<{token}>" for token in tokens),
    )
    return GenerationRequest([prompt], config, rule, LogitsProcessorList(processors))


def rows_of(strategy: GenerationStrategy, request: GenerationRequest) -> list[RowStep]:
    """The one row's steps, prefill's first."""
    return [row for step in strategy.steps(request) for row in step.rows]


def tokens_of(rows: list[RowStep]) -> list[int]:
    return [token for row in rows for token in row.tokens]


def until_end(row: RowStep, end_ids: tuple[int, ...]) -> RowStep:
    """transformers drafts nothing after a drafted end token; we draft on."""
    ends = [index for index, token in enumerate(row.drafted) if token in (1, *end_ids)]
    return replace(row, drafted=row.drafted[: ends[0] + 1]) if ends else row


@pytest.fixture(scope="module")
def answer(model: LlamaForCausalLM) -> list[int]:
    """Twelve tokens that nothing stops."""
    return tokens_of(rows_of(AutoregressiveStrategy(model), make_request(PROMPT)))


# The answer, 12 tokens of it without a stop → what stops it, and why it then ends.
STOPS: dict[str, tuple[Callable[[list[int]], dict[str, Any]], StopReason]] = {
    "no token": (lambda answer: {"max_new_tokens": 0}, StopReason.MAX_STEPS),
    "one token": (lambda answer: {"max_new_tokens": 1}, StopReason.MAX_STEPS),
    "two tokens": (lambda answer: {"max_new_tokens": 2}, StopReason.MAX_STEPS),
    "twelve tokens": (lambda answer: {"max_new_tokens": 12}, StopReason.MAX_STEPS),
    "an end token": (lambda answer: {"end_ids": (answer[6],)}, StopReason.END_OF_SEQUENCE),
    "the first of several end tokens": (
        lambda answer: {"end_ids": (1, answer[7], answer[4])},
        StopReason.END_OF_SEQUENCE,
    ),
    "an end token at once": (lambda answer: {"end_ids": (answer[0],)}, StopReason.END_OF_SEQUENCE),
    "a stop token before an end token": (
        lambda answer: {"stop_token_ids": [2, answer[4]], "end_ids": (answer[7],)},
        StopReason.STOP_TOKEN,
    ),
    "a stop word across tokens": (
        lambda answer: {"stop_words": ["nowhere", f"{answer[3]}><{answer[4]}"], "end_ids": (answer[7],)},
        StopReason.STOP_WORD,
    ),
    "a stop word at the last token": (lambda answer: {"stop_words": [f"><{answer[11]}>"]}, StopReason.STOP_WORD),
    "context": (lambda answer: {"max_new_tokens": 200, "prompt_length": 250}, StopReason.LENGTH),
    "room for one token": (lambda answer: {"max_new_tokens": 200, "prompt_length": 255}, StopReason.LENGTH),
    "no bigram twice": (lambda answer: {"no_repeat_ngram_size": 2}, StopReason.MAX_STEPS),
    "no token twice": (lambda answer: {"no_repeat_ngram_size": 1}, StopReason.MAX_STEPS),
}


@pytest.mark.parametrize("name", STOPS)
@each_rival
def test_the_answer_is_ours_and_so_are_its_steps(
    rival: type[GenerationStrategy],
    exit_layer: int | None,
    num_speculations: int | None,
    name: str,
    model: LlamaForCausalLM,
    answer: list[int],
) -> None:
    """Tokens and reason are those of autoregressive decoding; drafts and counts those of our drafting."""
    make_fields, reason = STOPS[name]
    fields = make_fields(answer)
    length = fields.pop("prompt_length", len(PROMPT))
    prompt = (PROMPT * 40)[:length]
    request = make_request(prompt, exit_layer=exit_layer, num_speculations=num_speculations, **fields)
    expected = rows_of(AutoregressiveStrategy(model), request)
    found = rows_of(rival(model), request)
    assert tokens_of(found) == tokens_of(expected)
    assert len(tokens_of(found)) <= min(request.config.max_new_tokens, 256 - length)
    assert found[-1].stop_reason == expected[-1].stop_reason == reason
    assert not any(row.stop_reason for row in found[:-1])
    if exit_layer is None:
        assert found == expected
    else:
        ours = rows_of(SelfSpeculativeStrategy(model), request)
        end_ids = (*fields.get("end_ids", ()), *fields.get("stop_token_ids", ()))
        assert found == [until_end(row, end_ids) for row in ours]


@pytest.mark.parametrize("prompt", [[5], [0, 5, 0, 1, 7]], ids=len)
@pytest.mark.parametrize(("exit_layer", "num_speculations"), [(2, 3), (NUM_LAYERS, 1), (NUM_LAYERS, 4)])
def test_transformers_drafts_what_we_draft(
    exit_layer: int, num_speculations: int, prompt: list[int], model: LlamaForCausalLM
) -> None:
    """Every draft, real ids, accepted or not; whatever special tokens the prompt has."""
    request = make_request(prompt, max_new_tokens=10, exit_layer=exit_layer, num_speculations=num_speculations)
    ours, found = (rows_of(kind(model), request) for kind in (SelfSpeculativeStrategy, HuggingfaceEarlyExitStrategy))
    assert found == [until_end(row, ()) for row in ours]
    assert len(found) > 10 / (num_speculations + 1)
    assert all(len(row.drafted) <= num_speculations for row in found)
    if exit_layer == NUM_LAYERS:
        assert sum(row.accepted for row in found) == sum(len(row.drafted) for row in found)


def test_a_draft_ends_at_an_end_token(model: LlamaForCausalLM, answer: list[int]) -> None:
    """The one way in which transformers' drafts are fewer than ours: nothing is lost, as nothing after it can count."""
    ours = rows_of(SelfSpeculativeStrategy(model), make_request(PROMPT))
    end = next(token for row in ours for token in row.drafted[:-1] if token not in answer)
    request = make_request(PROMPT, end_ids=(end,))
    found = rows_of(HuggingfaceEarlyExitStrategy(model), request)
    assert found == [until_end(row, (end,)) for row in ours] != ours


def test_no_drafts_are_asked_for(model: LlamaForCausalLM) -> None:
    request = make_request(PROMPT, num_speculations=0)
    found = rows_of(HuggingfaceEarlyExitStrategy(model), request)
    assert found == rows_of(AutoregressiveStrategy(model), request)


# Batches

OTHER_PROMPTS = [[5, 60], [9, 8, 7, 6, 5, 4, 3, 2, 10, 11, 12], [200]]


def by_row(strategy: GenerationStrategy, request: GenerationRequest) -> list[list[RowStep]]:
    """Each row's own steps: those that were not empty, for it had ended."""
    rows = zip(*(step.rows for step in strategy.steps(request)), strict=True)
    return [[step for step in row if step not in (None, RowStep())] for row in rows]


def batch_of(prompts: list[list[int]], **fields: object) -> GenerationRequest:
    return replace(make_request(PROMPT, **fields), prompts=prompts)


BATCH_STOPS = [name for name, (_, reason) in STOPS.items() if reason != StopReason.LENGTH and "twice" not in name]


@pytest.mark.parametrize("name", BATCH_STOPS)
def test_a_padded_batch_has_the_answers_of_its_rows(name: str, model: LlamaForCausalLM, answer: list[int]) -> None:
    """One row stops where the answer says, the others by themselves; ours, in a batch and alone."""
    fields = STOPS[name][0](answer)
    prompts = [OTHER_PROMPTS[0], PROMPT, *OTHER_PROMPTS[1:]]
    request = batch_of(prompts, **fields)
    found = by_row(HuggingfaceStrategy(model), request)
    assert found == by_row(AutoregressiveStrategy(model), request)
    alone = [by_row(HuggingfaceStrategy(model), replace(request, prompts=[prompt])) for prompt in prompts]
    assert found == [row for [row] in alone]


def test_a_row_of_a_batch_ends_with_the_context(model: LlamaForCausalLM) -> None:
    request = batch_of([(PROMPT * 40)[:250], PROMPT], max_new_tokens=12)
    found = by_row(HuggingfaceStrategy(model), request)
    assert found == by_row(AutoregressiveStrategy(model), request)
    assert [len(tokens_of(row)) for row in found] == [6, 12]
    assert [row[-1].stop_reason for row in found] == [StopReason.LENGTH, StopReason.MAX_STEPS]


@pytest.mark.parametrize("has_own", [False, True], ids=["ngrams", "a processor"])
def test_processors_do_not_see_padding(has_own: bool, model: LlamaForCausalLM) -> None:
    given = {"processors": (Clock(),)} if has_own else {"no_repeat_ngram_size": 2}
    with pytest.raises(ValueError, match="need --batch_size 1"):
        by_row(HuggingfaceStrategy(model), batch_of([PROMPT, PROMPT], **given))


# Compiled


Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]


def noting(graphs: list[GraphModule]) -> Backend:
    """A backend of torch.compile that notes the graphs it is given, and runs them as they are."""

    def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return compile_graph


@pytest.fixture
def small_model(make_model: Callable[..., LlamaForCausalLM]) -> Iterator[LlamaForCausalLM]:
    """One layer, and nothing that torch has compiled before or keeps afterwards."""
    torch.compiler.reset()
    yield make_model(num_hidden_layers=1)
    torch.compiler.reset()


def state_of(model: LlamaForCausalLM) -> dict[str, object]:
    """What could be left on a model, without what fuses it."""
    return vars(model) | {"generation": model.generation_config.to_dict(), "config": model.config.to_dict()}


def test_a_static_cache_s_step_is_compiled_once(small_model: LlamaForCausalLM) -> None:
    """For the longest prompt; shorter ones, stops and processors take the same step, and the model keeps nothing."""
    graphs, own = [], state_of(small_model)
    static = HuggingfaceStaticStrategy(small_model, noting(graphs))
    requests = [make_request(PROMPT), make_request(PROMPT[:3]), make_request(PROMPT, no_repeat_ngram_size=2)]
    plain = HuggingfaceStrategy(small_model)
    requests.append(make_request([5], stop_token_ids=[tokens_of(rows_of(plain, make_request([5])))[4]]))
    requests.append(make_request(PROMPT, max_new_tokens=1))
    for request in requests:
        assert rows_of(static, request) == rows_of(plain, request)
        assert state_of(small_model) == own
    assert len(graphs) == 1


def test_an_interrupted_static_cache_leaves_the_model_as_it_was(small_model: LlamaForCausalLM) -> None:
    graphs, own = [], state_of(small_model)
    static = HuggingfaceStaticStrategy(small_model, noting(graphs))
    request = make_request(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        rows_of(static, replace(request, logits_processors=LogitsProcessorList([Interruption(small_model)])))
    assert state_of(small_model) == own
    assert rows_of(static, request) == rows_of(AutoregressiveStrategy(small_model), request)
    assert len(graphs) == 1


def test_what_is_compiled_is_compiled_in_the_warm_up(
    small_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """And looking at the memory compiles nothing."""
    graphs: list[GraphModule] = []
    generator = HuggingfaceLlamaGenerator(tokenizer, HuggingfaceStaticStrategy(small_model, noting(graphs)))
    contestant = Contestant(
        generator, GenerationConfig(max_new_tokens=40, sample=False, generation_strategy="hf_static")
    )
    prompts = [PROMPT, *OTHER_PROMPTS]
    contestant.warm_up([max(prompts, key=len)] * len(prompts))
    assert len(graphs) == 1
    contestant.peak_bytes(prompts)
    answers = contestant.run(prompts)
    assert len(graphs) == 1
    ours = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(small_model))
    expected = ours.generate(prompts, contestant.config)
    assert [answer.tokens for answer in answers] == [result.tokens for result in expected]


def test_where_torch_cannot_compile_a_sentence_says_so(small_model: LlamaForCausalLM) -> None:
    def no_compiler(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise OSError("there is no compiler")

    own = state_of(small_model)
    with pytest.raises(ValueError, match=r"hf_static: torch\.compile does not work here \(.*there is no compiler"):
        rows_of(HuggingfaceStaticStrategy(small_model, no_compiler), make_request(PROMPT))
    assert state_of(small_model) == own


@pytest.mark.slow
def test_a_static_cache_compiled_by_inductor(make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Alone and in ragged batches of two sizes, the same answers in float64."""
    torch.compiler.reset()
    model = make_model(num_hidden_layers=2)
    static = HuggingfaceStaticStrategy(model)
    prompts = [PROMPT, *OTHER_PROMPTS]
    for batch in (prompts, *([prompt] for prompt in prompts), prompts[::-1]):
        found = by_row(static, batch_of(batch, max_new_tokens=24))
        assert found == by_row(HuggingfaceStrategy(model), batch_of(batch, max_new_tokens=24))
        assert [len(tokens_of(row)) for row in found] == [24] * len(batch)
    torch.compiler.reset()


# The clock


@each_kind
def test_seconds(rival: type[GenerationStrategy], model: LlamaForCausalLM) -> None:
    """The first step is the prefill, which comes with the first tokens; all of the time is somewhere, once."""
    start = time.perf_counter()
    first, *others = rival(model).steps(make_request(PROMPT))
    wall = time.perf_counter() - start
    assert first == GenerationStep([RowStep()], seconds=0.0)
    assert all(step.seconds > 0 for step in others)
    assert sum(step.seconds for step in others) <= wall


class Clock(LogitsProcessor):
    """Changes no logits; every token takes a second, and the fourth a hundred."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.now += 100.0 if input_ids.shape[1] == len(PROMPT) + 3 else 1.0
        return scores


def test_a_slow_token_s_seconds_are_its_own(model: LlamaForCausalLM) -> None:
    clock = Clock()
    rival = HuggingfaceStrategy(model, clock=lambda: clock.now)
    steps = list(rival.steps(make_request(PROMPT, processors=(clock,), max_new_tokens=8)))
    assert [step.seconds for step in steps] == [0, 1, 1, 1, 100, 1, 1, 1, 1]


@each_kind
def test_a_result_s_times(
    rival: type[GenerationStrategy], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = GenerationConfig(max_new_tokens=6, sample=False, exit_layer=2, num_speculations=2)
    [result] = HuggingfaceLlamaGenerator(tokenizer, rival(model)).generate([PROMPT], config)
    assert result.prefill_seconds == 0
    assert min(result.first_token_seconds, result.decode_seconds) > 0
    assert result.tokens == [token for step in result.steps for token in step.tokens]
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)


# What is left behind


class Interruption(LogitsProcessor):
    """Raises when it is called for the second time."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.num_calls = 0
        self.num_layers: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 2:
            self.num_layers = self.model.config.num_hidden_layers
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("is_interrupted", [False, True], ids=["to the end", "interrupted"])
@each_kind
def test_the_model_is_left_as_it_was(
    rival: type[GenerationStrategy], is_interrupted: bool, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    """Also when `generate` is interrupted in the middle of a draft."""
    model = make_model()
    own, values, config = model.generation_config, copy.deepcopy(model.generation_config), model.config.to_dict()
    random_state = torch.get_rng_state()
    request = make_request(PROMPT, sample=True, max_new_tokens=5)
    if is_interrupted:
        interruption = Interruption(model)
        with pytest.raises(KeyboardInterrupt):
            rows_of(rival(model), replace(request, logits_processors=LogitsProcessorList([interruption])))
        assert interruption.num_layers == (3 if rival is HuggingfaceEarlyExitStrategy else NUM_LAYERS)
    else:
        rows_of(rival(model), request)
    assert model.generation_config is own
    assert model.generation_config.to_dict() == values.to_dict()
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    greedy = make_request(PROMPT)
    assert tokens_of(rows_of(rival(model), greedy)) == tokens_of(rows_of(AutoregressiveStrategy(model), greedy))


# Sampling


@each_kind
def test_a_seed_is_an_answer(rival: type[GenerationStrategy], model: LlamaForCausalLM) -> None:
    answers = []
    for seed in (1, 1, 2):
        torch.rand(1)
        request = make_request(PROMPT, sample=True, temperature=1.0, top_p=1.0, seed=seed)
        answers.append(tokens_of(rows_of(rival(model), request)))
    assert answers[0] == answers[1] != answers[2]
    assert min(map(len, answers)) > 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sample": False, "temperature": 0.3}, {"do_sample": False}),
        (
            {"sample": True, "temperature": 0.3, "top_k": 7, "top_p": 0.8},
            {"do_sample": True, "temperature": 0.3, "top_k": 7, "top_p": 0.8},
        ),
        ({"sample": True}, {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}),
    ],
    ids=["greedy", "given", "defaults"],
)
@each_kind
def test_transformers_samples_as_told(
    rival: type[GenerationStrategy],
    fields: dict[str, object],
    expected: dict[str, object],
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: calls.append(kwargs) or generate(*args, **kwargs))
    rows_of(rival(model), make_request(PROMPT, max_new_tokens=3, **fields))
    names = ("do_sample", "temperature", "top_k", "top_p")
    assert {name: value for name, value in calls[0].items() if name in names} == expected


@pytest.mark.parametrize("top_k", [0, 1])
@each_kind
def test_sampling_from_one_token_is_greedy(
    rival: type[GenerationStrategy], top_k: int, model: LlamaForCausalLM, answer: list[int]
) -> None:
    """A top-k of 0 is all tokens, not transformers' default of 50."""
    sampled = make_request(PROMPT, sample=True, temperature=5.0, top_k=top_k, top_p=1.0)
    assert (tokens_of(rows_of(rival(model), sampled)) == answer) == (top_k == 1)


# Refusals


def test_several_prompts_are_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = HuggingfaceLlamaGenerator(tokenizer, HuggingfaceEarlyExitStrategy(model))
    config = GenerationConfig(max_new_tokens=2, sample=False, exit_layer=2, num_speculations=2)
    with pytest.raises(ValueError, match="takes one prompt at a time, not 2"):
        generator.generate([PROMPT, PROMPT], config)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"exit_layer": 7}, "--exit_layer"),
        ({"exit_layer": None}, "--exit_layer"),
        ({"num_speculations": None}, "--num_speculations"),
    ],
)
def test_early_exit_needs_its_settings(fields: dict[str, object], flag: str, model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=flag):
        rows_of(HuggingfaceEarlyExitStrategy(model), make_request(PROMPT, **fields))
