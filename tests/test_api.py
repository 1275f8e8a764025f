"""The three lines of the façade: what it offers, what it fills in, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, TextStreamer

import self_speculation
from self_speculation import AutoregressiveStrategy, GenerationConfig, HuggingfaceLlamaGenerator, generate, load

PROMPTS = ["def add(a, b):", "class Stack:"]


def test_every_name_that_is_offered_is_there() -> None:
    assert {name for name in self_speculation.__all__ if getattr(self_speculation, name) is None} == set()
    assert set(self_speculation.__all__) <= set(dir(self_speculation))
    with pytest.raises(AttributeError, match="no attribute 'speculate'"):
        self_speculation.speculate  # noqa: B018


def test_one_prompt_gives_one_result_and_a_list_a_list(folder: Path) -> None:
    model, tokenizer = load(folder, dtype="float64")
    settings = {"max_new_tokens": 12, "sample": False}
    plain = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    expected = plain.generate(PROMPTS, GenerationConfig(**settings))
    together = generate(model, tokenizer, PROMPTS, **settings)
    alone = [generate(model, tokenizer, prompt, **settings) for prompt in PROMPTS]
    assert [result.tokens for result in together] == [result.tokens for result in expected]
    assert [result.tokens for result in alone] == [result.tokens for result in expected]


def test_a_bare_text_is_one_prompt_and_no_prompts_have_no_answers(folder: Path) -> None:
    model, tokenizer = load(folder, dtype="float64")
    config = GenerationConfig(max_new_tokens=5, sample=False)
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    [result] = generator.generate(PROMPTS[0], config)
    assert result.tokens == generator.generate(PROMPTS[:1], config)[0].tokens
    assert generator.generate([], config) == []
    assert generate(model, tokenizer, [], max_new_tokens=5) == []


@pytest.mark.parametrize("token", [-1, 300, 2**70, 1.0, True, "a", None])
def test_ids_of_no_token_are_refused(token: object, model: LlamaForCausalLM, folder: Path) -> None:
    _, tokenizer = load(folder)
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    with pytest.raises(ValueError, match=r"The prompt's token id .* is none of the model's: 0 to 299"):
        generator.generate([[5, token]], GenerationConfig(max_new_tokens=1))
    with pytest.raises(ValueError, match="A prompt must be a text or a list of token ids, not 5"):
        generator.generate([5, 6], GenerationConfig(max_new_tokens=1))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stop_words": ["x", "y" * 10_001]}, "--stop_words must have at most 10000 characters each, not 10001"),
        ({"stop_words": "end"}, "--stop_words must be a list of strings, not 'end'"),
        ({"stop_words": [b"end"]}, "--stop_words must be a list of strings"),
        ({"exit_layer": "9:2"}, "--exit_layer must be a number or auto, not '9:2'"),
        ({"num_speculations": [4]}, r"--num_speculations must be a number or auto, not \[4\]"),
        ({"max_new_tokens": "many"}, "--max_steps must be a number, not 'many'"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, object], sentence: str) -> None:
    assert GenerationConfig(stop_words=["x" * 10_000]).stop_words
    with pytest.raises(ValueError, match=sentence):
        GenerationConfig(**settings)


def test_what_is_not_given_is_chosen(folder: Path) -> None:
    """What is given stays."""
    model, tokenizer = load(folder, dtype="float64")
    chosen = generate(model, tokenizer, PROMPTS[0], max_new_tokens=6, sample=False)
    assert all(step.cell is not None for step in chosen.steps)
    given = {"exit_layer": 6, "num_speculations": 4}
    all_layers = generate(model, tokenizer, PROMPTS[0], max_new_tokens=6, sample=False, **given)
    assert chosen.tokens == all_layers.tokens
    assert [len(step.tokens) for step in all_layers.steps] == [5, 1]
    plain = generate(model, tokenizer, PROMPTS[0], max_new_tokens=5, generation_strategy="autoregressive")
    assert plain.num_drafted == 0


def test_load_hands_options_to_from_pretrained(folder: Path) -> None:
    model, _ = load(folder, device="cpu", dtype="float32", num_hidden_layers=3)
    assert (model.config.num_hidden_layers, model.dtype) == (3, torch.float32)


def test_an_answer_is_streamed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(folder)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = generate(model, tokenizer, PROMPTS[0], streamer, max_new_tokens=8, sample=False)
    assert capsys.readouterr().out == result.text + "\n"


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda model, tokenizer: generate(model, tokenizer, "x", max_new_tokens=-1), ValueError),
        (lambda model, tokenizer: generate(model, tokenizer, "x", exit_layer=7), ValueError),
        (lambda model, tokenizer: generate(model, tokenizer, "x", beams=2), TypeError),
        (lambda model, tokenizer: load("no/such/folder"), ValueError),
    ],
    ids=["limit", "layer", "name", "model"],
)
def test_mistakes_are_refused(
    ask: Callable[..., object], error: type[Exception], model: LlamaForCausalLM, folder: Path
) -> None:
    _, tokenizer = load(folder)
    with pytest.raises(error):
        ask(model, tokenizer)
