"""Where answers end: limits, end tokens, stop tokens and stop strings, and that nothing after the end is shown.

Besides the random Llama there is a *chain* model that recites one text and accepts every draft, so that stops fall
inside accepted runs and every expected value can be written down.
"""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TextStreamer

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.stopping import StopReason, StopRule
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    RowStep,
)
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

TEXT = "vwxyzSTOP漢字🙂ABC?"
PROMPT_LENGTHS = (1, 4, 62, 9)


@pytest.fixture(scope="module")
def script(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the text that the chain model recites, no two alike."""
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(set(tokens)) == len(tokens) > len(TEXT)
    assert tokenizer.convert_ids_to_tokens(tokens)[:9] == list("vwxyzSTOP")
    return tokens


@pytest.fixture
def chain_model(make_model: Callable[..., LlamaForCausalLM], script: list[int]) -> LlamaForCausalLM:
    """A Llama whose layers are the identity and whose head maps each token of the script to the next, in a circle."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions_VD = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[script[1:] + script[:1]] = directions_VD[script]
    return model


def run(
    strategy: GenerationStrategy, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **fields: object
) -> list[GenerationResult]:
    config = GenerationConfig(
        **{"max_new_tokens": 12, "sample": False, "exit_layer": 5, "num_speculations": 3} | fields
    )
    return HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def endless_model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """The random Llama with an end token that it never produces."""
    model = make_model(eos_token_id=0, initializer_range=0.25)
    with torch.no_grad():
        model.lm_head.weight[:2] = 0
    model.generation_config.eos_token_id = 0
    return model


@pytest.fixture(scope="module")
def unstopped(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Twelve autoregressive tokens for each prompt."""
    results = run(AutoregressiveStrategy(endless_model), tokenizer, make_prompts())
    assert [len(result.tokens) for result in results] == [12] * len(PROMPT_LENGTHS)
    return [result.tokens for result in results]


# Limits


@pytest.mark.parametrize("num_speculations", [0, 1, 8])
@pytest.mark.parametrize("max_new_tokens", [0, 1, 2])
def test_max_steps(
    max_new_tokens: int,
    num_speculations: int,
    endless_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    unstopped: list[list[int]],
) -> None:
    for strategy in (AutoregressiveStrategy, SelfSpeculativeStrategy):
        fields = {"max_new_tokens": max_new_tokens, "num_speculations": num_speculations}
        results = run(strategy(endless_model), tokenizer, make_prompts(), **fields)
        assert [result.tokens for result in results] == [tokens[:max_new_tokens] for tokens in unstopped]
        assert {result.stop_reason for result in results} == {StopReason.MAX_STEPS}
        for result in results:
            assert len(result.steps) <= max_new_tokens
            assert result.num_drafted <= max(max_new_tokens - 1, 0)
            assert (result.text == "") == (max_new_tokens == 0)


@pytest.mark.parametrize("num_speculations", [0, 1, 8])
def test_context_limit(
    num_speculations: int,
    endless_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    unstopped: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows end at the context, with drafts that reach past it; the last row has room for all it may generate."""
    monkeypatch.setattr(endless_model.config, "max_position_embeddings", 66)
    for strategy in (AutoregressiveStrategy, SelfSpeculativeStrategy):
        results = run(strategy(endless_model), tokenizer, make_prompts(), num_speculations=num_speculations)
        assert [len(result.tokens) for result in results] == [12, 12, 4, 12]
        assert [result.tokens for result in results] == [
            tokens[: len(result.tokens)] for tokens, result in zip(unstopped, results, strict=True)
        ]
        reasons = [StopReason.MAX_STEPS, StopReason.MAX_STEPS, StopReason.LENGTH, StopReason.MAX_STEPS]
        assert [result.stop_reason for result in results] == reasons
        alone = run(strategy(endless_model), tokenizer, make_prompts()[2:3], num_speculations=num_speculations)
        assert (alone[0].tokens, alone[0].stop_reason) == (unstopped[2][:4], StopReason.LENGTH)
        assert alone[0].steps == results[2].steps


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "--prompt: the prompt is empty"),
        ([5] * 256, "--prompt: the prompt has 256 tokens; the model's context is 256"),
        ("a" * 300, "the model's context is 256"),
    ],
)
def test_unusable_prompts(
    prompt: str | list[int], sentence: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(AutoregressiveStrategy(model), tokenizer, [[5], prompt])
    assert len(run(AutoregressiveStrategy(model), tokenizer, [[5] * 255])[0].tokens) == 1


# Stops, recited


@pytest.mark.parametrize(
    ("stops", "recited", "text", "reason"),
    [
        ({"stop_words": ["STOP"]}, "wxyzSTOP", "wxyz", StopReason.STOP_WORD),
        ({"stop_words": ["zS"]}, "wxyzS", "wxy", StopReason.STOP_WORD),
        ({"stop_words": ["P漢", "OP"]}, "wxyzSTOP", "wxyzST", StopReason.STOP_WORD),
        ({"stop_words": ["字"]}, "wxyzSTOP漢字", "wxyzSTOP漢", StopReason.STOP_WORD),
        ({"stop_words": ["w"]}, "w", "", StopReason.STOP_WORD),
        ({"stop_words": ["vw"]}, TEXT[1:], TEXT[1:], StopReason.MAX_STEPS),  # the prompt does not count
        ({"stop_tokens": "Ty"}, "wxy", "wx", StopReason.STOP_TOKEN),  # first in the text, not first in the list
        ({"config": "Ty"}, "wxy", "wx", StopReason.END_OF_SEQUENCE),
        ({"generation_config": "Ty"}, "wxy", "wx", StopReason.END_OF_SEQUENCE),
        ({"tokenizer": "y"}, "wxy", "wx", StopReason.END_OF_SEQUENCE),
        ({"config": "T", "generation_config": "z", "tokenizer": "O"}, "wxyz", "wxy", StopReason.END_OF_SEQUENCE),
        ({"config": "O", "stop_tokens": "S"}, "wxyzS", "wxyz", StopReason.STOP_TOKEN),
        ({"config": "O", "stop_words": ["STO"]}, "wxyzSTO", "wxyzST", StopReason.END_OF_SEQUENCE),
        ({"config": "O", "stop_words": ["ST"]}, "wxyzST", "wxyz", StopReason.STOP_WORD),
    ],
)
def test_stops(
    stops: dict[str, str | list[str]],
    recited: str,
    text: str,
    reason: StopReason,
    chain_model: LlamaForCausalLM,
    script: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Token by token and inside accepted runs: the same cut, the same reason, and no count goes beyond it."""
    tokenizer = deepcopy(tokenizer)
    if "tokenizer" in stops:
        tokenizer.eos_token = stops["tokenizer"]
    for source in ("config", "generation_config"):
        getattr(chain_model, source).eos_token_id = tokenizer.convert_tokens_to_ids(list(stops.get(source, [])))
    fields = {
        "max_new_tokens": len(script) - 1,
        "stop_words": stops.get("stop_words"),
        "stop_token_ids": tokenizer.convert_tokens_to_ids(list(stops.get("stop_tokens", []))),
    }
    expected = tokenizer.encode(recited, add_special_tokens=False)
    for num_speculations in (None, 0, 1, 3, 8, 40):
        strategy = AutoregressiveStrategy if num_speculations is None else SelfSpeculativeStrategy
        fields |= {"num_speculations": num_speculations, "exit_layer": 2}
        (result,) = run(strategy(chain_model), tokenizer, [script[:1]], **fields)
        assert (result.tokens, result.text, result.stop_reason) == (expected, text, reason)
        if num_speculations:
            num_steps = -(-len(expected) // (num_speculations + 1))
            # Of every step all tokens were drafted but the last, the bonus token, if it came to that.
            assert len(result.steps) == num_steps
            assert result.num_drafted == result.num_accepted
            assert len(expected) - num_steps <= result.num_accepted <= len(expected)


@pytest.mark.parametrize(
    ("num_speculations", "step"),
    [
        (8, ("wxy", 3, "wxy")),  # the stop is a drafted token: what was drafted after it does not count
        (3, ("wxy", 3, "wxy")),
        (2, ("wx", 2, "wxy")),  # the stop is the bonus token
    ],
)
def test_counts_end_at_the_stop(
    num_speculations: int,
    step: tuple[str, int, str],
    chain_model: LlamaForCausalLM,
    script: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    drafted, accepted, tokens = step
    ids = tokenizer.convert_tokens_to_ids
    fields = {"num_speculations": num_speculations, "stop_token_ids": [ids("y")]}
    (result,) = run(SelfSpeculativeStrategy(chain_model), tokenizer, [script[:1]], **fields)
    assert result.steps == [RowStep(ids(list(drafted)), accepted, ids(list(tokens)), StopReason.STOP_TOKEN)]
    assert not result.steps[0].is_rejected


# Stops in the middle of drafts that are partly rejected


@pytest.mark.parametrize("position", [0, 4, 8])
def test_stops_of_a_random_model(
    position: int, endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, unstopped: list[list[int]]
) -> None:
    """Rows stop one after another, the first at `position`; each as it does alone, with the same steps."""
    stop_ids = [unstopped[0][position], unstopped[1][0]]
    stop_word = tokenizer.decode(unstopped[3][position : position + 1])
    fields = {"stop_token_ids": stop_ids, "stop_words": [stop_word] if stop_word.isascii() else None}
    expected = run(AutoregressiveStrategy(endless_model), tokenizer, make_prompts(), **fields)
    for num_speculations in (1, 8):
        strategy = SelfSpeculativeStrategy(endless_model)
        fields["num_speculations"] = num_speculations
        results = run(strategy, tokenizer, make_prompts(), **fields)
        for prompt, result, answer, tokens in zip(make_prompts(), results, expected, unstopped, strict=True):
            assert (result.tokens, result.text, result.stop_reason) == (answer.tokens, answer.text, answer.stop_reason)
            assert result.tokens == tokens[: len(result.tokens)]
            assert result.steps == run(strategy, tokenizer, [prompt], **fields)[0].steps
            assert [token for step in result.steps for token in step.tokens] == result.tokens
            for step in result.steps:
                assert len(step.drafted) <= min(num_speculations, 12)
                assert step.drafted[: step.accepted] == step.tokens[: step.accepted]
                assert step.accepted <= len(step.tokens) <= step.accepted + 1
                assert not step.stop_reason or len(step.drafted) <= len(step.tokens) or step.is_rejected


# What may be shown


def decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("stop_words", "tokens", "unfinished", "finished"),
    [
        ((), b"ab", "ab", "ab"),
        (("STOP",), b"abS", "ab", "abS"),
        (("STOP",), b"abSTO", "ab", "abSTO"),
        (("STOP",), b"abSTX", "abSTX", "abSTX"),
        (("STOP",), b"abSTOPcd", "ab", "ab"),
        (("xyz", "STOP"), b"abSTOPxyz", "ab", "ab"),  # first in the text, not first in the list
        (("aab",), b"caa", "c", "caa"),  # the longest start of a stop word
        (("STOP", "OX"), b"aSTO", "a", "aSTO"),
        (("b\nc",), b"ab\n", "a", "ab\n"),
        ((), "a漢".encode()[:-1], "a", "a\ufffd"),
        ((), "a漢".encode(), "a漢", "a漢"),
        ((), "a🙂".encode()[:2], "a", "a\ufffd"),
        ((), b"ab\x00", "ab", "ab"),  # the end token
        ((), b"ab\x01", "ab", "ab"),  # a stop token
        (("b",), b"ab\x00", "a", "a"),
        ((), b"\x00", "", ""),
        ((), b"", "", ""),
    ],
)
def test_text(stop_words: tuple[str, ...], tokens: bytes, unfinished: str, finished: str) -> None:
    rule = StopRule(frozenset({0}), frozenset({1}), stop_words, decode_bytes)
    assert rule.text(list(tokens), finished=False) == unfinished
    assert rule.text(list(tokens), finished=True) == finished


@pytest.mark.parametrize(
    ("stop_words", "tokens", "unfinished", "finished"),
    [
        ((), b"ab", b"ab", b"ab"),
        (("STOP",), b"abST", b"ab", b"abST"),
        (("STOP",), b"abSTOP", b"ab", b"ab"),
        ((), "a漢".encode()[:-1], b"a", "a漢".encode()[:-1]),
        ((), b"ab\x00", b"ab", b"ab"),
    ],
)
def test_settled_tokens(stop_words: tuple[str, ...], tokens: bytes, unfinished: bytes, finished: bytes) -> None:
    rule = StopRule(frozenset({0}), frozenset({1}), stop_words, decode_bytes)
    assert bytes(rule.settled_tokens(list(tokens), finished=False)) == unfinished
    assert bytes(rule.settled_tokens(list(tokens), finished=True)) == finished


class RecordingStreamer(TextStreamer):
    """transformers' own text streamer, into a list."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)


@pytest.mark.parametrize("num_speculations", [None, 1, 3, 8])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, TEXT[1:]),
        ({"stop_words": ["STOP"]}, "wxyz"),
        ({"stop_words": ["STOX"]}, TEXT[1:]),
        ({"stop_words": ["🙂A"]}, "wxyzSTOP漢字"),
        ({"stop_token_ids": ["T"]}, "wxyzS"),
    ],
)
def test_streamed_text(
    fields: dict[str, list[str]],
    text: str,
    num_speculations: int | None,
    chain_model: LlamaForCausalLM,
    script: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """What is streamed is the answer's text, with no piece of a stop string and no broken character in between."""
    strategy = AutoregressiveStrategy if num_speculations is None else SelfSpeculativeStrategy
    fields = fields | {"stop_token_ids": tokenizer.convert_tokens_to_ids(fields.get("stop_token_ids", []))}
    fields |= {"max_new_tokens": len(script) - 1, "exit_layer": 2, "num_speculations": num_speculations}
    streamer = RecordingStreamer(tokenizer)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(chain_model))
    (result,) = generator.generate([script[:1]], GenerationConfig(sample=False, **fields), streamer)
    assert "".join(streamer.pieces) == result.text == text


def test_a_stop_string_is_held_back_behind_an_incomplete_character() -> None:
    """Tokens are single bytes here: é and 漢 take several."""

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    rule = StopRule(frozenset(), frozenset(), ("foé", "foo"), decode)
    answer = list(b"fo")
    assert rule.text([*answer, 0xC3], finished=False) == ""
    assert rule.text([*answer, 0xC3, 0xA9], finished=True) == ""
    character = list("漢".encode())
    assert rule.settled_tokens(character[:1], finished=False) == []
    assert rule.settled_tokens([*character, *answer], finished=False) == character
