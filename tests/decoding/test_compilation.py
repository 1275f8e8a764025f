"""Compiled steps: the eager path's output, without a recompilation, whatever the prompts; and weights never stale."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerBase, TopKLogitsWarper

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.stepwise_strategy import StepwiseStrategy

MakeModel = Callable[..., LlamaForCausalLM]
STRATEGIES = {
    "autoregressive": AutoregressiveStrategy,
    "early_exit": EarlyExitStrategy,
    "self_speculative": SelfSpeculativeStrategy,
}
CONTEXT = 256


@pytest.fixture(autouse=True)
def without_earlier_graphs() -> None:
    torch._dynamo.reset()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Graphs are traced and run as they are; the tests that are slow generate code."""
    return "inductor" if {"slow", "gpu"} & request.keywords.keys() else "aot_eager"


@pytest.fixture
def small(make_model: MakeModel) -> LlamaForCausalLM:
    return make_model(num_hidden_layers=2)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


def config(**fields: object) -> GenerationConfig:
    settings = {"max_new_tokens": 20, "sample": False, "exit_layer": 1, "num_speculations": 3, "compile": "default"}
    return GenerationConfig(**settings | fields)


def outcomes(results: list[GenerationResult]) -> list[tuple[object, ...]]:
    """Everything but the times."""
    return [(result.tokens, result.steps, result.stop_reason) for result in results]


def check_same(
    tokenizer: PreTrainedTokenizerBase,
    strategy: StepwiseStrategy,
    batches: list[list[list[int]]],
    **fields: object,
) -> None:
    """Compiled answers equal the eager ones; after the first batch nothing is compiled any more."""
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    eager = HuggingfaceLlamaGenerator(tokenizer, type(strategy)(strategy.model))
    for index, prompts in enumerate(batches):
        graphs = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            results = generator.generate(prompts, config(**fields))
        assert index == 0 or counters["stats"]["unique_graphs"] == graphs
        assert outcomes(results) == outcomes(eager.generate(prompts, config(**fields | {"compile": "none"})))


@pytest.mark.parametrize(
    ("name", "sample"), [*((name, False) for name in STRATEGIES), ("self_speculative", True)], ids=str
)
def test_compiled_steps_of_every_strategy(
    name: str, sample: bool, small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str
) -> None:
    """One row, up to the end of the context: the last draft is longer than what may still come."""
    batches = [prompts_of(length) for length in (9, 1, 100, 2, CONTEXT - 20, CONTEXT - 1)]
    check_same(tokenizer, STRATEGIES[name](small, backend), batches, sample=sample, temperature=1.5)


def test_ragged_batches(small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str) -> None:
    """Rows end at different times, at stop tokens and at the context's end, and stay in the batch."""
    batches = [prompts_of(5, 40, 1), prompts_of(CONTEXT - 3, 70, 3), prompts_of(12, 12, CONTEXT - 9)]
    check_same(tokenizer, SelfSpeculativeStrategy(small, backend), batches, stop_token_ids=list(range(2, 12)))


def test_a_trimmed_draft_head(small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str) -> None:
    batches = [prompts_of(length) for length in (9, 130)]
    check_same(tokenizer, SelfSpeculativeStrategy(small, backend), batches, draft_vocab=150)


@pytest.mark.slow
@pytest.mark.parametrize("compile_mode", ["default", "max"])
@pytest.mark.parametrize("fields", [{}, {"sample": True, "temperature": 1.5}, {"draft_vocab": 100}], ids=str)
def test_generated_code(
    compile_mode: str,
    fields: dict[str, object],
    small: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    backend: str,
) -> None:
    batches = [prompts_of(length) for length in (9, 1, 130, CONTEXT - 2)]
    check_same(tokenizer, SelfSpeculativeStrategy(small, backend), batches, compile=compile_mode, **fields)
    check_same(tokenizer, AutoregressiveStrategy(small, backend), batches, compile=compile_mode, **fields)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STRATEGIES)
def test_captured_steps(name: str, small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str) -> None:
    batches = [prompts_of(length) for length in (CONTEXT - 2, 9, 1, 130)]
    check_same(tokenizer, STRATEGIES[name](small.cuda(), backend), batches)


def test_the_tensors_stay_and_steps_are_compiled_once(
    small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str
) -> None:
    strategy = SelfSpeculativeStrategy(small, backend)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    generator.generate(prompts_of(3), config(num_speculations=1))
    [step], [rows] = strategy.compiled_steps.steps.values(), strategy.compiled_steps.rows.values()
    tensors = [rows.tokens_BC.data_ptr(), *(keys.data_ptr() for keys in rows.cache.keys)]
    generator.generate(prompts_of(70), config(num_speculations=1))
    assert list(strategy.compiled_steps.steps.values()) == [step]
    assert [function.__name__ for _, function in step.graphs] == ["draft", "speculative_step"]
    assert tensors == [rows.tokens_BC.data_ptr(), *(keys.data_ptr() for keys in rows.cache.keys)]
    generator.generate(prompts_of(3), config(num_speculations=0))
    assert len(strategy.compiled_steps.steps) == 2
    assert len(strategy.compiled_steps.rows) == 1


@pytest.mark.parametrize("change", ["in place", "moved"])
def test_weights_are_never_stale(
    change: str, small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str
) -> None:
    strategy = AutoregressiveStrategy(small, backend)
    check_same(tokenizer, strategy, [prompts_of(9)])
    weights = {name: weight * 1.5 for name, weight in small.state_dict().items()}
    small.load_state_dict(weights, assign=change == "moved")
    [before] = strategy.compiled_steps.steps.values()
    check_same(tokenizer, strategy, [prompts_of(9)])
    assert before not in strategy.compiled_steps.steps.values()


def test_an_answer_that_was_left_does_not_show_in_the_next(
    small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str
) -> None:
    strategy = SelfSpeculativeStrategy(small, backend)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    steps = strategy.steps(generator.request(prompts_of(150), config(max_new_tokens=90)))
    for _ in range(8):
        next(steps)
    check_same(tokenizer, strategy, [prompts_of(4)])


def test_a_step_with_processors_is_not_compiled(
    small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str
) -> None:
    strategy = SelfSpeculativeStrategy(small, backend)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    processors = LogitsProcessorList([TopKLogitsWarper(1)])
    [result] = generator.generate(prompts_of(5), config(), logits_processors=processors)
    assert len(result.tokens) == 20
    assert not strategy.compiled_steps.steps


def test_a_compiler_that_fails_gets_a_sentence(
    small: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, backend: str
) -> None:
    def failing(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler\nat all")

    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(small, failing))
    with pytest.raises(ValueError, match=r"--compile: this model cannot be compiled here .*no compiler.") as caught:
        generator.generate(prompts_of(5), config())
    assert "\n" not in str(caught.value)
