"""Conversations: what was said is cached and not read again, and every answer is that of the whole conversation."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.chat import Chat
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    RowStep,
)
from self_speculation.measuring.rivals import HuggingfaceStrategy
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.stepwise_strategy import StepwiseStrategy
from tests.chats import chatting

GREEDY = {"sample": False, "max_new_tokens": 12}
STRATEGIES: dict[str, tuple[type[StepwiseStrategy], dict[str, Any]]] = {
    "autoregressive": (AutoregressiveStrategy, {}),
    "early exit": (EarlyExitStrategy, {"exit_layer": 3}),
    "self-speculative": (SelfSpeculativeStrategy, {"exit_layer": 2, "num_speculations": 3}),
}
each_strategy = pytest.mark.parametrize(("strategy", "own"), STRATEGIES.values(), ids=STRATEGIES)


@pytest.fixture(scope="module")
def tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with a chat template."""
    return chatting(tokenizer)


@pytest.fixture(scope="module")
def make_model(make_model: Callable[..., LlamaForCausalLM]) -> Callable[..., LlamaForCausalLM]:
    """Likewise, with embeddings for that tokenizer's tokens."""
    return partial(make_model, vocab_size=304)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """The tiny random Llama, in float64."""
    return make_model()


def fresh(
    tokenizer: PreTrainedTokenizerFast, strategy: GenerationStrategy, prompt: list[int], config: GenerationConfig
) -> GenerationResult:
    """What a strategy that remembers nothing answers."""
    return HuggingfaceLlamaGenerator(tokenizer, strategy).generate([prompt], config)[0]


class Interrupting:
    """A streamer at whose nth step Ctrl-C is pressed."""

    def __init__(self, at: int) -> None:
        self.steps = itertools.count(1)
        self.at = at

    def begin(self, *_: object) -> None:
        pass

    def update(self, step: RowStep) -> None:
        if next(self.steps) == self.at:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


# How each of the turns ends.
ENDINGS: dict[str, dict[str, Any]] = {
    "limit": {},
    "nothing": {"max_new_tokens": 0},
    "one token": {"max_new_tokens": 1},
    "interrupted": {},
    "stop token": {"stop_token_ids": list(range(20, 120))},
    "stop word": {"stop_words": list("aeiou")},
    "sampled": {"sample": True, "temperature": 1.3},
}


@each_strategy
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_continued_conversation_is_the_one_that_is_read_afresh(
    strategy: type[StepwiseStrategy],
    own: dict[str, Any],
    ending: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """In float64: after every kind of ending, and where a prompt departs from what was said."""
    config = GenerationConfig(**GREEDY | own | ENDINGS[ending])
    kept = strategy(model)
    generator = HuggingfaceLlamaGenerator(tokenizer, kept, continues=True)
    said = list(range(2, 12))
    for turn in range(4):
        if ending == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                generator.generate([said], config, Interrupting(at=1 + turn))
        [result] = generator.generate([said], config)
        assert result.tokens == fresh(tokenizer, strategy(model), said, config).tokens
        departs = turn == 2
        said = said + result.tokens[: len(result.tokens) - 2 * departs] + [50 + turn, 40, 30]
    assert kept.num_cached > 10


@each_strategy
@pytest.mark.parametrize("at_pass", [1, 2, 4, 7])
def test_an_interruption_in_the_middle_of_a_pass_spoils_nothing(
    strategy: type[StepwiseStrategy],
    own: dict[str, Any],
    at_pass: int,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Whether some layers have read the prompt, in two passes, or a step's tokens."""
    model = make_model(eos_token_id=None)
    passes = itertools.count(1)

    def press(*_: object) -> None:
        if next(passes) == at_pass:
            raise KeyboardInterrupt

    config = GenerationConfig(**GREEDY | own, prefill_chunk=8)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(model), continues=True)
    said = list(range(2, 12))
    said += generator.generate([said], config)[0].tokens
    other = said[:-4] + list(range(60, 80))
    hook = (
        model.lm_head.register_forward_hook(press)
        if at_pass > 2
        else model.model.rotary_emb.register_forward_hook(press)
    )
    with pytest.raises(KeyboardInterrupt):
        generator.generate([other], config)
    hook.remove()
    for prompt in (other, [*said, 50, 40]):
        [result] = generator.generate([prompt], config)
        assert result.tokens == fresh(tokenizer, strategy(model), prompt, config).tokens


@each_strategy
def test_a_turn_reads_its_own_tokens_only(
    strategy: type[StepwiseStrategy],
    own: dict[str, Any],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The last token of an answer, its end, and the new question: whatever was said before."""
    model = make_model(eos_token_id=None, max_position_embeddings=1024)
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    kept = strategy(model)
    generator = HuggingfaceLlamaGenerator(tokenizer, kept, continues=True)
    config = GenerationConfig(**GREEDY | own)
    said = list(range(2, 102))
    for turn in range(6):
        num_known = len(said) - 4 if turn else 0
        widths.clear()
        [result] = generator.generate([said], config)
        assert kept.num_cached == num_known
        # The prefill, all but the last token; then steps.
        assert widths[0] == len(said) - 1 - num_known
        assert set(widths[1:]) == {1}
        said = said + result.tokens + [50 + turn, 40, 30]


def test_rows_grow_with_the_conversation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    kept = AutoregressiveStrategy(model)
    generator = HuggingfaceLlamaGenerator(tokenizer, kept, continues=True)
    for length, num_cached in ((10, 0), (30, 10), (240, 30), (50, 49), (5, 4)):
        prompt = [2 + n % 200 for n in range(length)]
        config = GenerationConfig(sample=False, max_new_tokens=3)
        [result] = generator.generate([prompt], config)
        assert result.tokens == fresh(tokenizer, AutoregressiveStrategy(model), prompt, config).tokens
        assert kept.num_cached == num_cached


def test_another_plan_starts_anew(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Fewer layers have cached less."""
    kept = EarlyExitStrategy(model)
    generator = HuggingfaceLlamaGenerator(tokenizer, kept, continues=True)
    prompt = list(range(2, 40))
    for exit_layer in (2, 5, 3):
        config = GenerationConfig(exit_layer=exit_layer, **GREEDY)
        [result] = generator.generate([prompt], config)
        assert result.tokens == fresh(tokenizer, EarlyExitStrategy(model), prompt, config).tokens
        assert kept.num_cached == 0


def test_nothing_is_kept_unless_it_is_asked_for(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    strategy = AutoregressiveStrategy(model)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    for _ in range(2):
        generator.generate([list(range(2, 40))], GenerationConfig(**GREEDY))
        assert strategy.num_cached == 0


@pytest.mark.slow
def test_compiled_steps_keep_a_conversation(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    kept = SelfSpeculativeStrategy(model, backend="aot_eager")
    generator = HuggingfaceLlamaGenerator(tokenizer, kept, continues=True)
    config = GenerationConfig(**GREEDY, exit_layer=2, num_speculations=3, compile="default")
    said = list(range(2, 12))
    for turn in range(4):
        [result] = generator.generate([said], config)
        assert result.tokens == fresh(tokenizer, AutoregressiveStrategy(model), said, GenerationConfig(**GREEDY)).tokens
        assert kept.num_cached == (len(said) - 4 if turn else 0)
        said = said + result.tokens + [50 + turn, 40, 30]


QUESTIONS = ["Hi", "def add(a, b)?", "  Why? ", "漢字 🙂", "Bye."]


@each_strategy
def test_a_chat_is_the_template_s_conversation(
    strategy: type[StepwiseStrategy],
    own: dict[str, Any],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_model(max_position_embeddings=1024)
    chat = Chat(tokenizer, strategy(model), GenerationConfig(**GREEDY | own), system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for number, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        prompt = chat.encode(messages)
        assert tokenizer.decode(prompt) == f"<s>{chat.template.text(messages)}"
        result = chat.say(question)
        assert result.tokens == fresh(tokenizer, strategy(model), prompt, chat.config).tokens
        messages.append({"role": "assistant", "content": result.text})
        assert chat.messages == messages
        assert chat.num_tokens == len(prompt)
        assert bool(chat.num_cached) == bool(number)
    chat.reset()
    assert chat.messages == messages[:1]


def test_what_was_said_keeps_its_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Though its text has fewer; where the template or a stop word has changed the text, it is tokenized anew."""
    chat = Chat(tokenizer, AutoregressiveStrategy(model), GenerationConfig(**GREEDY))
    letters = tokenizer.convert_tokens_to_ids(list("def"))
    assert tokenizer("def", add_special_tokens=False)["input_ids"] != letters
    for text, keeps in (("def", True), ("de", False)):
        chat.reset()
        result = chat.answer("Hi", lambda prompt, text=text: GenerationResult(text=text, tokens=letters))
        said = chat.tokens[: -len(letters)]
        prompt = chat.encode([*chat.messages, {"role": "user", "content": "Why?"}])
        assert (prompt[: len(said) + 3] == said + result.tokens) == keeps
        assert tokenizer.decode(prompt).endswith(
            f"<|assistant|>\n{text}<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"
        )


def test_an_answer_ends_at_the_template_s_end_of_turn(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Which is not the tokenizer's end of text."""
    chat = Chat(tokenizer, AutoregressiveStrategy(model), GenerationConfig(**GREEDY, stop_token_ids=[7]))
    assert chat.config.stop_token_ids == [7, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tokenizer.eos_token != "<|end|>"


def test_what_has_no_room_changes_nothing(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(tokenizer, AutoregressiveStrategy(model), GenerationConfig(**GREEDY))
    chat.say("Hi")
    before = list(chat.messages)
    with pytest.raises(ValueError, match="the model's context is 256"):
        chat.say("x" * 300)
    assert chat.messages == before
    assert chat.say("Bye").tokens
    assert chat.num_cached


def test_a_chat_needs_a_template_that_takes_it(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="--chat: the model has no chat template"):
        Chat(bare, AutoregressiveStrategy(model), GenerationConfig())
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    with pytest.raises(ValueError, match=r"--chat: the chat template cannot write these messages \(No system\.\)"):
        Chat(strict, AutoregressiveStrategy(model), GenerationConfig(), system="Be brief.")


def test_other_decoding_chats_too(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """It reads the whole conversation each time."""
    config = GenerationConfig(**GREEDY)
    ours, theirs = (
        Chat(tokenizer, strategy(model), config) for strategy in (AutoregressiveStrategy, HuggingfaceStrategy)
    )
    for question in ("Hi", "Bye"):
        assert ours.say(question).tokens == theirs.say(question).tokens
    assert (ours.num_cached > 0, theirs.num_cached) == (True, 0)
