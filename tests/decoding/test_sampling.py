"""Draws, filtered distributions, noise, and what logits processors get to see."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.sampling import (
    NUM_STREAMS,
    draw,
    noise,
    probabilities,
    process_logits,
    row_keys,
    warpers,
)
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

CPU = torch.device("cpu")
ALMOST_ONE = math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(
    ("p", "uniform", "token"),
    [
        ([0.0, 0.5, 0.0, 0.5, 0.0], 0.0, 1),
        ([0.0, 0.5, 0.0, 0.5, 0.0], 0.4999, 1),
        ([0.0, 0.5, 0.0, 0.5, 0.0], 0.5, 3),
        ([0.0, 0.5, 0.0, 0.5, 0.0], ALMOST_ONE, 3),
        ([1.0, 0.0, 0.0], ALMOST_ONE, 0),
        ([0.0, 0.0, 1.0], 0.0, 2),
        ([0.25, 0.25, 0.25, 0.25], 0.25, 1),
        ([0.1, 0.2, 0.0], 0.4, 1),  # a sum that rounding left off 1
    ],
)
def test_draw(p: list[float], uniform: float, token: int) -> None:
    assert draw(torch.tensor([[p]]), torch.tensor([[uniform]], dtype=torch.float64)).tolist() == [[token]]


def test_draw_never_takes_a_token_without_probability() -> None:
    """Long runs of zeros, tiny weights, and uniform numbers at the ends and on the borders."""
    generator = torch.Generator().manual_seed(0)
    p_BTV = torch.rand(40, 50, 64, generator=generator) ** 8
    p_BTV = p_BTV * (torch.rand(p_BTV.shape, generator=generator) < 0.1)
    p_BTV[..., 5] += 1e-6
    p_BTV = p_BTV / p_BTV.sum(-1, keepdim=True)
    borders_BT = p_BTV.double().cumsum(-1)[..., 20].clamp(max=ALMOST_ONE)
    for uniform_BT in (torch.zeros_like(borders_BT), borders_BT, torch.full_like(borders_BT, ALMOST_ONE)):
        assert (p_BTV.gather(-1, draw(p_BTV, uniform_BT)[..., None]) > 0).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.9), (2.0, 7, 1.0), (1.7, 20, 0.8), (0.3, 5, 0.5)]
)
def test_probabilities_are_those_of_generate(
    temperature: float, top_k: int, top_p: float, model: LlamaForCausalLM
) -> None:
    tokens_BT = torch.tensor([[3, 4, 5], [6, 7, 8]])
    output = model.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        max_new_tokens=1,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        pad_token_id=1,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    p_BTV = probabilities(output.logits[0][:, None], warpers(temperature, top_k, top_p))
    assert p_BTV.dtype == torch.float32
    torch.testing.assert_close(p_BTV[:, 0], output.scores[0].softmax(-1))


def test_noise_belongs_to_seed_row_and_position() -> None:
    a, b = [5, 6], [7]
    noise_BCS = noise(3, row_keys([a, b, a]), 40)
    assert noise_BCS.shape == (3, 40, NUM_STREAMS)
    assert noise_BCS.dtype == torch.float64
    assert 0 <= noise_BCS.min() <= noise_BCS.max() < 1
    for prompts, rows in (([a], [0]), ([b], [1]), ([b, a], [1, 0]), ([a, a], [0, 2])):
        assert torch.equal(noise(3, row_keys(prompts), 25), noise_BCS[rows, :25]), "not the same in another batch"
    assert not torch.equal(noise_BCS[0], noise_BCS[2]), "two copies of a prompt share their noise"
    assert not torch.equal(noise(4, row_keys([a]), 40)[0], noise_BCS[0]), "the seed has no effect"


class RecordingProcessor(LogitsProcessor):
    """Remembers the prefixes that it is asked about, and adds their length to the logit of token 0."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 1
        assert scores.ndim == 2
        self.prefixes.append(input_ids[0].tolist())
        return scores + torch.nn.functional.one_hot(torch.tensor(0), scores.shape[-1]) * input_ids.shape[1]


def test_processors_see_each_rows_prefix() -> None:
    recorder = RecordingProcessor()
    tokens_BC = torch.tensor([[11, 12, 13, 14, 99], [21, 22, 99, 99, 99]])
    positions_BT = torch.tensor([[2, 3], [0, 1]])
    logits_BTV = process_logits(torch.zeros(2, 2, 3), LogitsProcessorList([recorder]), tokens_BC, positions_BT)
    assert recorder.prefixes == [[11, 12, 13], [11, 12, 13, 14], [21], [21, 22]]
    assert logits_BTV.tolist() == [[[3, 0, 0], [4, 0, 0]], [[1, 0, 0], [2, 0, 0]]]


@pytest.mark.parametrize("strategy", [AutoregressiveStrategy, SelfSpeculativeStrategy])
def test_processors_see_prompt_answer_and_draft(
    strategy: type[GenerationStrategy], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In a ragged batch, every prefix asked about is a row's prompt, its answer so far, and what was drafted after."""
    recorder, prompts = RecordingProcessor(), [[3], [4, 5, 6, 7, 8, 9], [10, 11]]
    config = GenerationConfig(max_new_tokens=6, sample=False, exit_layer=4, num_speculations=2)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(model))
    results = generator.generate(prompts, config, logits_processors=LogitsProcessorList([recorder]))
    assert all(any(prefix[: len(prompt)] == prompt for prompt in prompts) for prefix in recorder.prefixes)
    expected = set()
    for prompt, result in zip(prompts, results, strict=True):
        text = list(prompt)
        for step in result.steps:
            expected |= {tuple(text + step.drafted[:count]) for count in range(len(step.drafted) + 1)}
            text += step.tokens
        assert len(result.tokens) == 6
    assert expected <= {tuple(prefix) for prefix in recorder.prefixes}
    if strategy is AutoregressiveStrategy:
        assert expected == {tuple(prefix) for prefix in recorder.prefixes}
