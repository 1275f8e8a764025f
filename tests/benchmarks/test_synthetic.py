"""Synthetic checkpoints: their sizes, the acceptance that was asked for, and their label."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks import synthetic
from benchmarks.synthetic import SHAPES, Goal, Shape, Trial
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.commands import benchmark
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator, RowStep
from self_speculation.loading import ModelArguments, load, read_recommendation
from self_speculation.measuring.equivalence import CellReport, EquivalenceCheck

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def tiny_model(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> LlamaForCausalLM:
    return synthetic.make_model(TINY.config("tiny"), device, dtype, seed=0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the script in this process; its exit code and what it said."""

    def run(*flags: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["synthetic.py", *map(str, flags)])
        try:
            synthetic.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("160m", 162_417_408),
    ],
)
def test_shapes_have_the_known_numbers_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].config(name))
    assert model.num_parameters() == parameters


def test_weights_are_made_in_the_dtype_and_by_the_seed() -> None:
    model = tiny_model(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in tiny_model(torch.bfloat16).named_parameters():
        assert torch.equal(weight, model.get_parameter(name))
    other = synthetic.make_model(TINY.config("tiny"), CPU, torch.bfloat16, seed=1)
    assert not torch.equal(other.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)


def test_weights_have_their_scales() -> None:
    model = tiny_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.weight.std().item() == pytest.approx(2 / math.sqrt(64), rel=0.1)
    assert attention.v_proj.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.1)
    assert mlp.down_proj.weight.std().item() == pytest.approx(1 / math.sqrt(192), rel=0.1)
    embeddings = model.model.embed_tokens.weight
    assert embeddings[:64].std() > embeddings[-64:].std() > 0.5 * synthetic.EMBEDDING_SCALE


def test_damping_scales_what_late_layers_write_and_nothing_else() -> None:
    whole, damped = tiny_model(), tiny_model()
    synthetic.damp(damped, 3, 0.25, seed=0)
    for name, weight in damped.named_parameters():
        is_late = name.startswith("model.layers.") and int(name.split(".")[2]) >= 3
        factor = 0.25 if is_late and ("o_proj" in name or "down_proj" in name) else 1.0
        torch.testing.assert_close(weight, factor * whole.get_parameter(name))
    # Damping is not cumulative.
    synthetic.damp(damped, 3, 1.0, seed=0)
    for name, weight in damped.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name))


def test_without_late_layers_everything_is_accepted() -> None:
    model = tiny_model()
    trial = synthetic.damp_to(model, Goal(acceptance=1.0, exit_layer=2, trial_prompts=2, trial_tokens=29))
    assert (trial.factor, trial.acceptance, trial.num_tokens) == (0.0, 1.0, 58)
    # 29 tokens are four steps of seven and one of one.
    assert trial.tokens_per_step == 29 / 5


def test_damping_reaches_the_acceptance_asked_for() -> None:
    model = tiny_model()
    goal = Goal(acceptance=0.6, tolerance=0.05, exit_layer=3, num_speculations=4, trial_prompts=4, trial_tokens=32)
    trial = synthetic.damp_to(model, goal)
    assert abs(trial.acceptance - 0.6) <= 0.05
    assert 0 < trial.factor < 1
    assert trial.num_tokens == 4 * 32
    # The model is left with that factor: a fresh measurement of the same prompts gives the same.
    prompts = synthetic.random_prompts(512, 4, synthetic.PROMPT_TOKENS, seed=0)
    config = goal.generation_config()
    generator = HuggingfaceLlamaGenerator(synthetic.byte_tokenizer(), synthetic.SelfSpeculativeStrategy(model))
    assert Trial.of(trial.factor, generator.generate(prompts, config)) == trial
    assert model.config.synthetic_damping["factor"] == trial.factor


def test_acceptance_falls_with_the_factor() -> None:
    model = tiny_model()
    generator = HuggingfaceLlamaGenerator(synthetic.byte_tokenizer(), synthetic.SelfSpeculativeStrategy(model))
    config = Goal(exit_layer=2, trial_tokens=32).generation_config()
    prompts = synthetic.random_prompts(512, 4, synthetic.PROMPT_TOKENS, seed=0)
    rates = []
    for factor in (0.0, 0.03, 1.0):
        synthetic.damp(model, 2, factor, seed=0)
        rates.append(Trial.of(factor, generator.generate(prompts, config)).acceptance)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[-1] < 0.2


def test_greedy_text_is_no_cycle() -> None:
    model = synthetic.make_model(Shape(4, 64, 4, 2, 192, 4096, False).config("test"), CPU, torch.float32, seed=0)
    generator = HuggingfaceLlamaGenerator(synthetic.byte_tokenizer(), AutoregressiveStrategy(model))
    prompts = synthetic.random_prompts(4096, 4, synthetic.PROMPT_TOKENS, seed=0)
    results = generator.generate(prompts, GenerationConfig(max_new_tokens=64, sample=False))
    assert sum(synthetic.repeated_share(result.tokens) for result in results) / 4 < 0.1
    assert len({token for result in results for token in result.tokens}) > 64


def test_trials_count_by_hand() -> None:
    steps = [RowStep([1, 2], 1, [1, 5]), RowStep([1, 2], 2, [1, 2, 1])]
    one = GenerationResult(tokens=[1, 5, 1, 2, 1], steps=steps)
    other = GenerationResult(tokens=[3, 3, 3, 3, 3], steps=[RowStep([3, 3, 3, 3], 4, [3] * 5)])
    trial = Trial.of(0.5, [one, other])
    assert (trial.factor, trial.num_tokens) == (0.5, 10)
    assert trial.acceptance == 7 / 8
    assert trial.tokens_per_step == 10 / 3
    assert trial.distinct_share == pytest.approx((3 / 5 + 1 / 5) / 2)
    # (1 5), (5 1), (1 2), (2 1) are new; of four times (3 3) three are not.
    assert trial.repeated_share == pytest.approx((0 + 3 / 4) / 2)


def test_a_saved_checkpoint_is_ordinary_and_labelled(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    folder = tmp_path / "synthetic"
    sizes = ("--shape", "tiny", "--num_layers", 4, "--tolerance", 0.1, "--trial_prompts", 2, "--trial_tokens", 32)
    code, out = command(*sizes, "--device", "cpu", "--save", folder)
    assert code == 0
    printed = json.loads(out)
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert printed["synthetic"] is saved["synthetic"] is True
    assert printed["name"] == saved["synthetic_name"] == "synthetic-tiny-changed"
    assert printed["factor"] == saved["synthetic_damping"]["factor"]
    assert abs(printed["acceptance"] - 0.7) <= 0.1
    assert printed["num_tokens"] == 64
    model, tokenizer = load(ModelArguments(str(folder)))
    assert model.config.num_hidden_layers == 4
    assert tokenizer.eos_token_id is None
    assert tokenizer.decode(tokenizer("Näme").input_ids, skip_special_tokens=True) == "Näme"
    assert read_recommendation(str(folder), 4).num_speculations == 6


@pytest.mark.slow
def test_the_benchmark_runs_on_a_saved_checkpoint(run: Callable[..., int], tmp_path: Path, rows: Path) -> None:
    folder = tmp_path / "synthetic"
    model = tiny_model()
    synthetic.save(model, Goal().for_model(model), folder)
    flags = ("--model", folder, "--data_path", rows, "--num_samples", 1, "--max_steps", 9, "--sample", "False")
    strategies = ("--generation_strategy", "self_speculative", "hf_generate", "--score_text", "False")
    assert run(benchmark.main, *flags, *strategies) == 0
    figures = json.loads((tmp_path / "logs" / "benchmark.json").read_text())["strategies"]
    assert [values["tokens"] for values in figures.values()] == [9, 9]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--shape", "huge"), "A shape must be one of"),
        (("--acceptance", "1.5"), "--acceptance must lie above 0"),
        (("--tolerance", "0"), "--tolerance must be positive"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--num_speculations", "0"), "--num_speculations must be at least 1"),
        (("--trial_prompts", "0"), "--trial_prompts must be at least 1"),
        (("--trial_tokens", "1"), "--trial_tokens must lie between 2 and 4064"),
        (("--exit_layer", "9"), "--exit_layer must lie between 1 and 8"),
        (("--vocab_size", "100"), "--vocab_size must be at least 258"),
        (("--num_layers", "0"), "--num_layers must be at least 1"),
        (("--hidden_size", "66"), "--hidden_size must be a multiple of twice --num_heads"),
        (("--num_key_value_heads", "3"), "--num_heads must be a multiple of --num_key_value_heads"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--device", "nowhere"), "--device: 'nowhere'"),
    ],
)
def test_bad_input_gets_one_sentence(
    command: Callable[..., tuple[int, str]], flags: tuple[str, ...], words: str
) -> None:
    code, said = command("--shape", "tiny", "--trial_prompts", 1, "--trial_tokens", 8, *flags)
    assert code == 2
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_an_acceptance_out_of_reach_is_an_error() -> None:
    """Layer 7 of 8 agrees with the last more often than that, whatever the factor."""
    goal = Goal(acceptance=0.001, tolerance=0.0001, exit_layer=7, trial_prompts=1, trial_tokens=16)
    with pytest.raises(ValueError, match=r"--acceptance 0\.001 was not reached within 0\.0001 by 3 damping factors"):
        synthetic.damp_to(tiny_model(), goal, most_trials=3)


@pytest.mark.gpu
def test_on_cuda_self_speculative_text_is_the_full_models() -> None:
    model = tiny_model(torch.bfloat16, torch.device("cuda"))
    goal = Goal(tolerance=0.05, exit_layer=2, trial_tokens=64)
    trial = synthetic.damp_to(model, goal)
    assert abs(trial.acceptance - 0.7) <= 0.05
    cells = [CellReport(exit_layer, drafts) for exit_layer in (1, 2, 7) for drafts in (1, 6)]
    config = GenerationConfig(max_new_tokens=64, sample=False)
    check = EquivalenceCheck(model, synthetic.byte_tokenizer(), config, cells)
    for cell in check.run(["def add(a, b):", "class Stack:", "import os", "x ="]):
        # A random model's two best logits often lie within rounding of bfloat16, so there may be ties.
        assert not cell.num_failures, cell
        assert cell.drafted
