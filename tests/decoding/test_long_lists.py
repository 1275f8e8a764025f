"""A list of prompts that is longer than the batch: rows that end take in the next, and every answer is as alone."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.decoding.request import GenerationStep
from self_speculation.decoding.stopping import StopReason
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
)
from self_speculation.measuring.rivals import HuggingfaceStrategy
from self_speculation.self_speculation_generator import AdaptiveStrategy, SelfSpeculativeStrategy

BATCH_SIZE = 3


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Nine, of one token to sixty: some batches of them are read together, others row by row."""
    generator = torch.Generator().manual_seed(4)
    lengths = [5, 40, 1, 9, 17, 3, 60, 2, 8]
    return [torch.randint(2, 200, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def config(prompts: list[list[int]], model: LlamaForCausalLM, tokenizer: object) -> GenerationConfig:
    """Greedy, with a token at which some answers stop, early and late, and others do not."""
    free = GenerationConfig(max_new_tokens=12, sample=False, exit_layer=2, num_speculations=3)
    answers = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate(prompts, free)
    stops = [answers[0].tokens[1], answers[3].tokens[5], answers[5].tokens[0]]
    return dataclasses.replace(free, stop_token_ids=stops)


def kept(results: list[GenerationResult]) -> list[tuple[list[int], StopReason | None, str]]:
    return [(result.tokens, result.stop_reason, result.text) for result in results]


@pytest.mark.parametrize("sampling", [None, "coupled", "leviathan"])
@pytest.mark.parametrize("strategy", [AutoregressiveStrategy, EarlyExitStrategy, SelfSpeculativeStrategy])
def test_every_answer_is_as_alone(
    strategy: type[GenerationStrategy],
    sampling: str | None,
    prompts: list[list[int]],
    config: GenerationConfig,
    model: LlamaForCausalLM,
    tokenizer: object,
) -> None:
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(model))
    if sampling:
        stops = list(range(40))
        config = dataclasses.replace(config, sample=True, sampling=sampling, temperature=1.5, stop_token_ids=stops)
    alone = kept([generator.generate([prompt], config)[0] for prompt in prompts])
    assert len({len(tokens) for tokens, _, _ in alone}) > 2, "rows must end at different steps"
    for batch_size in (1, 2, BATCH_SIZE, len(prompts), 20):
        assert kept(generator.generate(prompts, config, batch_size=batch_size)) == alone


@pytest.mark.parametrize("num_speculations", [0, 1, 8])
def test_with_processors_chunks_and_any_draft_length(
    num_speculations: int,
    prompts: list[list[int]],
    config: GenerationConfig,
    model: LlamaForCausalLM,
    tokenizer: object,
) -> None:
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    config = dataclasses.replace(config, num_speculations=num_speculations, prefill_chunk=7)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    alone = [generator.generate([prompt], config, logits_processors=processors)[0] for prompt in prompts]
    found = generator.generate(prompts, config, logits_processors=processors, batch_size=BATCH_SIZE)
    assert kept(found) == kept(alone)


def test_compiled(
    prompts: list[list[int]], config: GenerationConfig, model: LlamaForCausalLM, tokenizer: object
) -> None:
    """The compiled step's own rows take the new prompts in."""
    expected = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate(prompts, config)
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model, backend="aot_eager"))
    config = dataclasses.replace(config, compile="default")
    assert kept(generator.generate(prompts, config, batch_size=BATCH_SIZE)) == kept(expected)


def test_exact(prompts: list[list[int]], config: GenerationConfig, model: LlamaForCausalLM, tokenizer: object) -> None:
    """Kernels of our own read a prompt into its row of the cache."""
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    expected = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate(prompts, config)
    config = dataclasses.replace(config, exact=True)
    assert kept(generator.generate(prompts, config, batch_size=BATCH_SIZE)) == kept(expected)


def test_adaptive(
    prompts: list[list[int]], config: GenerationConfig, model: LlamaForCausalLM, tokenizer: object
) -> None:
    expected = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate(prompts, config)
    generator = HuggingfaceLlamaGenerator(tokenizer, AdaptiveStrategy(model))
    assert kept(generator.generate(prompts, config, batch_size=BATCH_SIZE)) == kept(expected)


def test_the_batch_stays_full(
    prompts: list[list[int]], config: GenerationConfig, model: LlamaForCausalLM, tokenizer: object
) -> None:
    """While prompts wait, every step after the first has as many rows as the batch."""
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    request = dataclasses.replace(generator.request(prompts, config), batch_size=BATCH_SIZE)
    session = generator.strategy.begin(request)
    steps: list[GenerationStep] = []
    for step in session.steps():
        steps.append(step)
        at_work = sum(row is not None for row in step.rows)
        assert at_work <= BATCH_SIZE
        if session.waiting:
            assert at_work == BATCH_SIZE
    taken_in = [step for step in steps if all(row is None or not row.tokens for row in step.rows)]
    assert 1 < len(taken_in) <= 1 + len(prompts) - BATCH_SIZE
    num_alone = sum(len(result.steps) for result in generator.generate(prompts, config, batch_size=1))
    assert len(steps) - len(taken_in) < num_alone / 2


def test_times(prompts: list[list[int]], config: GenerationConfig, model: LlamaForCausalLM, tokenizer: object) -> None:
    """A row's times are its own, the request's are all of them; a rival takes one batch after the other."""
    for strategy in (AutoregressiveStrategy(model), HuggingfaceStrategy(model)):
        generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
        results = generator.generate(prompts, config, batch_size=BATCH_SIZE)
        [request_seconds] = {result.request_seconds for result in results}
        assert all(0 < result.seconds < request_seconds for result in results)
        assert sum(result.seconds for result in results) > request_seconds


def test_a_batch_of_none_is_refused(
    prompts: list[list[int]], config: GenerationConfig, model: LlamaForCausalLM, tokenizer: object
) -> None:
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    with pytest.raises(ValueError, match="--batch_size must be at least 1, not 0"):
        generator.generate(prompts, config, batch_size=0)


def test_nothing_to_generate(prompts: list[list[int]], model: LlamaForCausalLM, tokenizer: object) -> None:
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    config = GenerationConfig(max_new_tokens=0, sample=False)
    results = generator.generate(prompts, config, batch_size=BATCH_SIZE)
    assert kept(results) == [([], StopReason.MAX_STEPS, "")] * len(prompts)
