"""A model as one object: texts in, texts out; pieces, chats, and errors that speak of arguments."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from chats import chatting
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation import (
    AutoregressiveStrategy,
    Chat,
    GenerationConfig,
    GenerationResult,
    HuggingfaceLlamaGenerator,
    LayerSkip,
)
from self_speculation.decoding.cell import FREE
from self_speculation.kept_strategies import KeptStrategies

PROMPT = "def add(a, b):"
PROMPTS = [PROMPT, "class Näme:", "for"]
SETTINGS = {"max_new_tokens": 24, "sample": False}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]


@pytest.fixture
def llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LayerSkip:
    return LayerSkip(model, tokenizer)


@pytest.fixture
def expected(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[GenerationResult]:
    """What the full model answers, token by token."""
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    return generator.generate(PROMPTS, GenerationConfig(**SETTINGS))


def test_a_text_gives_a_text_and_a_list_a_list(llm: LayerSkip, expected: list[GenerationResult]) -> None:
    texts = [result.text for result in expected]
    assert llm.generate(PROMPT, **SETTINGS) == texts[0]
    assert llm.generate(PROMPTS, **SETTINGS) == texts
    assert llm.generate(tuple(PROMPTS), batch_size=2, **SETTINGS) == texts
    ids = [llm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert llm.generate(ids, **SETTINGS) == texts
    assert llm.generate([], **SETTINGS) == []


def test_details_have_the_figures(llm: LayerSkip, expected: list[GenerationResult]) -> None:
    results = llm.generate(PROMPTS, details=True, exit_layer=2, num_speculations=3, **SETTINGS)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert max(len(step.drafted) for step in results[0].steps) == 3
    alone = llm.generate(PROMPT, details=True, num_speculations=3, **SETTINGS)
    assert {len(step.drafted) for step in alone.steps if step.cell.exit_layer != FREE} <= {0, 1, 2, 3}
    with_auto = llm.generate(PROMPT, details=True, exit_layer="auto", num_speculations="auto", **SETTINGS)
    assert alone.tokens == with_auto.tokens == expected[0].tokens
    assert {step.cell.exit_layer for step in with_auto.steps} <= {FREE, 1, 2, 3}


def test_a_model_is_found_by_its_name(folder: Path, expected: list[GenerationResult]) -> None:
    llm = LayerSkip.from_pretrained(folder, device="cpu", dtype="float64", ignore_generation_config=True)
    assert llm.generate(PROMPTS, **SETTINGS) == [result.text for result in expected]
    assert LayerSkip.from_pretrained(folder, num_hidden_layers=3).model.config.num_hidden_layers == 3


@pytest.mark.parametrize("stop_words", [None, ["\n"], ["qqqqqqqqqq"]])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_are_the_text_and_final(prompt: str, stop_words: list[str] | None, llm: LayerSkip) -> None:
    whole = llm.generate(prompt, stop_words=stop_words, **SETTINGS)
    pieces = list(llm.stream(prompt, stop_words=stop_words, **SETTINGS))
    assert "".join(pieces) == whole
    assert "" not in pieces


def test_a_loop_over_pieces_may_be_left(make_model: Callable[..., LlamaForCausalLM], llm: LayerSkip) -> None:
    own = LayerSkip(make_model(), llm.tokenizer)
    whole = own.generate(PROMPT, **SETTINGS)
    for _ in islice(own.stream(PROMPT, **SETTINGS), 2):
        pass
    pieces: list[Iterator[str]] = [own.stream(PROMPT, **SETTINGS) for _ in range(2)]
    assert [next(each) for each in pieces] == [whole[: len(next(own.stream(PROMPT, **SETTINGS)))]] * 2
    # Two that are open at once do not disturb each other, nor a third answer.
    assert own.generate(PROMPT, **SETTINGS) == whole
    rest = ["".join(each) for each in pieces]
    assert [whole.endswith(text) for text in rest] == [True, True]


def test_a_strategy_comes_back_after_a_mistake(make_model: Callable[..., LlamaForCausalLM], llm: LayerSkip) -> None:
    own = LayerSkip(make_model(), llm.tokenizer)
    own.generate(PROMPT, max_new_tokens=1)
    [[strategy]] = KeptStrategies.of(own.model).idle.values()
    for ask in (own.generate, own.stream):
        with pytest.raises(ValueError, match="the prompt has"):
            ask(PROMPT * 99)
    assert KeptStrategies.of(own.model).idle == {type(strategy): [strategy]}


def test_a_chat_is_answered_in_the_template(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(vocab_size=301)
    llm = LayerSkip(model, chatting(tokenizer))
    config = GenerationConfig(**SETTINGS)
    chat = Chat(llm.tokenizer, AutoregressiveStrategy(model), config, system="Be brief.")
    expected = chat.say("def add(a, b):")
    assert llm.chat(MESSAGES, **SETTINGS) == expected.text
    assert "".join(llm.stream(MESSAGES, **SETTINGS)) == expected.text
    assert llm.chat(MESSAGES, details=True, **SETTINGS).tokens == expected.tokens
    # What was said is cached: of the same messages but the last token is read.
    [strategy] = next(iter(KeptStrategies.of(model).idle.values()))[-1:]
    assert strategy.num_cached > 0


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda llm: llm.generate(PROMPT, exit_layer=7), "^exit_layer must lie between 1 and 6"),
        (lambda llm: llm.stream(PROMPT, exit_layer=7), "^exit_layer must lie between 1 and 6"),
        (lambda llm: llm.generate(PROMPT, max_new_tokens=-1), "^max_new_tokens must be at least 0"),
        (lambda llm: llm.generate(PROMPT, temperature=0.0), "^temperature must be positive, not 0.0; sample False"),
        (lambda llm: llm.generate(PROMPT * 99), "^prompt: the prompt has .* the model's context is 256"),
        (lambda llm: llm.stream(PROMPT * 99), "^prompt: the prompt has"),
        (lambda llm: llm.generate([PROMPT, 5]), "^A prompt must be a text or a list of token ids, not 5"),
        (lambda llm: llm.chat(MESSAGES), r"^chat\(\): the model has no chat template"),
        (lambda llm: LayerSkip.from_pretrained("no/such"), "^model no/such is neither a folder nor"),
        (lambda llm: LayerSkip.from_pretrained(dtype="int8"), "^dtype must be one of"),
        (lambda llm: llm.generate(PROMPT, generation_strategy="beam"), "^generation_strategy must be one of"),
    ],
)
def test_mistakes_speak_of_arguments(ask: Callable[[LayerSkip], object], sentence: str, llm: LayerSkip) -> None:
    with pytest.raises(ValueError, match=sentence):
        ask(llm)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beams'"):
        llm.generate(PROMPT, beams=2)
