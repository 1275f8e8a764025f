"""The benchmark: its documents, and runs that were killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from self_speculation.commands import benchmark
from self_speculation.generator_base import GenerationRequest
from self_speculation.loading import BUNDLED_CHECKPOINT
from self_speculation.measuring.code_execution import best_isolation
from self_speculation.measuring.figures import rounded
from self_speculation.measuring.pass_costs import PassCosts
from self_speculation.measuring.passes import Timing
from self_speculation.measuring.probes import Probes

ROOT = Path(__file__).parents[2]
STRATEGIES = ("autoregressive", "early_exit", "self_speculative", "hf_generate", "hf_early_exit")
LOSSLESS = ("autoregressive", "self_speculative", "hf_generate", "hf_early_exit")
# What a figure is made of that does not change from run to run.
COUNTS = (
    "samples",
    "tokens",
    "steps",
    "drafted",
    "accepted",
    "acceptance_rate",
    "mean_acceptance_rate",
    "tokens_per_step",
    "mean_tokens_per_step",
    "acceptance_by_position",
)
JUDGED = ("tokens_judged", "tokens_within_rounding", "wrong")
TEXT = ("rouge1", "rouge2", "rouge3", "rougeL", "exact_match", "edit_distance", "bleu")
TIMES = (
    "tokens_per_second",
    "decode_tokens_per_second",
    "mean_tokens_per_second",
    "mean_decode_tokens_per_second",
    "decode_seconds_per_token",
    "mean_first_token_seconds",
    "mean_batch_seconds",
    "seconds",
)


# The memory and its use, as if measured; the weights do not fit the cache.
QUICK = Probes(lambda device: 1e10, cache_bytes=lambda device: 1000, live_bytes=lambda: 12345)
quick_main = partial(benchmark.main, QUICK)


@pytest.fixture
def run_benchmark(
    run: Callable[..., int], rows: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Run the benchmark, greedy and short, on the four rows; returns the last line's figures."""

    def run_it(*flags: object, main: Callable[[], None] = quick_main) -> dict[str, Any]:
        assert run(main, *short_flags(rows), *flags) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["strategies"]

    return run_it


def short_flags(rows: Path) -> list[object]:
    return ["--data_path", rows, "--sample", "False", "--max_steps", 8, "--exit_layer", 2, "--num_speculations", 4]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed(lines: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """What was answered, without the times and the company; each sample of a round is there once."""
    found = {}
    for line in lines:
        key = (line["repeat"], line["sample"])
        assert key not in found
        answers = {
            name: {key: value for key, value in values.items() if not key.endswith("seconds") and key != "begun_after"}
            for name, values in line["strategies"].items()
        }
        found[key] = line | {"strategies": answers}
    return found


def unchanging(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: values[key] for key in (*COUNTS, *TEXT)} for name, values in figures.items()}


def keys_of(strategy: str) -> tuple[str, ...]:
    """What files of results have held of a strategy since the first of them, in this order."""
    times = TIMES if strategy.startswith("hf_") else (*TIMES, "mean_prefill_seconds")
    return (
        *(key for name in times for key in (name, f"{name}_spread")),
        *COUNTS,
        "peak_memory_bytes",
        "preparing_seconds",
        "bandwidth_share",
        "speedup_over",
        "speedup",
        "speedup_spread",
        "decode_speedup",
        "sample_speedup_median",
        "sample_speedup_spread",
        "exit_layer",
        "num_speculations",
        *TEXT,
        *(("ideal_decode_speedup", "share_of_ideal") if strategy == "self_speculative" else ()),
        *(JUDGED if strategy in LOSSLESS else ()),
    )


def test_all_strategies(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    figures = run_benchmark("--generation_strategy", *STRATEGIES, "--repeats", 2, "--num_speculations", 3)
    document = json.loads((tmp_path / "logs" / "benchmark.json").read_text())
    lines = lines_of(tmp_path / "logs" / "benchmark.jsonl")
    assert {name: tuple(values) for name, values in figures.items()} == {name: keys_of(name) for name in STRATEGIES}
    assert list(lines[0]) == ["repeat", "sample", "prompt_tokens", "prompt", "response", "strategies"]
    assert list(document["ceiling"]) == ["bytes_per_second", "weights", "cache_bytes"]
    assert list(document) == ["surroundings", "ceiling", "strategies", "arguments", "prompts"]
    assert rounded(document["strategies"]) == figures
    assert document["prompts"] == {"samples": 4, "shortened": 0, "most_tokens": 248}
    assert document["arguments"]["generation_strategy"] == list(STRATEGIES)
    assert document["ceiling"]["bytes_per_second"] == 1e10
    assert document["surroundings"].keys() >= {"date", "device", "threads", "versions", "commit", "dtype", "ranks"}
    assert untimed(lines).keys() == set(product(range(2), range(4)))
    assert list(figures) == list(STRATEGIES)
    for name, values in figures.items():
        answers = [line["strategies"][name] for line in lines]
        assert values.keys() >= {*COUNTS, *TEXT, *TIMES, *(f"{time}_spread" for time in TIMES), "peak_memory_bytes"}
        # What counts is of one round: all rounds have the same answers.
        assert values["tokens"] == sum(len(answer["tokens"]) for answer in answers) / 2
        assert values["steps"] == sum(len(answer["committed"]) for answer in answers) / 2
        assert values["drafted"] == sum(sum(answer["drafted"]) for answer in answers) / 2
        assert values["accepted"] == sum(sum(answer["accepted"]) for answer in answers) / 2
        assert ("mean_prefill_seconds" in values) == (not name.startswith("hf_"))
        assert values["peak_memory_bytes"] == 12345
        assert values["speedup_over"] == "autoregressive"
        is_drafting = name in ("self_speculative", "hf_early_exit")
        assert (values["acceptance_rate"] is not None) == (values["drafted"] > 0) == is_drafting
        assert (values["exit_layer"], values["num_speculations"]) == {
            "autoregressive": (None, None),
            "hf_generate": (None, None),
            "early_exit": (2, None),
        }.get(name, (2, 3))
    for line in lines:
        assert len({tuple(line["strategies"][name]["tokens"]) for name in LOSSLESS}) == 1
        assert len({line["strategies"][name]["text"] for name in LOSSLESS}) == 1
        assert line["strategies"]["early_exit"]["tokens"] != line["strategies"]["autoregressive"]["tokens"]
    for name in LOSSLESS:
        assert [figures[name][key] for key in JUDGED] == [figures[name]["tokens"], 0, 0]
    drafts = [{key: figures[name][key] for key in COUNTS} for name in ("self_speculative", "hf_early_exit")]
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_share_of_the_ideal(batch_size: int, run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Passes are timed for a batch of answers half done; in the middle of four prompts' sizes."""
    asked: list[tuple[list[int], object]] = []

    def measure(model: LlamaForCausalLM, request: GenerationRequest, cells: object, timing: Timing) -> PassCosts:
        asked.append((list(map(len, request.prompts)), cells))
        return PassCosts({2: 2.0}, {(2, 3): 5.0, (6, 0): 4.0})

    main = partial(benchmark.main, QUICK, measure)
    flags = ["--random_shuffle", "False", "--num_speculations", 3, "--batch_size", batch_size, "--score_text", "False"]
    figures = run_benchmark("--generation_strategy", "autoregressive", "self_speculative", *flags, main=main)
    lines = lines_of(tmp_path / "logs" / "benchmark.jsonl")
    halves = [line["prompt_tokens"] + 4 for line in lines]
    assert asked == [(halves[2:3] if batch_size == 1 else halves[:3], [(2, 3), (6, 0)])]
    own = figures["self_speculative"]
    assert own["share_of_ideal"] == pytest.approx(own["decode_speedup"] / own["ideal_decode_speedup"], rel=1e-5)
    answers = [line["strategies"]["self_speculative"] for line in lines]
    if batch_size == 1:
        steps = sum(len(answer["committed"]) - 1 for answer in answers)
        drafts = sum(sum(answer["drafted"][1:]) for answer in answers)
        tokens = sum(sum(answer["committed"][1:]) for answer in answers)
        ideal = tokens / (drafts * 2 + steps * 5) * 4
        assert own["ideal_decode_speedup"] == pytest.approx(ideal, rel=1e-5)
    assert "share_of_ideal" not in figures["autoregressive"]


def test_one_strategy_has_no_ideal(run_benchmark: Callable[..., dict[str, Any]]) -> None:
    figures = run_benchmark("--generation_strategy", "self_speculative", "--num_samples", 1, "--score_text", "False")
    assert "share_of_ideal" not in figures["self_speculative"]


def test_batches(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Four prompts, three at a time: a line each, the same answers and counts, and the list's seconds once."""
    names = ["autoregressive", "self_speculative"]
    flags = ["--generation_strategy", *names, "--num_speculations", 3]
    alone = run_benchmark(*flags)
    expected = untimed(lines_of(tmp_path / "logs" / "benchmark.jsonl"))
    together = run_benchmark(*flags, "--batch_size", 3)
    lines = lines_of(tmp_path / "logs" / "benchmark.jsonl")
    assert untimed(lines) == expected
    assert unchanging(together) == unchanging(alone)
    for name in names:
        answers = [line["strategies"][name] for line in lines]
        [seconds] = {one["request_seconds"] for one in answers}
        assert all(one["first_token_seconds"] + one["decode_seconds"] <= seconds for one in answers)
        *first, last = (one["begun_after"] for one in answers)
        assert first == [0, 0, 0]
        assert last == min(len(one["committed"]) for one in answers[:3])
        assert together[name]["seconds"] == pytest.approx(seconds, rel=1e-5)
        tokens = sum(len(one["tokens"]) for one in answers)
        assert together[name]["tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch_size", 0], "--batch_size must be at least 1, not 0."),
        (["--batch_size", 2, "--generation_strategy", "hf_early_exit"], "it needs --batch_size 1."),
        (
            ["--batch_size", 2, "--generation_strategy", "hf_generate", "--no_repeat_ngram_size", 2],
            "--no_repeat_ngram_size would see the padding of hf_generate's batches: it needs --batch_size 1.",
        ),
    ],
    ids=["none", "early exit", "padding"],
)
def test_batches_that_are_refused(
    flags: list[object],
    named: str,
    run: Callable[..., int],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence, before anything is written."""
    assert run(benchmark.main, *short_flags(rows), *flags) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert sentence.endswith(named)
    assert not (tmp_path / "logs").exists()


def test_autoregressive_with_an_exit_layer_alone_is_early_exit(
    run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert list(run_benchmark("--generation_strategy", "autoregressive")) == ["early_exit"]
    early = untimed(lines_of(tmp_path / "logs" / "benchmark.jsonl"))
    assert list(run_benchmark("--generation_strategy", "early_exit")) == ["early_exit"]
    assert untimed(lines_of(tmp_path / "logs" / "benchmark.jsonl")) == early
    both = run_benchmark("--generation_strategy", "autoregressive", "early_exit")
    assert list(both) == ["autoregressive", "early_exit"]
    assert both["autoregressive"]["exit_layer"] is None


def test_samples_are_printed_when_asked_for(
    run: Callable[..., int], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verbose in (False, True):
        assert run(quick_main, *short_flags(rows), "--verbose", verbose) == 0
        said = capsys.readouterr().out
        assert said.count("--- prompt\ndef add(a, b):") == (4 if verbose else 0)
        assert said.count("--- early_exit\n") == (4 if verbose else 0)


def test_an_earlier_run_is_set_aside(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    earlier = []
    for num_samples in (1, 2, 3):
        run_benchmark("--num_samples", num_samples)
        earlier.append([(logs / f"benchmark.{end}").read_bytes() for end in ("json", "jsonl")])
        for number, content in enumerate(earlier[:-1], 1):
            assert [(logs / f"benchmark.{number}.{end}").read_bytes() for end in ("json", "jsonl")] == content
    assert [len(content[1].splitlines()) for content in earlier] == [1, 2, 3]
    # Of each run the figures, the answers and the settings.
    assert len(list(logs.iterdir())) == 9


def test_the_seed_chooses_the_prompts(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    chosen = []
    for flags in ([], [], ["--seed", 3], ["--random_shuffle", "False"]):
        run_benchmark("--num_samples", 3, "--max_steps", 1, *flags)
        chosen.append([line["prompt"] for line in lines_of(tmp_path / "logs" / "benchmark.jsonl")])
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[3] == ["def add(a, b):" + " " * count for count in range(3)] != chosen[0]


def test_code_is_executed(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The answer, a comment, is right for the first task, and wrong for the second."""
    path = tmp_path / "human_eval.jsonl"
    row = {"prompt": "def one():\n    return 1  # ", "canonical_solution": "one", "entry_point": "one"}
    tests = [f"def check(candidate):\n    assert candidate() == {value}\n" for value in (1, 2)]
    path.write_text("".join(json.dumps(row | {"task_id": str(n), "test": t}) + "\n" for n, t in enumerate(tests)))
    flags = ["--dataset", "human_eval", "--data_path", path, "--stop_words", "\n", "--execute_code", "True"]
    assert run_benchmark(*flags)["early_exit"]["pass_at_1"] == 0.5
    document = json.loads((tmp_path / "logs" / "benchmark.json").read_text())
    assert document["surroundings"]["programs_are_kept_from_the_network_by"] == best_isolation(unsafely=True)
    assert "pass_at_1" not in run_benchmark(*flags[:-2])["early_exit"]


# Runs that were interrupted


def truncate(path: Path, num_lines: int, torn: bytes = b"") -> bytes:
    """Keep the first lines, as a kill would have; returns what is left of the whole ones."""
    whole = b"".join(path.read_bytes().splitlines(keepends=True)[:num_lines])
    path.write_bytes(whole + torn)
    return whole


def test_a_run_is_resumed(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With a last line that was torn: what is there stays, what is missing is measured."""
    flags = ["--generation_strategy", "autoregressive", "self_speculative", "--repeats", 2]
    figures = run_benchmark(*flags)
    log = tmp_path / "logs" / "benchmark.jsonl"
    expected = untimed(lines_of(log))
    kept = truncate(log, 3, torn='{"repeat": 0, "sample": 3, "prompt": "dé'.encode()[:-1])
    resumed = run_benchmark(*flags, "--resume", "True")
    assert log.read_bytes().startswith(kept)
    assert untimed(lines_of(log)) == expected
    assert unchanging(resumed) == unchanging(figures)
    content = log.read_bytes()
    again = run_benchmark(*flags, "--resume", "True", "--verbose", "True")
    assert unchanging(again) == unchanging(figures)
    # Nothing was left to be prepared for.
    assert {"preparing_seconds" in own for own in figures.values()} == {True}
    assert {"preparing_seconds" in own for own in again.values()} == {False}
    assert log.read_bytes() == content
    assert len(list(log.parent.iterdir())) == 3


def test_a_damaged_log_is_named(
    run: Callable[..., int], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*short_flags(rows), "--generation_strategy", "autoregressive", "self_speculative"]
    assert run(quick_main, *flags) == 0
    log = tmp_path / "logs" / "benchmark.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    capsys.readouterr()
    for damaged in (
        "{}",
        first.replace('"sample": 0', '"sample": 99'),
        first.replace('"tokens": ', '"tickets": '),
        first.replace('"repeat": 0', '"repeat": [0]'),
        first.replace('"autoregressive"', '"autocratic"'),
    ):
        log.write_text(damaged.rstrip("\n") + "\n" + "".join(rest))
        assert run(quick_main, *flags, "--resume", "True") == 2
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence == f"error: {log}:1 is damaged; delete that line, and --resume True does its work again."


def test_a_torn_batch_is_measured_again(run_benchmark: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """As a whole, so that all its rows have the times of one measurement; its last lines count."""
    flags = ["--generation_strategy", "autoregressive", "self_speculative", "--batch_size", 3]
    figures = run_benchmark(*flags)
    log = tmp_path / "logs" / "benchmark.jsonl"
    expected = untimed(lines_of(log))
    kept = truncate(log, 2)
    resumed = run_benchmark(*flags, "--resume", "True")
    assert log.read_bytes().startswith(kept)
    lines = lines_of(log)
    assert [line["sample"] for line in lines] == [0, 1, 0, 1, 2, 3]
    assert untimed(lines[2:]) == expected
    assert unchanging(resumed) == unchanging(figures)
    seconds = [line["strategies"]["autoregressive"] for line in (lines[2], lines[5])]
    total = sum(one["first_token_seconds"] + one["decode_seconds"] for one in seconds)
    assert resumed["autoregressive"]["seconds"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max_steps", 5], "--max_steps 8, not 5"),
        (["--batch_size", 2], "--batch_size 1, not 2"),
        (["--generation_strategy", "hf_generate"], "--generation_strategy"),
        (["--seed", 1], "--seed 42, not 1"),
        (["--repeats", 2], "--repeats 1, not 2"),
        ([], "sample 1 of"),
    ],
    ids=["most tokens", "batch size", "strategy", "seed", "repeats", "data"],
)
def test_another_run_is_not_resumed(
    flags: list[object],
    named: str,
    run_benchmark: Callable[..., dict[str, Any]],
    run: Callable[..., int],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other arguments, or other data under the same name."""
    run_benchmark("--random_shuffle", "False")
    logs = tmp_path / "logs"
    truncate(logs / "benchmark.jsonl", 2)
    before = {path.name: path.read_bytes() for path in logs.iterdir()}
    if not flags:
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text(lines[0] + lines[1].replace("add", "sub") + "".join(lines[2:]))
    code = run(quick_main, *short_flags(rows), "--random_shuffle", "False", "--resume", "True", *flags)
    assert code == 2
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "--resume" in sentence
    assert named in sentence
    assert {path.name: path.read_bytes() for path in logs.iterdir()} == before


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    """Twelve prompts."""
    path = tmp_path / "many.jsonl"
    texts = [f"def f{n}(a):\n" for n in range(12)]
    path.write_text("".join(json.dumps({"prompt": text, "response": f"return {text}"}) + "\n" for text in texts))
    return path


@contextlib.contextmanager
def started(command: list[object], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and what it starts, gone at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "out.txt").open("wb") as out:
        words = [sys.executable, *map(str, command)]
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def whole(
    run: Callable[..., int], folder: Path, many_rows: Path, tmp_path: Path
) -> tuple[list[object], dict[str, Any], dict[tuple[int, int], dict[str, Any]]]:
    """Flags, and the figures and answers of a run that nothing interrupted."""
    flags = [*short_flags(many_rows), "--model", folder, "--repeats", 2]
    flags += ["--generation_strategy", "autoregressive", "self_speculative"]
    assert run(quick_main, *flags, "--output_dir", tmp_path / "whole") == 0
    figures = json.loads((tmp_path / "whole" / "benchmark.json").read_text())["strategies"]
    return flags, unchanging(figures), untimed(lines_of(tmp_path / "whole" / "benchmark.jsonl"))


def test_a_killed_run_is_resumed(
    whole: tuple[list[object], dict[str, Any], dict[tuple[int, int], dict[str, Any]]],
    run: Callable[..., int],
    tmp_path: Path,
) -> None:
    """A process that SIGKILL ended in the middle has lost no whole line, and the rest comes out the same."""
    flags, figures, expected = whole
    log = tmp_path / "killed" / "benchmark.jsonl"
    with started([ROOT / "benchmark.py", *flags, "--output_dir", log.parent], tmp_path) as process:
        while not (log.is_file() and log.read_bytes()):
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            time.sleep(0.01)
        time.sleep(random.Random(5).uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    kept = log.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 0 < kept.count(b"\n") < len(expected)
    assert json.loads(log.with_suffix(".json").read_text()).keys() == {"arguments"}
    assert run(quick_main, *flags, "--output_dir", log.parent, "--resume", "True") == 0
    assert unchanging(json.loads(log.with_suffix(".json").read_text())["strategies"]) == figures
    assert log.read_bytes().startswith(kept)
    assert untimed(lines_of(log)) == expected


@pytest.mark.slow
def test_two_processes_share_the_samples(
    whole: tuple[list[object], dict[str, Any], dict[tuple[int, int], dict[str, Any]]], tmp_path: Path
) -> None:
    """Each sample once; one of the two reports."""
    flags, figures, expected = whole
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "benchmark.py"]
    with started([*torchrun, *flags, "--output_dir", tmp_path / "two"], tmp_path) as process:
        assert process.wait(timeout=120) == 0, (tmp_path / "out.txt").read_text()
    document = json.loads((tmp_path / "two" / "benchmark.json").read_text())
    assert document["surroundings"]["ranks"] == 2
    assert unchanging(document["strategies"]) == figures
    assert untimed(lines_of(tmp_path / "two" / "benchmark.jsonl")) == expected
    [last] = [line for line in (tmp_path / "out.txt").read_text().splitlines() if line.startswith('{"strategies"')]
    assert json.loads(last)["strategies"] == rounded(document["strategies"])


# Real rows


REAL = {
    "cnn_dm_summarization": "cnn_dm",
    "cnn_dm_lm": "cnn_dm",
    "xsum_summarization": "xsum",
    "human_eval": "humaneval",
    "top_v2": "topv2/eval.jsonl",
    "gsm8k": "gsm8k",
}


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("dataset", REAL)
def test_real_rows(
    dataset: str, run: Callable[..., int], data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the bundled checkpoint, whose context an article with a shot does not fit: that is said."""
    flags = ["--model", BUNDLED_CHECKPOINT, "--dataset", dataset, "--data_path", data_folder / REAL[dataset]]
    flags += ["--generation_strategy", "self_speculative", "--num_samples", 2, "--max_steps", 6, "--sample", "False"]
    assert run(quick_main, *flags, "--n_shot", 1) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out.splitlines()[-1])["strategies"]["self_speculative"]
    assert (figures["samples"], figures["tokens"]) == (2, 12)
    assert 0 <= figures["rouge1"] <= 1
    # A shot of cnn_dm_lm has a whole article; those of the others may or may not fit.
    assert "prompts were shortened" in said.err or not dataset.startswith("cnn")
    assert "prompts were shortened" not in said.err or dataset not in ("top_v2", "gsm8k")
