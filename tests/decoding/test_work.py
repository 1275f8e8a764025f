"""What decoding costs and touches: layer applications, LM-head rows, cache bytes, and stale entries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LogitsProcessorList

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.decoding.cache import BUCKET
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.stopping import StopRule
from self_speculation.generator_base import GenerationConfig, GenerationRequest, GenerationStrategy
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.stepwise_strategy import StepwiseStrategy

NUM_LAYERS = 6
LENGTHS = (1, 3, 12, 60)


def make_request(prompts: list[list[int]], **fields: object) -> GenerationRequest:
    """A greedy request that only the limit ends."""
    config = GenerationConfig(
        **{"max_new_tokens": 15, "sample": False, "exit_layer": 4, "num_speculations": 3} | fields
    )
    return GenerationRequest(
        prompts, config, StopRule(frozenset(), frozenset(), (), lambda tokens: ""), LogitsProcessorList()
    )


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def decode(strategy: GenerationStrategy, request: GenerationRequest) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in request.prompts]
    for step in strategy.steps(request):
        for row, row_step in zip(tokens, step.rows, strict=True):
            row += row_step.tokens if row_step else []
    return tokens


@dataclass
class Work:
    """Tokens that went through each layer, calls of each layer, and tokens that went through the LM head."""

    layer_tokens: list[int]
    layer_calls: list[int]
    head_tokens: int


@contextmanager
def counted(model: LlamaForCausalLM) -> Iterator[Work]:
    work = Work([0] * NUM_LAYERS, [0] * NUM_LAYERS, 0)

    def count_layer(index: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            work.layer_calls[index] += 1
            work.layer_tokens[index] += args[0].shape[1]

        return hook

    def count_head(module: nn.Module, args: tuple[Tensor]) -> None:
        work.head_tokens += args[0].shape[1]

    hooks = [layer.register_forward_pre_hook(count_layer(index)) for index, layer in enumerate(model.model.layers)]
    hooks.append(model.lm_head.register_forward_pre_hook(count_head))
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def work_of_steps(strategy: GenerationStrategy, request: GenerationRequest, count: int) -> list[Work]:
    """The work of prefill and of the first steps."""
    steps, works = strategy.steps(request), []
    for _ in range(count):
        with counted(strategy.model) as work:
            next(steps)
        works.append(work)
    return works


# Layers and head


def prefill_work(request: GenerationRequest, num_layers: int = NUM_LAYERS) -> Work:
    """Each row by itself, without padding, in so many layers."""
    lengths = [len(prompt) - 1 for prompt in request.prompts]
    others = [0] * (NUM_LAYERS - num_layers)
    return Work([sum(lengths)] * num_layers + others, [sum(map(bool, lengths))] * num_layers + others, 0)


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("num_speculations", [0, 1, 3])
@pytest.mark.parametrize("exit_layer", [1, 4, 6])
def test_work_of_a_self_speculative_step(
    exit_layer: int, num_speculations: int, num_rows: int, model: LlamaForCausalLM
) -> None:
    """d·E + L layer applications, each of the d + 1 tokens once per layer, and d + (d + 1) rows of the LM head."""
    request = make_request(make_prompts()[-num_rows:], exit_layer=exit_layer, num_speculations=num_speculations)
    prefill, *steps = work_of_steps(SelfSpeculativeStrategy(model), request, 3)
    assert prefill == prefill_work(request)
    drafting, verifying = exit_layer, NUM_LAYERS - exit_layer
    for work in steps:
        assert sum(work.layer_calls) == num_speculations * exit_layer + NUM_LAYERS
        assert work.layer_calls == [num_speculations + 1] * drafting + [1] * verifying
        assert work.layer_tokens == [num_speculations + 1] * NUM_LAYERS
        assert work.head_tokens == num_speculations + num_speculations + 1


@pytest.mark.parametrize("exit_layer", [None, 1, 4])
def test_work_of_an_autoregressive_step(exit_layer: int | None, model: LlamaForCausalLM) -> None:
    """All layers, whatever `exit_layer` says."""
    request = make_request(make_prompts(), exit_layer=exit_layer)
    prefill, *steps = work_of_steps(AutoregressiveStrategy(model), request, 3)
    assert prefill == prefill_work(request)
    assert steps == [Work([1] * NUM_LAYERS, [1] * NUM_LAYERS, 1)] * 2


@pytest.mark.parametrize("exit_layer", [1, 4, 6])
def test_work_of_an_early_exit_step(exit_layer: int, model: LlamaForCausalLM) -> None:
    """E layers in prefill and step, and a cache of E layers."""
    request = make_request(make_prompts(), exit_layer=exit_layer)
    prefill, *steps = work_of_steps(EarlyExitStrategy(model), request, 3)
    mine, others = [1] * exit_layer, [0] * (NUM_LAYERS - exit_layer)
    assert prefill == prefill_work(request, exit_layer)
    assert steps == [Work(mine + others, mine + others, 1)] * 2
    keys = EarlyExitStrategy(model).begin(request).step.rows.cache.keys
    assert [one is not None for one in keys] == [bool(one) for one in mine + others]


def test_the_draft_is_no_longer_than_the_limit_allows(model: LlamaForCausalLM) -> None:
    """With two tokens to go the step drafts one, with one to go none."""
    for max_new_tokens, num_drafted in ((1, 0), (2, 1), (3, 2)):
        request = make_request(make_prompts(), max_new_tokens=max_new_tokens, num_speculations=8)
        _, work = work_of_steps(SelfSpeculativeStrategy(model), request, 2)
        assert work.head_tokens == num_drafted + num_drafted + 1


# Surgery


@pytest.mark.parametrize("exit_layer", [1, 3, 5])
def test_identity_layers_accept_everything(exit_layer: int, make_model: Callable[..., LlamaForCausalLM]) -> None:
    """With the layers from E on the identity, all is accepted: ⌈N/(d+1)⌉ steps, and early exit is the full model."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers[exit_layer:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    expected = decode(AutoregressiveStrategy(model), make_request(make_prompts()))
    assert decode(EarlyExitStrategy(model), make_request(make_prompts(), exit_layer=exit_layer)) == expected
    for num_speculations in (1, 3, 4, 8, 40):
        request = make_request(make_prompts(), exit_layer=exit_layer, num_speculations=num_speculations)
        _, *steps = SelfSpeculativeStrategy(model).steps(request)
        assert len(steps) == -(-15 // (num_speculations + 1))
        for row in range(len(LENGTHS)):
            rows = [step.rows[row] for step in steps]
            assert [row_step.accepted for row_step in rows] == [len(row_step.drafted) for row_step in rows]
            assert [token for row_step in rows for token in row_step.tokens] == expected[row]


def test_early_exit_at_the_last_layer_is_autoregressive(model: LlamaForCausalLM) -> None:
    expected = decode(AutoregressiveStrategy(model), make_request(make_prompts()))
    assert decode(EarlyExitStrategy(model), make_request(make_prompts(), exit_layer=NUM_LAYERS)) == expected
    assert decode(EarlyExitStrategy(model), make_request(make_prompts(), exit_layer=3)) != expected


# The cache


@pytest.mark.parametrize("num_speculations", [1, 8])
def test_cache_bytes(num_speculations: int, model: LlamaForCausalLM) -> None:
    """Drafting and verification share one cache: no more than autoregressive decoding's, up to a bucket."""
    for max_new_tokens in (15, 150):
        request = make_request(make_prompts(), max_new_tokens=max_new_tokens, num_speculations=num_speculations)
        strategies = (AutoregressiveStrategy(model), SelfSpeculativeStrategy(model))
        autoregressive, self_speculative = (one.begin(request).step.rows.cache.num_bytes for one in strategies)
        config = model.config
        bytes_per_position = 2 * 8 * NUM_LAYERS * config.num_key_value_heads * config.head_dim * len(LENGTHS)
        assert self_speculative <= 1.02 * autoregressive + BUCKET * bytes_per_position
        assert autoregressive < (60 + max_new_tokens + 1 + BUCKET) * bytes_per_position


def poison(rows: Rows) -> None:
    """Overwrite what lies past the rows' lengths: tokens, and keys and values of all layers."""
    columns_C = torch.arange(rows.tokens_BC.shape[1])
    rows.tokens_BC[columns_C >= rows.lengths_B[:, None]] = 13
    columns_C = torch.arange(rows.cache.capacity)
    stale_BHC = (columns_C >= rows.lengths_B[:, None] - 1)[:, None].expand(-1, 2, -1)
    for buffer in (*rows.cache.keys, *rows.cache.values):
        if buffer is not None:
            buffer[stale_BHC] = 1e4


@pytest.mark.parametrize("strategy", [AutoregressiveStrategy, EarlyExitStrategy, SelfSpeculativeStrategy])
def test_stale_entries_are_invisible(strategy: type[StepwiseStrategy], model: LlamaForCausalLM) -> None:
    """Rejected drafts and padding are never read: poisoned between steps, they change neither tokens nor drafts."""
    request = make_request(make_prompts(), num_speculations=5)
    expected = list(strategy(model).steps(request))
    steps = []
    session = strategy(model).begin(request)
    for step in session.steps():
        steps.append(step)
        lengths = [len(request.prompts[row]) + len(session.generated[row]) for row in session.prompt_of_row]
        assert session.step.rows.lengths_B.tolist() == lengths, "rows that have ended must not go on"
        with torch.inference_mode():
            poison(session.step.rows)
    assert steps == expected
    rejected = [row.is_rejected for step in steps for row in step.rows if row]
    assert any(rejected) == (strategy is SelfSpeculativeStrategy)


# The stream of steps


@pytest.mark.parametrize("strategy", [AutoregressiveStrategy, SelfSpeculativeStrategy])
def test_a_consumer_may_stop_and_start_again(strategy: type[GenerationStrategy], model: LlamaForCausalLM) -> None:
    request, other = make_request(make_prompts()), make_request(make_prompts()[::-1], max_new_tokens=9)
    expected, expected_other = list(strategy(model).steps(request)), list(strategy(model).steps(other))
    one_strategy = strategy(model)
    stream = one_strategy.steps(request)
    assert [next(stream) for _ in range(3)] == expected[:3]
    assert not torch.is_inference_mode_enabled()
    second = one_strategy.steps(other)
    assert [next(second) for _ in range(3)] == expected_other[:3]
    second.close()
    assert list(stream) == expected[3:]
    assert list(one_strategy.steps(request)) == expected
