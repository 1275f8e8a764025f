"""The equivalence class of decoding: whatever the path, one list of tokens, in float64.

transformers' own `generate`, autoregressive and self-speculative decoding, for every exit layer and draft length, alone
and in a ragged batch, eager and compiled; and, when sampling, a row alone and in a batch.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from perturbing import perturbed
from transformers import LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.decoding.early_exit import TorchKernels
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, RowOutcome, StepOutcome, StepPlan, speculative_step
from self_speculation.decoding.stopping import StopRule
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
)
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.stepwise_strategy import verification_rule

MAX_STEPS = 14
LENGTHS = (1, 2, 3, 17, 60, 64, 65, 70)
DRAFT_LENGTHS = (0, 1, 3, 8)
VARIANTS = {
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "Llama-3 RoPE": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "no grouped queries": {"num_key_value_heads": 4},
}


def make_prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


def generate(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """What transformers' own greedy decoding answers."""
    tokens_1T = torch.tensor([prompt])
    answer_1T = model.generate(
        tokens_1T, attention_mask=torch.ones_like(tokens_1T), max_new_tokens=MAX_STEPS, do_sample=False, pad_token_id=1
    )
    return answer_1T[0, len(prompt) :].tolist()


@pytest.fixture
def decode(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[int]]]:
    """A function that answers a batch with a strategy: token lists; fields of the configuration override."""

    def decode(strategy: GenerationStrategy, prompts: list[list[int]], **fields: object) -> list[list[int]]:
        config = GenerationConfig(**{"max_new_tokens": MAX_STEPS, "sample": False} | fields)
        return [result.tokens for result in HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)]

    return decode


@pytest.fixture(scope="module")
def perturbed_model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return perturbed(make_model())


@pytest.fixture(scope="module")
def expected(perturbed_model: LlamaForCausalLM) -> list[list[int]]:
    """transformers' answers to the prompts, one by one; not all of them stop early, and no two are alike."""
    answers = [generate(perturbed_model, prompt) for prompt in make_prompts(LENGTHS)]
    assert len({tuple(answer) for answer in answers}) == len(LENGTHS)
    assert sum(len(answer) == MAX_STEPS for answer in answers) >= 4
    return answers


def test_autoregressive(
    perturbed_model: LlamaForCausalLM, expected: list[list[int]], decode: Callable[..., list[list[int]]]
) -> None:
    prompts, strategy = make_prompts(LENGTHS), AutoregressiveStrategy(perturbed_model)
    assert decode(strategy, prompts) == expected
    assert [decode(strategy, [prompt])[0] for prompt in prompts] == expected


@pytest.mark.parametrize("num_speculations", DRAFT_LENGTHS)
@pytest.mark.parametrize("exit_layer", range(1, 7))
def test_self_speculative(
    exit_layer: int,
    num_speculations: int,
    perturbed_model: LlamaForCausalLM,
    expected: list[list[int]],
    decode: Callable[..., list[list[int]]],
) -> None:
    prompts, strategy = make_prompts(LENGTHS), SelfSpeculativeStrategy(perturbed_model)
    fields = {"exit_layer": exit_layer, "num_speculations": num_speculations}
    assert decode(strategy, prompts, **fields) == expected
    row = (exit_layer + 3 * num_speculations) % len(prompts)
    assert decode(strategy, [prompts[row]], **fields) == [expected[row]]


def test_the_sweep_accepts_and_rejects(
    perturbed_model: LlamaForCausalLM, expected: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The equality above would say little if drafts were always accepted, or never."""
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(perturbed_model))
    config = GenerationConfig(max_new_tokens=MAX_STEPS, sample=False, exit_layer=5, num_speculations=3)
    results = generator.generate(make_prompts(LENGTHS), config)
    assert {accepted for result in results for accepted in result.accepted_per_step} == {0, 1, 2, 3}


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_variants(
    variant: str,
    expected: list[list[int]],
    make_model: Callable[..., LlamaForCausalLM],
    decode: Callable[..., list[list[int]]],
) -> None:
    model = perturbed(make_model(**VARIANTS[variant]))
    prompts = make_prompts(LENGTHS)[::2]
    answers = [generate(model, prompt) for prompt in prompts]
    assert answers != expected[::2], "the variant changes nothing"
    assert decode(AutoregressiveStrategy(model), prompts) == answers
    for exit_layer, num_speculations in ((1, 3), (3, 8), (5, 1)):
        fields = {"exit_layer": exit_layer, "num_speculations": num_speculations}
        assert decode(SelfSpeculativeStrategy(model), prompts, **fields) == answers


# Sampling


@pytest.mark.parametrize(
    ("strategy", "fields"),
    [
        (AutoregressiveStrategy, {}),
        (EarlyExitStrategy, {"exit_layer": 3}),
        (SelfSpeculativeStrategy, {"exit_layer": 3, "num_speculations": 1}),
        (SelfSpeculativeStrategy, {"exit_layer": 5, "num_speculations": 4}),
    ],
)
def test_a_row_samples_the_same_alone_and_in_a_batch(
    strategy: type[GenerationStrategy],
    fields: dict[str, int],
    model: LlamaForCausalLM,
    decode: Callable[..., list[list[int]]],
) -> None:
    prompts = make_prompts(LENGTHS)[::2]
    fields |= {"sample": True, "temperature": 1.5, "seed": 7}
    batch = decode(strategy(model), prompts, **fields)
    assert batch == [decode(strategy(model), [prompt], **fields)[0] for prompt in prompts]
    assert batch == decode(strategy(model), prompts[::-1], **fields)[::-1]
    assert batch != decode(strategy(model), prompts, **fields | {"seed": 8})
    copies = decode(strategy(model), [prompts[1], prompts[0], prompts[1]], **fields)
    assert copies[:2] == [batch[1], batch[0]]
    assert copies[2] != copies[0], "two copies of a prompt are two samples"


def test_sampling_without_drafts_is_autoregressive(
    model: LlamaForCausalLM, decode: Callable[..., list[list[int]]]
) -> None:
    prompts, fields = make_prompts(LENGTHS)[::2], {"sample": True, "temperature": 1.5}
    self_speculative = decode(SelfSpeculativeStrategy(model), prompts, exit_layer=2, num_speculations=0, **fields)
    assert self_speculative == decode(AutoregressiveStrategy(model), prompts, **fields)


# Compiled

NUM_STEPS, NUM_SPECULATIONS = 4, 2


def first_steps(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    step: Callable[[EagerPasses, Rows, int], StepOutcome],
    sample: bool,
) -> Iterator[list[RowOutcome]]:
    """The first steps of self-speculative decoding; the drafts are not yet shortened by the limit."""
    config = GenerationConfig(
        max_new_tokens=NUM_STEPS * (NUM_SPECULATIONS + 1) + 1,
        sample=sample,
        temperature=1.5,
        exit_layer=1,
        num_speculations=NUM_SPECULATIONS,
    )
    stop_rule = StopRule(frozenset(), frozenset(), (), lambda tokens: "")
    with torch.inference_mode():
        request = GenerationRequest(prompts, config, stop_rule)
        rows = SelfSpeculativeStrategy(model).begin(request).step.rows
        plan = StepPlan(1, NUM_SPECULATIONS, model.config.num_hidden_layers)
        rule, kernels = verification_rule(config), TorchKernels(model)
        passes = EagerPasses(model, plan, rule, LogitsProcessorList(), kernels)
        for _ in range(NUM_STEPS):
            rows.cache.see(int(rows.lengths_B.max()) + NUM_SPECULATIONS)
            yield step(passes, rows, NUM_SPECULATIONS).unpack()


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step(backend: str, sample: bool, make_model: Callable[..., LlamaForCausalLM]) -> None:
    """One graph without breaks, the same drafts and tokens, and other lengths within a bucket compile nothing new."""
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2)
    compiled = torch.compile(speculative_step, fullgraph=True, backend=backend)
    for index, lengths in enumerate(((1, 9, 30), (12, 30, 2), (5, 6, 31), (1, 2, 3))):
        prompts = make_prompts(lengths, seed=index)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            steps = list(first_steps(model, prompts, compiled, sample))
        assert steps == list(first_steps(model, prompts, speculative_step, sample))
