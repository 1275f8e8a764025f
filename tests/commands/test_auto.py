"""`auto` as a value of --exit_layer and --num_speculations: taken by every program, and told as such."""

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from self_speculation.commands import benchmark, correctness, generate, sweep
from self_speculation.commands.flags import parse
from self_speculation.decoding.cell import Cell
from self_speculation.measuring.pass_costs import PassCosts
from self_speculation.measuring.probes import Probes
from self_speculation.settings import by_flag

QUICK = Probes(bytes_per_second=lambda device: 1e10, cache_bytes=lambda device: 1000, live_bytes=lambda: 12345)
AUTO = ["--exit_layer", "auto", "--num_speculations", "auto"]
SHORT = ["--sample", "False", "--max_steps", 8]


@pytest.mark.parametrize("program", ["generate", "benchmark", "correctness", "sweep", "serve", "export", "eval"])
def test_programs_take_it(program: str) -> None:
    """It is None in Python, as is what is not given."""
    pytest.importorskip("lm_eval" if program == "eval" else "torch")
    needed = {"eval": ["--tasks", "local_boolq"], "export": ["--folder", "f"]}.get(program, [])
    groups = import_module(f"self_speculation.commands.{program}").GROUPS
    for flags in (AUTO, ["--exit_layer=auto"], ["--exit-layer", "-1"], []):
        [config] = [one for one in parse(*groups, args=[*flags, *needed]) if "exit_layer" in vars(one)]
        assert config.exit_layer is None
        assert config.num_speculations is None


def test_what_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*generate.GROUPS, args=["--exit_layer", "automatic"])
    assert "--exit_layer: must be a whole number or auto, not 'automatic'" in capsys.readouterr().err


def test_settings_are_told_as_flags() -> None:
    [config] = parse(generate.GenerationConfig, args=["--num_speculations", "3"])
    assert by_flag(config)["exit_layer"] == "auto"
    assert by_flag(config)["num_speculations"] == 3


def test_lm_eval_takes_it() -> None:
    read = pytest.importorskip("self_speculation.harness.model_args").read_model_args
    given = {"pretrained": "x", "generation_strategy": "self_speculative", "exit_layer": "auto", "num_speculations": 3}
    config = read(given).generation
    assert (config.exit_layer, config.num_speculations) == (None, 3)


@pytest.mark.parametrize(
    ("flags", "told", "drafting"),
    [
        (AUTO, "self_speculative, exit layer auto, auto drafts", ("auto", "auto")),
        ([], "self_speculative, exit layer auto, auto drafts", ("auto", "auto")),
        (["--exit_layer", 2], "self_speculative, exit layer 2, auto drafts", (2, "auto")),
        (["--num_speculations", 3], "self_speculative, exit layer auto, 3 drafts", ("auto", 3)),
        (["--exit_layer", 1, "--num_speculations", 4], "exit layer 1, 4 drafts (a quarter of the layers", (1, 4)),
        (["--generation_strategy", "adaptive", "--exit_layer", 2], "adaptive, exit layer auto", ("auto", "auto")),
        (["--generation_strategy", "autoregressive", *AUTO], "autoregressive\n", (None, None)),
    ],
    ids=str,
)
def test_an_answer_tells_what_was_left_open(
    flags: list[object],
    told: str,
    drafting: tuple[object, object],
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--generation_strategy", "self_speculative", *flags]
    assert run(generate.main, *SHORT, "--dtype", "float64", "--prompt", "def", *flags) == 0
    said = capsys.readouterr().err
    assert told in said
    assert ("share of" in said) == ("auto" in drafting)
    line = json.loads((tmp_path / "logs" / "generate.jsonl").read_text())
    assert (line["exit_layer"], line["num_speculations"]) == drafting
    # The settings can be read again.
    settings = json.loads((tmp_path / "logs" / "generate_settings.json").read_text())
    assert [settings.get(name) for name in ("exit_layer", "num_speculations")] == [
        value if isinstance(value, int) else None for value in drafting
    ] or "adaptive" in flags


def test_a_benchmark_sets_what_is_fixed_against_what_is_chosen(
    run: Callable[..., int], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", rows, *SHORT, "--dtype", "float64", "--num_samples", 1, "--score_text", "False"]
    costs = PassCosts({3: 1.0}, {Cell(3, 3): 2.0, Cell(6, 0): 2.0})
    strategies = ["--generation_strategy", "autoregressive", "self_speculative"]

    def figures(*given: object) -> dict[str, dict[str, Any]]:
        assert run(partial(benchmark.main, QUICK, lambda *_: costs), *flags, *given) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["strategies"]

    fixed = figures(*strategies, "adaptive", "--exit_layer", 3, "--num_speculations", 3)
    assert {name: (own["exit_layer"], own["num_speculations"]) for name, own in fixed.items()} == {
        "autoregressive": (None, None),
        "self_speculative": (3, 3),
        "adaptive": ("auto", "auto"),
    }
    assert "ideal_decode_speedup" in fixed["self_speculative"]
    assert "choices" not in fixed["self_speculative"]
    chosen = figures(*strategies, "hf_early_exit", "early_exit", *AUTO)
    assert {name: (own["exit_layer"], own["num_speculations"]) for name, own in chosen.items()} == {
        "autoregressive": (None, None),
        "self_speculative": ("auto", "auto"),
        "hf_early_exit": (1, 4),
        "early_exit": (1, None),
    }
    assert "choices" in chosen["self_speculative"]
    # Of cells that change from step to step neither is known.
    assert not {"ideal_decode_speedup", "bandwidth_share"} & chosen["self_speculative"].keys()
    assert all("sampling" not in own for own in chosen.values())
    sampled = figures(*strategies, *AUTO, "--sample", "True")
    assert [own["sampling"] for own in sampled.values()] == ["leviathan", "coupled"]


def test_correctness_checks_what_generate_would_run(
    run: Callable[..., int], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", rows, "--num_samples", 2, "--max_steps", 12, "--dtype", "float64", "--batch_size", 2]

    def cells(*given: object) -> list[tuple[object, object, int]]:
        assert run(correctness.main, *flags, *given) == 0
        assert "PASS" in capsys.readouterr().out
        found = json.loads((tmp_path / "logs" / "correctness.json").read_text())["cells"]
        return [(cell["exit_layer"], cell["num_speculations"], cell["wrong"]) for cell in found]

    assert cells("--sample", "True") == [("auto", "auto", 0)]
    assert cells("--exit_layer", "1,5", "--num_speculations", "auto") == [(1, "auto", 0), (5, "auto", 0)]
    floors = json.loads((tmp_path / "logs" / "correctness.json").read_text())["noise_floors"]
    assert [floor["num_speculations"] for floor in floors] == [4]
    assert cells("--num_speculations", "0,3") == [("auto", 0, 0), ("auto", 3, 0)]


def test_a_sweep_takes_auto_for_what_it_looks_for(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sweep.main, *SHORT, *AUTO, "--exit_layer_first", 9) == 2
    assert "--exit_layer_last 5 must not be less than --exit_layer_first 9" in capsys.readouterr().err
