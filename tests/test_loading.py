"""Loading, recommendations, and strategies by their names."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.commands import benchmark, correctness, generate, sweep, sweeping
from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments, Recommendation, Use, advice_for, load, read_recommendation
from self_speculation.measuring.rivals import RIVALS, HuggingfaceStaticStrategy
from self_speculation.self_speculation_generator import AdaptiveStrategy, OpenStrategy, SelfSpeculativeStrategy
from self_speculation.settings import by_flag
from self_speculation.strategies import fill_in, make_strategy, with_fixed_drafts

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A checkpoint of the tiny model, in bfloat16."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_dtype_is_the_checkpoint_s_own_where_the_cpu_is_fast_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        model, _ = load(ModelArguments(model=str(folder), device="cpu"))
        assert model.dtype == dtype
        assert not model.training
    assert load(ModelArguments(model=str(folder), dtype="float64"))[0].dtype == torch.float64


def test_model_args_reach_from_pretrained(folder: Path) -> None:
    arguments = ModelArguments(model=str(folder), model_args="attn_implementation=eager, num_hidden_layers=3")
    model, _ = load(arguments)
    assert model.config.num_hidden_layers == 3
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("revision=main,dtype=float16", "revision=main,dtype=float16"),
        ("token=abc,revision=main", "token=***,revision=main"),
        ("use_auth_token='a b', x=1", "use_auth_token=***, x=1"),
        ("x=1,api_key=k,API-KEY=k,password=p,my_secret=s", "x=1,api_key=***,API-KEY=***,password=***,my_secret=***"),
        ("name=hf_abcDEF123", "name=***"),
        ("token:hf_abc", "token:***"),
        ("proxies={'https': 'http://me:word@host:8'}", "proxies={'https': 'http://***@host:8'}"),
        ("x={'token': 'abc'}", "x={'token': ***}"),
        ("pad_token=<pad>,max_tokens=3,tokenizer=a", "pad_token=<pad>,max_tokens=3,tokenizer=a"),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert by_flag(ModelArguments(model_args=text))["model_args"] == expected


def test_a_secret_is_in_no_result_and_not_printed(
    run: Callable[..., int], rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And a run with one is resumed."""
    given = ["--model_args", "token=SesameOpen", "--max_steps", 1]
    texts = [*given, "--data_path", rows, "--num_samples", 1]
    assert run(generate.main, *given, "--prompt", "x") == 0
    assert run(correctness.main, *texts) == 0
    assert run(benchmark.main, *texts, "--score_text", "False") == 0
    assert run(benchmark.main, *texts, "--score_text", "False", "--resume", "True") == 0
    assert run(generate.main, "--model_args", "token=SesameOpen,nonsense=3", "--prompt", "x") == 2
    assert run(generate.main, "--model_args", "nonsense=3,token:SesameOpen", "--prompt", "x") == 2
    said = capfd.readouterr()
    pasted = sweeping.command(ModelArguments(model_args="token=SesameOpen"), sweep.SweepConfig(), Cell(1, 2))
    assert "SesameOpen" not in said.out + said.err + pasted
    files = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"generate.jsonl", "correctness.json", "benchmark.json"}
    assert not [path for path in files if b"SesameOpen" in path.read_bytes()]


def test_recommendations(tmp_path: Path) -> None:
    assert read_recommendation("facebook/layerskip-llama2-7B", 32).exit_layer == 8
    assert read_recommendation("someone/llama", 32) == read_recommendation("another/llama", 33)
    assert read_recommendation("someone/llama", 2).exit_layer == 1
    (tmp_path / "layerskip.json").write_text(json.dumps({"exit_layer": 5, "num_speculations": 7}))
    advice = read_recommendation(str(tmp_path), 32)
    assert (advice.exit_layer, advice.num_speculations) == (5, 7)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not a JSON object"),
        (b"[1, 2]", "is not a JSON object"),
        (b"7", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"exit_layer": 1}', "is not a JSON object"),
        (bytes(range(128, 256)), "is not a JSON object"),
        (b"[" * 10**5, "is not a JSON object"),
        (b'{"exit_layer": 0, "num_speculations": 4}', "exit_layer must be a whole number from 1 to 6, not 0"),
        (b'{"exit_layer": 7, "num_speculations": 4}', "exit_layer must be a whole number from 1 to 6, not 7"),
        (b'{"exit_layer": "2", "num_speculations": 4}', "exit_layer must be a whole number from 1 to 6, not '2'"),
        (b'{"exit_layer": 2.0, "num_speculations": 4}', "exit_layer must be a whole number from 1 to 6, not 2.0"),
        (b'{"exit_layer": true, "num_speculations": 4}', "exit_layer must be a whole number from 1 to 6, not True"),
        (b'{"exit_layer": null, "num_speculations": 4}', "exit_layer must be a whole number from 1 to 6, not None"),
        (b'{"exit_layer": 2, "num_speculations": -1}', "num_speculations must be a whole number from 0 to 1000"),
        (b'{"exit_layer": 2, "num_speculations": 1e9}', "num_speculations must be a whole number from 0 to 1000"),
        (b'{"exit_layer": 2, "num_speculations": NaN}', "num_speculations must be a whole number from 0 to 1000"),
        (b'{"exit_layer": 2, "num_speculations": [4]}', "num_speculations must be a whole number from 0 to 1000"),
    ],
)
def test_a_bad_recommendation_names_its_file(content: bytes, named: str, tmp_path: Path) -> None:
    """And not a flag that was not given."""
    path = tmp_path / "layerskip.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named) as error:
        read_recommendation(str(tmp_path), 6)
    assert str(error.value).startswith(str(path))
    assert "--" not in str(error.value).removeprefix(str(path))


CASES = {
    "exit_layer": 2,
    "num_speculations": 4,
    "cases": [
        {"dtype": "bfloat16", "exit_layer": 3, "num_speculations": 5},
        {"task": "top_v2", "exit_layer": 4, "num_speculations": 6, "draft_vocab": 9},
        {"task": "top_v2", "dtype": "bfloat16", "device": "cuda", "exit_layer": 5, "num_speculations": 7},
        {"task": "top_v2", "exit_layer": 1, "num_speculations": 1},
    ],
}


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (Use(), (2, 4, None)),
        (Use("float32", "cuda", "gsm8k"), (2, 4, None)),
        (Use("bfloat16", "cpu", "gsm8k"), (3, 5, None)),
        (Use("float32", "cpu", "top_v2"), (4, 6, 9)),
        (Use("bfloat16", "cpu", "top_v2"), (3, 5, None)),
        (Use("bfloat16", "cuda", "top_v2"), (5, 7, None)),
    ],
)
def test_the_case_with_most_conditions_is_taken(
    use: Use, expected: tuple[int, int, int | None], tmp_path: Path
) -> None:
    """Of equals the first; where none applies, what stands outside of them."""
    (tmp_path / "layerskip.json").write_text(json.dumps(CASES))
    advice = read_recommendation(str(tmp_path), 6, use, vocab_size=300)
    assert (advice.exit_layer, advice.num_speculations, advice.draft_vocab) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"draft_vocab": 301}, "layerskip.json: draft_vocab must be a whole number from 1 to 300, not 301"),
        ({"draft_vocab": "all"}, "layerskip.json: draft_vocab must be a whole number"),
        ({"exit_layers": []}, "layerskip.json: exit_layers must be a list of whole numbers from 1 to 6, not []"),
        (
            {"exit_layers": [2, 7]},
            "layerskip.json: exit_layers must be a list of whole numbers from 1 to 6, not [2, 7]",
        ),
        ({"exit_layers": 3}, "layerskip.json: exit_layers must be a list"),
        ({"draft_lengths": [0]}, "draft_lengths must be a list of whole numbers from 0 to 1000, one of them above 0"),
        ({"draft_lengths": [1, True]}, "layerskip.json: draft_lengths must be a list"),
        ({"draft_lengths": "1,2"}, "layerskip.json: draft_lengths must be a list"),
        ({"acceptance": {"3": 1.5}}, "acceptance must be an object of shares from 0 to 1 by exit layers from 1 to 6"),
        ({"acceptance": {"7": 0.5}}, "not {'7': 0.5}"),
        ({"acceptance": [0.5]}, "layerskip.json: acceptance must be an object"),
        ({"cases": [{"task": "x", "exit_layer": 1, "num_speculations": 1, "exit_layers": [0]}]}, "case 1: exit_layers"),
        ({"cases": {}}, "layerskip.json: cases must be a list"),
        ({"cases": [3]}, "layerskip.json: case 1: not an object"),
        ({"cases": [{"task": "x", "exit_layer": 1}]}, "case 1: not an object with exit_layer and num_speculations"),
        ({"cases": [{"exit_layer": 1, "num_speculations": 1}]}, "case 1: it needs one of dtype, device, task"),
        ({"cases": [{"exit_layer": 1, "num_speculations": 1, "tasks": "x"}]}, "case 1: 'tasks' is none of"),
        ({"cases": [{"exit_layer": 1, "num_speculations": 1, "task": ["x"]}]}, "case 1: task must be a string"),
        ({"cases": [CASES["cases"][0], {"exit_layer": 7, "num_speculations": 1, "task": "x"}]}, "case 2: exit_layer"),
    ],
)
def test_a_bad_case_names_its_file_and_number(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    (tmp_path / "layerskip.json").write_text(json.dumps(CASES | changes))
    with pytest.raises(ValueError, match=re.escape(named)):
        read_recommendation(str(tmp_path), 6, vocab_size=300)


def test_a_recommendation_depends_on_how_the_model_was_loaded(folder: Path) -> None:
    """And self-speculative decoding drafts from the vocabulary that it names."""
    case = {"dtype": "bfloat16", "device": "cpu", "exit_layer": 3, "num_speculations": 5, "draft_vocab": 20}
    (folder / "layerskip.json").write_text(json.dumps(CASES | {"cases": [case]}))
    for dtype, expected in (("bfloat16", (3, 5, 20)), ("float32", (2, 4, None))):
        model, _ = load(ModelArguments(model=str(folder), dtype=dtype, device="cpu"))
        advice = advice_for(model)
        filled = with_fixed_drafts(fill_in(GenerationConfig(generation_strategy="self_speculative"), advice), advice)
        assert (filled.exit_layer, filled.num_speculations, filled.draft_vocab) == expected
        assert fill_in(GenerationConfig(), advice_for(model)).draft_vocab is None


def test_a_recommendation_has_what_to_choose_from(tmp_path: Path) -> None:
    """A case stands for itself; what is written is what was read."""
    said = {"exit_layers": [4, 2], "draft_lengths": [3], "acceptance": {"2": 1, "4": 0.5}, "draft_vocab": None}
    case = {"task": "x", "exit_layer": 1, "num_speculations": 1, "draft_lengths": [0, 2]}
    (tmp_path / "layerskip.json").write_text(json.dumps(CASES | said | {"cases": [case]}))
    advice = read_recommendation(str(tmp_path), 6)
    assert (advice.exit_layers, advice.draft_lengths, advice.acceptance) == ((2, 4), (0, 3), {2: 1.0, 4: 0.5})
    (tmp_path / "layerskip.json").write_text(json.dumps(advice.as_json()))
    assert read_recommendation(str(tmp_path), 6) == advice
    (tmp_path / "layerskip.json").write_text(json.dumps(CASES | said | {"cases": [case]}))
    advice = read_recommendation(str(tmp_path), 6, Use(task="x"))
    assert (advice.exit_layers, advice.draft_lengths, advice.acceptance) == ((), (0, 2), {})
    assert Recommendation(3, 6, "test").as_json() == {"exit_layer": 3, "num_speculations": 6}


def test_a_recommendation_is_read_from_a_file_only(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "layerskip.json")
    with pytest.raises(ValueError, match=r"layerskip.json is not a JSON object"):
        read_recommendation(str(tmp_path), 6)


def test_advice_fills_in_what_was_not_given_and_is_needed() -> None:
    advice = Recommendation(3, 6, "test")
    for strategy, given, expected in (
        ("self_speculative", (None, None), (None, None)),
        ("self_speculative", ("auto", "auto"), (None, None)),
        ("self_speculative", (2, None), (2, None)),
        ("self_speculative", (None, 4), (None, 4)),
        ("self_speculative", (None, 0), (3, 0)),
        ("self_speculative", (2, 4), (2, 4)),
        ("adaptive", (None, None), (None, None)),
        ("autoregressive", (None, None), (None, None)),
        ("autoregressive", (2, None), (2, None)),
        ("early_exit", (None, None), (3, None)),
        ("hf_generate", (None, None), (None, None)),
        ("hf_early_exit", (None, 4), (3, 4)),
    ):
        config = GenerationConfig(generation_strategy=strategy, exit_layer=given[0], num_speculations=given[1])
        filled = fill_in(config, advice, RIVALS)
        assert (filled.exit_layer, filled.num_speculations) == expected
        fixed = with_fixed_drafts(config, advice)
        assert (fixed.exit_layer, fixed.num_speculations) == tuple(
            value if isinstance(value, int) else other for value, other in zip(given, (3, 6), strict=True)
        )


def test_names_become_strategies(model: LlamaForCausalLM) -> None:
    for strategy, exit_layer, num_speculations, kind in (
        ("autoregressive", None, None, AutoregressiveStrategy),
        ("autoregressive", "auto", "auto", AutoregressiveStrategy),
        ("autoregressive", 2, None, EarlyExitStrategy),
        ("early_exit", 2, None, EarlyExitStrategy),
        ("self_speculative", 2, 3, SelfSpeculativeStrategy),
        ("self_speculative", 2, 0, SelfSpeculativeStrategy),
        ("self_speculative", None, 0, SelfSpeculativeStrategy),
        ("self_speculative", 2, None, OpenStrategy),
        ("self_speculative", None, 3, OpenStrategy),
        ("self_speculative", "auto", "auto", OpenStrategy),
        ("adaptive", 2, 3, AdaptiveStrategy),
        ("hf_static", None, None, HuggingfaceStaticStrategy),
    ):
        config = GenerationConfig(
            generation_strategy=strategy, exit_layer=exit_layer, num_speculations=num_speculations
        )
        assert type(make_strategy(model, config, RIVALS)) is kind
