"""Strategies as contestants: who begins, what a warm-up is, and how much memory an answer takes."""

import dataclasses
import gc
from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import Recommendation
from self_speculation.measuring.contestants import Contestant, WarmUp, interleaved
from self_speculation.measuring.figures import Times
from self_speculation.measuring.line_up import line_up, make_contestant
from self_speculation.measuring.measurements import Measurement
from self_speculation.measuring.probes import Probes
from self_speculation.measuring.surroundings import live_tensor_bytes

STRATEGIES = ("early_exit", "self_speculative", "hf_generate", "hf_early_exit")


def contestants_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Contestant]:
    config = GenerationConfig(max_new_tokens=8, sample=False, exit_layer=2, num_speculations=2)
    configs = {name: dataclasses.replace(config, generation_strategy=name) for name in STRATEGIES}
    return {name: make_contestant(model, tokenizer, config) for name, config in configs.items()}


def test_peak_memory_is_little_more_than_the_weights(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Less what other tests left in the process."""
    gc.collect()
    others = live_tensor_bytes()
    model = make_model(hidden_size=128, intermediate_size=256)
    size = sum(weight.nbytes for weight in model.parameters())
    for contestant in list(contestants_of(model, tokenizer).values())[1:]:
        assert size <= contestant.peak_bytes([[0, 5, 6, 7]], Probes(memory_looks=2)) - others < 1.3 * size
        assert not model.lm_head._forward_hooks


def test_passes_of_our_own_are_looked_at(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """They run no module of the model's."""
    gc.collect()
    others = live_tensor_bytes()
    model = make_model(hidden_size=128, intermediate_size=256).bfloat16()
    size = sum(weight.nbytes for weight in model.parameters())
    config = GenerationConfig(max_new_tokens=8, sample=False, exit_layer=2, num_speculations=2, compile="default")
    for name in ("autoregressive", "self_speculative", "adaptive"):
        contestant = make_contestant(model, tokenizer, dataclasses.replace(config, generation_strategy=name))
        assert size <= contestant.peak_bytes([[0, 5, 6, 7]], Probes(memory_looks=1)) - others < 3 * size
        assert "steps" not in vars(contestant.generator.strategy)


def test_memory_that_no_one_sees_is_not_said(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    contestant = contestants_of(model, tokenizer)["early_exit"]
    assert contestant.peak_bytes([[0, 5]], Probes(live_bytes=lambda: 0)) is None


def test_everyone_begins_in_turn(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """In the order that was asked for, whoever began."""
    begun: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Noted(Contestant):
        def run(self, prompts: list[list[int]]) -> list[Measurement]:
            begun.append(self.config.generation_strategy)
            return super().run(prompts)

    contestants = {name: Noted(one.generator, one.config) for name, one in contestants_of(model, tokenizer).items()}
    names = list(contestants)
    for turn in range(5):
        assert list(interleaved(contestants, [[0, 5]], turn)) == names
    starts = [begun[index : index + 4] for index in range(0, 20, 4)]
    assert starts[:4] == [names[turn:] + names[:turn] for turn in range(4)]
    assert starts[4] == names


def test_a_warm_up_is_short_and_changes_nothing(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    contestant = contestants_of(model, tokenizer)["self_speculative"]
    passes: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    found = contestant.warm_up([[0, 5, 6]], num_tokens=3)
    handle.remove()
    assert 0 < len(passes) <= 3 * 3
    assert found.tokens == 3
    assert found.seconds > 0
    assert contestant.warm_up([]).tokens == 0
    assert contestant.config.max_new_tokens == 8


@pytest.mark.parametrize(
    ("seconds", "tokens", "preparing"),
    # The first token takes 0.5 s later, and the others 0.1 s each.
    [(3.4, 10, 2.0), (2.5, 1, 2.0), (2.5, 0, 2.0), (1.0, 10, 0.0)],
)
def test_preparing_is_what_the_first_answer_takes_more_than_later_ones(
    seconds: float, tokens: int, preparing: float
) -> None:
    names = (field.name for field in dataclasses.fields(Times))
    own = {"mean_first_token_seconds": 0.5, "decode_seconds_per_token": 0.1}
    times = Times(**dict.fromkeys(names, 9.0) | own)
    assert WarmUp(seconds, tokens).preparing_seconds(times) == pytest.approx(preparing)


@pytest.mark.parametrize(("is_whole", "num_tokens"), [(False, 3), (True, 8)])
def test_a_strategy_declares_whether_it_warms_up_whole(
    is_whole: bool, num_tokens: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    contestant = contestants_of(model, tokenizer)["hf_generate"]
    contestant.generator.strategy.warms_up_whole = is_whole
    passes: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    contestant.warm_up([[0, 5, 6]], num_tokens=3)
    handle.remove()
    assert len(passes) == num_tokens


def test_what_was_not_given_is_recommended_or_chosen(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    configs = {name: GenerationConfig(generation_strategy=name) for name in ("autoregressive", *STRATEGIES)}
    found = line_up(model, tokenizer, configs, Recommendation(3, 5, "a test"))
    assert {name: (one.config.exit_layer, one.config.num_speculations) for name, one in found.items()} == {
        "autoregressive": (None, None),
        "early_exit": (3, None),
        "self_speculative": (None, None),
        "hf_generate": (None, None),
        "hf_early_exit": (3, 5),
    }
    assert found["self_speculative"].drafting == {"exit_layer": "auto", "num_speculations": "auto"}
    assert found["self_speculative"].generator.strategy.advice == Recommendation(3, 5, "a test")
    with pytest.raises(ValueError, match="--exit_layer must lie between 1 and 6"):
        line_up(model, tokenizer, configs, Recommendation(7, 5, "a test"))
