"""What all programs have in common: files of flags, what is said where, and what is written."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from test_endings import Signalled, Terminal
from test_scripts import PROMPT, QUICK

from self_speculation.__main__ import VERBS
from self_speculation.commands import benchmark, correctness, generate, report, sweep, typed_lines
from self_speculation.commands.flag_files import flags_in, save_settings
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments
from self_speculation.measuring import other_work

ROOT = Path(__file__).parents[2]
Run = Callable[..., int]
quick_benchmark = partial(benchmark.main, QUICK)
SHORT = ["--max_steps", 4, "--sample", "False"]


def parsed(*args: object) -> GenerationConfig:
    return parse(GenerationConfig, OutputArguments, args=[str(word) for word in args])[0]


def test_flags_are_known_without_torch() -> None:
    """So that --help and mistakes are answered at once."""
    modules = [f"self_speculation.commands.{verb}" for verb in VERBS]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--exit_layr", "--exit_layr is unknown; did you mean --exit_layer?"),
        ("--exit-layr=3", "--exit-layr is unknown; did you mean --exit_layer?"),
        ("--prefil_chunk", "--prefil_chunk is unknown; did you mean --prefill_chunk?"),
        ("--xyzzy", "--xyzzy is unknown; --help_all shows all flags."),
    ],
)
def test_an_unknown_flag_names_the_nearest(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(word, "4")
    assert capsys.readouterr().err == f"error: {said}\n"


def test_minus_one_stands_for_what_is_not_given() -> None:
    config = parsed("--exit_layer", -1, "--num_speculations=-1")
    assert (config.exit_layer, config.num_speculations) == (None, None)
    [grid] = parse(correctness.CorrectnessConfig, args=["--exit_layer", "-1"])
    assert grid.exit_layers == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "max_steps: 3\nsample: false\nstop_words: [a, --b]\nexit_layer: null\nsampling: coupled\n"),
        ("a.json", '{"max_steps": 3, "sample": false, "stop_words": ["a", "-b"], "sampling": "coupled", "top_p": 1.0}'),
    ],
)
def test_flags_beside_a_file_win(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text.replace("--b", "b").replace("-b", "b"))
    config = parsed("--max_steps", 5, "--config", path)
    assert (config.max_new_tokens, config.sample, config.stop_words) == (5, False, ["a", "b"])
    assert (config.exit_layer, config.sampling) == (None, "coupled")


def test_settings_are_read_as_they_were_and_without_secrets(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    config = GenerationConfig(max_new_tokens=3, stop_words=["\u2028", "é"], temperature=1e-7, seed=2**60)
    save_settings(path, config, ModelArguments(model_args="token=SesameOpen"), sampling="coupled")
    assert "model_args" not in json.loads(path.read_text())
    words = flags_in("config", path)
    again, _ = parse(GenerationConfig, ModelArguments, args=words)
    assert again == GenerationConfig(**vars(config) | {"sampling": "coupled"})


def test_a_run_is_repeated_from_its_settings(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its answers say what they were made with."""
    flags = ["--generation_strategy", "self_speculative", "--exit_layer", 2, "--num_speculations", 3, "--seed", 7]
    assert run(generate.main, "--prompt", PROMPT, "--max_steps", 9, *flags) == 0
    first = capsys.readouterr().out
    logs = tmp_path / "logs"
    assert run(generate.main, "--config", logs / "generate_settings.json", "--max_steps", 9) == 0
    assert capsys.readouterr().out == first
    rows = [json.loads(line) for line in (logs / "generate.jsonl").read_text().splitlines()]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    known = {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 3, "seed": 7}
    for row in rows:
        assert row.items() >= (known | {"dtype": "float64"}).items()
        assert row["model"].endswith("checkpoint0")
        seconds = row["first_token_seconds"] + row["decode_seconds"]
        assert row["tokens_per_second"] == pytest.approx(len(row["tokens"]) / seconds)
        assert row["decode_tokens_per_second"] > row["tokens_per_second"] * 0.5


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (generate.main, ["--prompt", PROMPT]),
        (quick_benchmark, ["--score_text", "False", "--num_samples", 1]),
        (correctness.main, ["--num_samples", 1, "--exit_layer", 2]),
        (sweep.main, ["--num_samples", 1, "--exit_layer_last", 1, "--num_speculations_last", 1, "--repeats", 1]),
    ],
    ids=["generate", "benchmark", "correctness", "sweep"],
)
def test_nothing_is_written_and_nothing_said_beside_the_results(
    main: Callable[[], None],
    flags: list[object],
    run: Run,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = [] if main is generate.main else ["--data_path", rows]
    assert run(main, *flags, *data, *SHORT, "--no_log", "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out
    assert "layerskip-" not in said.out
    assert not (tmp_path / "logs").exists()


def test_a_mistake_is_said_in_any_case(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(generate.main, "--prompt", "x" * 400, "--quiet") == 2
    assert capsys.readouterr().err.startswith("error: --prompt: the prompt has ")


def test_what_is_not_written_is_not_said_to_be_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Signalled(signal.SIGINT, after=" "))
    assert run(generate.main, "--prompt", PROMPT, "--max_steps", 100, "--no_log") == 130
    assert capsys.readouterr().err.endswith("interrupted. With --no_log nothing is kept.\n")


def test_a_terminal_gets_the_totals_when_they_are_asked_for(
    run: Run, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, is_there in (([], False), (["--json"], True)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert (
            run(quick_benchmark, "--data_path", rows, "--num_samples", 1, "--score_text", "False", *SHORT, *flags) == 0
        )
        assert terminal.getvalue().splitlines()[-1].startswith('{"strategies":') == is_there


@pytest.fixture
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take 1.4 of two cores."""
    readings = (other_work.CpuSeconds(second, 100 + 1.4 * second, 0.0) for second in range(100))
    monkeypatch.setattr(other_work, "cpu_seconds", lambda: next(readings))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)


# Programs that measure, and what makes them quick.
MEASURING = {
    "benchmark": (quick_benchmark, ["--score_text", "False"]),
    "sweep": (sweep.main, ["--exit_layer_last", 1, "--num_speculations_last", 1, "--repeats", 1]),
}


@pytest.mark.parametrize("name", MEASURING)
def test_a_busy_machine_is_said_to_be_one(
    name: str,
    busy_machine: None,
    run: Run,
    run_script: Run,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, flags = MEASURING[name]
    assert run(main, *flags, "--data_path", rows, "--num_samples", 1, *SHORT) == 0
    said = capsys.readouterr().err
    assert "Other processes take 1.4 of 2 cores: these times mean little.\n" in said
    assert "While this was measured, other processes took 1.4 of 2 cores: these times mean little.\n" in said
    document = json.loads((tmp_path / "logs" / f"{name}.json").read_text())
    busy = document["surroundings"]["busy_cores"]
    assert busy == {"before": pytest.approx(1.4), "during": pytest.approx(1.4)}
    assert run_script(report.main, "--folder", tmp_path / "logs", "--output", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("Other processes took 1.4 of 2 cores: these times mean little.</p>") == 1


def test_prompt_toolkit_edits_what_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(sys, "stdout", Terminal())
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        # Enter, a backslash and Enter, Alt-Enter, Ctrl-C, Ctrl-D.
        keys.send_text("one\r" + "a\\\rb\r" + "c\x1b\rd\r" + "wrong\x03right\r" + "\x04")
        read = typed_lines.line_reader()
        assert list(iter(read, None)) == ["one", "a\nb", "c\nd", "right"]
