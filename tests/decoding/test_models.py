"""Which models decode, what decoding leaves untouched, and what a result says."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.stopping import StopReason
from self_speculation.families import check_supported
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    RowStep,
    check_exit_layer,
)
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

STRATEGIES = (AutoregressiveStrategy, EarlyExitStrategy, SelfSpeculativeStrategy)
PROMPTS = [[3], [4, 5, 6, 7, 8, 9, 10], [11, 12]]
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def run(strategy: GenerationStrategy, tokenizer: PreTrainedTokenizerBase, **fields: object) -> list[GenerationResult]:
    fields = {"max_new_tokens": 10, "sample": False, "exit_layer": 4, "num_speculations": 3} | fields
    return HuggingfaceLlamaGenerator(tokenizer, strategy).generate(PROMPTS, GenerationConfig(**fields))


def tokens_of(results: list[GenerationResult]) -> list[list[int]]:
    return [result.tokens for result in results]


# What is supported


@pytest.mark.parametrize(
    ("rope_type", "parameters"),
    [
        ("dynamic", {"rope_theta": 1e4, "factor": 4.0}),
        ("longrope", ROPE | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
    ],
)
def test_rope_that_depends_on_the_call_is_refused(
    rope_type: str, parameters: dict[str, object], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_model(rope_parameters=parameters | {"rope_type": rope_type})
    with pytest.raises(ValueError, match=f"--model uses '{rope_type}' RoPE scaling"):
        check_supported(model)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_attention_is_switched_to_sdpa(
    parameters: dict[str, object],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A model loaded with eager attention, whose masks are added, decodes as one loaded with `sdpa`."""
    model = make_model(rope_parameters=parameters, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    check_supported(model)
    assert model.config._attn_implementation == "sdpa"
    expected = run(AutoregressiveStrategy(make_model(rope_parameters=parameters)), tokenizer)
    assert tokens_of(run(SelfSpeculativeStrategy(model), tokenizer)) == tokens_of(expected)


@pytest.mark.parametrize("exit_layer", [None, 0, -1, 7])
def test_exit_layers_that_the_model_lacks(
    exit_layer: int | None, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="--exit_layer must lie between 1 and 6"):
        check_exit_layer(exit_layer, model)
    if exit_layer in (None, 7):
        for strategy in (EarlyExitStrategy, SelfSpeculativeStrategy):
            with pytest.raises(ValueError, match="--exit_layer"):
                run(strategy(model), tokenizer, exit_layer=exit_layer)
    with pytest.raises(ValueError, match="--num_speculations"):
        run(SelfSpeculativeStrategy(model), tokenizer, num_speculations=None)


# Types, devices, weights


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(
    dtype: torch.dtype, sample: bool, make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """In float32 this model's margins are far above rounding; in bfloat16 ties may differ, early exit may not."""
    model = make_model(eos_token_id=None).to(dtype)
    model.generation_config.eos_token_id = None
    results = {strategy: tokens_of(run(strategy(model), tokenizer, sample=sample)) for strategy in STRATEGIES}
    assert all(0 < len(tokens) <= 10 for answers in results.values() for tokens in answers)
    assert results[EarlyExitStrategy] != results[AutoregressiveStrategy]
    last = run(EarlyExitStrategy(model), tokenizer, sample=sample, exit_layer=6)
    assert tokens_of(last) == results[AutoregressiveStrategy]
    if dtype == torch.float32 and not sample:
        assert results[SelfSpeculativeStrategy] == results[AutoregressiveStrategy]


@pytest.mark.parametrize("how", ["device_map", "disk_offload"])
def test_layers_on_disk(
    how: str,
    tmp_path: Path,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A model that does not fit in memory answers the same."""
    model = make_model()
    expected = [tokens_of(run(strategy(model), tokenizer)) for strategy in STRATEGIES]
    if how == "disk_offload":
        disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path / "model")
        on_disk = ("model.layers.1", "model.layers.4", "model.layers.5", "lm_head")
        names = (
            "model.embed_tokens",
            *(f"model.layers.{layer}" for layer in range(6)),
            "model.norm",
            "model.rotary_emb",
        )
        device_map = {name: "disk" if name in on_disk else "cpu" for name in (*names, "lm_head")}
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded", dtype=torch.float64
        )
    check_supported(model)
    assert model.model.layers[4].mlp.down_proj.weight.device.type == "meta"
    assert [tokens_of(run(strategy(model), tokenizer)) for strategy in STRATEGIES] == expected


def test_weights_are_untouched(make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase) -> None:
    model, untouched = make_model(), make_model()
    check_supported(model)
    for strategy in STRATEGIES:
        run(strategy(model), tokenizer, sample=True)
    weights = untouched.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == untouched.config.to_dict()


# Results


def test_results(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Counts add up for every strategy; without drafts there is no acceptance rate, and a step is a token."""
    for strategy in STRATEGIES:
        for result in run(strategy(model), tokenizer):
            assert result.prefill_seconds > 0
            assert result.decode_seconds > 0
            assert result.first_token_seconds > result.prefill_seconds
            assert result.decode_tokens == len(result.tokens) - len(result.steps[0].tokens)
            decode_rate = result.decode_tokens / result.decode_seconds
            assert result.decode_tokens_per_second == pytest.approx(decode_rate)
            assert result.tokens_per_second == pytest.approx(len(result.tokens) / result.seconds)
            assert result.tokens == [token for step in result.steps for token in step.tokens]
            assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
            assert len(result.accepted_per_step) == len(result.steps)
            assert sum(result.accepted_per_step) == result.num_accepted <= result.num_drafted
            # Each step adds one of the full model's tokens; an end token that was drafted leaves the last one out.
            assert len(result.tokens) - result.num_accepted - len(result.steps) in (0, -1)
            assert result.tokens_per_step == pytest.approx(len(result.tokens) / len(result.steps))
            if strategy is SelfSpeculativeStrategy:
                assert result.acceptance_rate == pytest.approx(result.num_accepted / result.num_drafted)
            else:
                assert result.acceptance_rate is None


def test_result_of_given_steps() -> None:
    steps = [RowStep([1, 2, 3], 3, [1, 2, 3, 4]), RowStep([5, 6, 7], 1, [5, 8]), RowStep([], 0, [9])]
    result = GenerationResult("", [1, 2, 3, 4, 5, 8, 9], StopReason.MAX_STEPS, 0.5, 0.75, 2.0, steps)
    assert (result.num_drafted, result.num_accepted, result.accepted_per_step) == (6, 4, [3, 1, 0])
    assert result.acceptance_rate == pytest.approx(4 / 6)
    assert result.tokens_per_step == pytest.approx(7 / 3)
    assert result.decode_tokens_per_second == pytest.approx(3 / 2)
    assert result.seconds == pytest.approx(2.75)
    assert result.tokens_per_second == pytest.approx(7 / 2.75)
    assert [step.is_rejected for step in steps] == [False, True, False]
    assert (GenerationResult().acceptance_rate, GenerationResult().tokens_per_step) == (None, 0.0)


def test_times_end_when_the_device_is_done(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a CUDA device, every step waits for it before the clock is read."""
    waits: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waits.append(device))
    results = run(AutoregressiveStrategy(model), tokenizer, max_new_tokens=4)
    assert len(waits) >= 1 + max(len(result.steps) for result in results)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"max_new_tokens": -1}, "--max_steps"),
        ({"exit_layer": 0}, "--exit_layer"),
        ({"num_speculations": -1}, "--num_speculations"),
        ({"temperature": 0.0, "sample": True}, "--temperature"),
        ({"top_p": 0.0}, "--top_p"),
        ({"top_p": 1.1}, "--top_p"),
        ({"top_k": -1}, "--top_k"),
        ({"no_repeat_ngram_size": 0}, "--no_repeat_ngram_size"),
        ({"stop_words": ["a", ""]}, "--stop_words"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_configurations_name_the_flag(fields: dict[str, object], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        GenerationConfig(**fields)
    GenerationConfig(temperature=0.0, sample=False)


# Long prompts


@pytest.mark.parametrize("chunk", [1, 3, 64, 70, 1000])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prefill_in_chunks_gives_the_same(
    strategy: type[GenerationStrategy], chunk: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A ragged batch; a chunk longer than the folded calls, and plain layers as well as hooked ones."""
    prompts = [[(7 * n + row) % 300 for n in range(length)] for row, length in enumerate((1, 70, 139))]
    config = GenerationConfig(max_new_tokens=8, sample=False, exit_layer=2, num_speculations=3)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(model))
    expected = generator.generate(prompts, config)
    handles = [model.model.layers[layer].register_forward_hook(lambda *_: None) for layer in (1, 4)]
    actual = generator.generate(prompts, dataclasses.replace(config, prefill_chunk=chunk))
    for handle in handles:
        handle.remove()
    assert [result.tokens for result in actual] == [result.tokens for result in expected]


def test_prefill_reads_no_more_than_a_chunk_at_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    lengths = []
    handle = model.model.layers[0].register_forward_hook(lambda layer, args, out: lengths.append(args[0].shape[1]))
    config = GenerationConfig(max_new_tokens=1, sample=False, prefill_chunk=30)
    HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate([list(range(2, 103))], config)
    handle.remove()
    assert lengths == [30, 30, 30, 10, 1]


# Rows that have ended


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ended_rows_leave_the_batch(
    strategy: type[GenerationStrategy], sample: bool, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows end early at the context; half of them gone, the others go on in a smaller batch, with the same tokens."""
    prompts = [
        [(row + 5 * n) % 299 + 1 for n in range(length)] for row, length in enumerate((250, 9, 254, 252, 30, 253))
    ]
    config = GenerationConfig(max_new_tokens=20, sample=sample, exit_layer=2, num_speculations=2)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(model))
    alone = [generator.generate([prompt], config)[0] for prompt in prompts]
    sizes = []
    handle = model.lm_head.register_forward_pre_hook(lambda head, args: sizes.append(len(args[0])))
    together = generator.generate(prompts, config)
    handle.remove()
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    if not sample:
        assert [len(result.tokens) for result in together] == [6, 20, 2, 4, 20, 3]
    assert sizes[0] == 6
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 3
    if strategy is AutoregressiveStrategy and not sample:
        assert sizes == [6] * 4 + [3] * 16


def test_a_smaller_batch_keeps_its_rows_cache(make_model: Callable[..., LlamaForCausalLM]) -> None:
    cache = PositionAddressedCache(2, 64)
    for layer in range(2):
        keys = torch.arange(4.0)[:, None, None, None].expand(4, 2, 1, 8) + 10 * layer
        cache.access(torch.zeros(4, 1, dtype=torch.long)).update(keys, -keys, layer)
    before = cache.num_bytes
    cache.keep(torch.tensor([1, 3]))
    assert cache.num_bytes == before // 2
    for layer in range(2):
        expected = torch.tensor([1.0, 3.0]) + 10 * layer
        assert torch.equal(cache.keys[layer][:, 0, 0, 0], expected)
        assert torch.equal(cache.values[layer][:, 1, 0, 7], -expected)
