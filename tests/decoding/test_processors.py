"""Logits processors: self-speculative = autoregressive = transformers' `generate`, alone and in a ragged batch."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MAX_STEPS = 12
LENGTHS = (1, 58, 4)


@pytest.fixture(scope="module")
def repetitive_model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A random Llama with a tied head, which favours the token that it has just read; it never ends."""
    model = make_model(tie_word_embeddings=True, initializer_range=0.2, eos_token_id=299)
    with torch.no_grad():
        model.lm_head.weight[299] = 0
    return model


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, 290, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def unprocessed(repetitive_model: LlamaForCausalLM) -> list[list[int]]:
    return expected_tokens(repetitive_model)


def expected_tokens(model: LlamaForCausalLM, **fields: object) -> list[list[int]]:
    """What transformers' own greedy decoding answers, prompt by prompt."""
    answers = []
    for prompt in make_prompts():
        tokens_1T = torch.tensor([prompt])
        mask_1T = torch.ones_like(tokens_1T)
        fields |= {"attention_mask": mask_1T, "max_new_tokens": MAX_STEPS, "do_sample": False, "pad_token_id": 1}
        answers.append(model.generate(tokens_1T, **fields)[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(("ngram_size", "penalty"), [(1, None), (2, None), (None, 1.3), (3, 3.0)])
def test_processors(
    ngram_size: int | None,
    penalty: float | None,
    repetitive_model: LlamaForCausalLM,
    unprocessed: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own = {"no_repeat_ngram_size": ngram_size} if ngram_size else {}
    theirs = own | ({"repetition_penalty": penalty} if penalty else {})
    expected = expected_tokens(repetitive_model, **theirs)
    assert all(answer != other for answer, other in zip(expected, unprocessed, strict=True)), (
        "the processors do nothing"
    )

    def decode(strategy: type[GenerationStrategy], prompts: list[list[int]], **fields: int) -> list[list[int]]:
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty else [])
        generator = HuggingfaceLlamaGenerator(tokenizer, strategy(repetitive_model))
        config = GenerationConfig(max_new_tokens=MAX_STEPS, sample=False, **own, **fields)
        return [result.tokens for result in generator.generate(prompts, config, logits_processors=processors)]

    assert decode(AutoregressiveStrategy, make_prompts()) == expected
    for exit_layer, num_speculations in ((2, 1), (5, 8), (4, 3)):
        fields = {"exit_layer": exit_layer, "num_speculations": num_speculations}
        assert decode(SelfSpeculativeStrategy, make_prompts(), **fields) == expected
    for row in (0, 1):  # alone
        assert decode(SelfSpeculativeStrategy, [make_prompts()[row]], **fields) == [expected[row]]
