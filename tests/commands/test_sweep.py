"""The sweep, by the grid and by the prediction, on a tiny model; killed and resumed; and its pictures."""

import csv
import dataclasses
import itertools
import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.commands import generate, sweep, sweeping
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments, load, read_recommendation
from self_speculation.measuring.contestants import Contestant
from self_speculation.measuring.measurements import Measurement
from self_speculation.measuring.prediction import Prediction
from self_speculation.measuring.report_sources import read_sections
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.search_plan import SearchPlan
from self_speculation.measuring.sweep import Findings, GridRow, Sweep, longer_drafts, search

ROOT = Path(__file__).parents[2]
LAYERS = 6
PROMPTS = ["def add(a, b):", "for i in", "class Näme"]
COUNTS = ("exit_layer", "num_speculations", "acceptance_rate", "tokens_per_step")
COLUMNS = (
    "exit_layer,num_speculations,tokens_per_second,decode_tokens_per_second,speedup,acceptance_rate,tokens_per_step"
)
SHORT = ("--sample", "False", "--max_steps", 8, "--finalists", 1, "--repeats", 1, "--duel_repeats", 1)
SMALL_GRID = ("--exit_layer_last", 3, "--num_speculations_last", 2)
SMALL_CELLS = [Cell(exit_layer, drafts) for exit_layer in (1, 2, 3) for drafts in (1, 2)]

# What the document has held since the first of them, in this order.
FINDINGS = ["best", "choices", "seconds", "final", "grid", "predicted"]
GRID_ROW = ["cell", "tokens_per_second", "tokens_per_second_spread", "wall_seconds"]
SPEEDUP = ["speedup", "speedup_spread", "decode_speedup", "sample_speedup_median", "sample_speedup_spread"]
# The same without the script.
GREEDY = GenerationConfig(generation_strategy="self_speculative", sample=False, max_new_tokens=8)
BRIEF = SearchPlan("grid", finalists=1, repeats=1, profile_samples=4, duel_repeats=1)

Run = Callable[..., int]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A checkpoint of the tiny model, in float64, with later layers damped so that its exits agree now and then."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.15
            layer.mlp.down_proj.weight *= 0.15
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three short prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "response": "x"}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def run_sweep(run: Run, rows: Path) -> Run:
    """Run the sweep in this process, shortly; later flags win. Returns its exit code."""
    return lambda *flags: run(sweep.main, *SHORT, "--data_path", rows, *flags)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn, but not saved, which takes longer than a tiny sweep."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: None)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Where results go."""
    return tmp_path / "logs"


def table(folder: Path) -> list[dict[str, str]]:
    """The CSV, whose first line is the header."""
    text = (folder / "sweep.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    return list(csv.DictReader(text.splitlines()))


def cells_of(rows: list[dict[str, str]]) -> list[tuple[int, int]]:
    """The cells of the CSV, which begins with the autoregressive baseline."""
    assert (rows[0]["exit_layer"], rows[0]["num_speculations"], float(rows[0]["speedup"])) == ("", "", 1.0)
    return [(int(row["exit_layer"]), int(row["num_speculations"])) for row in rows[1:]]


def counts_of(folder: Path) -> list[tuple[str, ...]]:
    """What follows from the tokens alone, of every row of the CSV."""
    return [tuple(row[name] for name in COUNTS) for row in table(folder)]


def document(folder: Path) -> dict[str, Any]:
    """The results, which must be JSON that every reader takes."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((folder / "sweep.json").read_text(), parse_constant=refuse)


def assert_is_picture(path: Path) -> None:
    """A PNG with something on it, and a PDF."""
    pixels = imread(path)
    assert pixels.shape[0] > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    pdf = path.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"%%EOF" in pdf[-20:]


# The grid


def test_grid_measures_every_cell_and_ends_with_a_command_that_runs(
    run: Run, run_sweep: Run, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep("--num_speculations_last", 2, "--finalists", 2) == 0
    said = capsys.readouterr().out

    rows = table(logs)
    assert cells_of(rows) == list(itertools.product(range(1, LAYERS), (1, 2)))
    for row in rows:
        assert float(row["speedup"]) == float(row["tokens_per_second"]) / float(rows[0]["tokens_per_second"])
        assert float(row["tokens_per_second"]) > 0
        assert float(row["decode_tokens_per_second"]) > 0
        assert 1 <= float(row["tokens_per_step"]) <= 1 + int(row["num_speculations"] or 0)
    assert rows[0]["acceptance_rate"] == ""
    rates = [float(row["acceptance_rate"]) for row in rows[1:]]
    assert all(0.2 < rate < 0.95 for rate in rates)
    assert len(set(rates)) > 5

    found = document(logs)
    assert list(found) == ["arguments", "surroundings", *FINDINGS]
    assert [list(found["grid"][0])[index] for index in (0, 1, 2, -1)] == GRID_ROW
    assert list(found["best"])[:2] == ["exit_layer", "num_speculations"]
    assert list(found["best"])[2:] == list(found["final"][0])[1:]
    assert list(found["final"][0])[-5:] == SPEEDUP
    assert [tuple(row["cell"] or ()) for row in found["grid"]] == [(), *cells_of(rows)]
    assert found["choices"].keys() == found["seconds"].keys() == {"grid"}
    fastest = max(found["grid"][1:], key=lambda row: row["tokens_per_second"])
    assert found["choices"]["grid"] == fastest["cell"]
    assert found["seconds"]["grid"] == pytest.approx(sum(row["wall_seconds"] for row in found["grid"]))
    ranked = sorted(found["grid"][1:], key=lambda row: -row["tokens_per_second"])
    assert sorted(row["cell"] for row in found["final"]) == sorted(row["cell"] for row in ranked[:2])
    assert found["final"][0]["speedup"] >= found["final"][1]["speedup"]
    best = [found["best"][name] for name in ("exit_layer", "num_speculations")]
    assert best == found["final"][0]["cell"]
    assert found["best"]["samples"] == 3
    assert found["predicted"] == []
    assert found["arguments"]["num_speculations_last"] == 2
    assert found["surroundings"]["dtype"] == "torch.float64"
    assert [json.loads(line) for line in (logs / "sweep.jsonl").read_text().splitlines()] == found["grid"]

    for name in ("sweep_speed.png", "sweep_acceptance.png"):
        assert_is_picture(logs / name)
        assert str(logs / name) in said
    assert not (logs / "sweep_prediction.png").exists()

    command = shlex.split(said.splitlines()[-1])
    assert command[:2] == ["python", "generate.py"]
    flags = dict(zip(command[2::2], command[3::2], strict=True))
    is_faster = found["best"]["speedup"] > 1
    assert ("Autoregressive decoding is faster here" in said) == (not is_faster)
    assert flags["--generation_strategy"] == ("self_speculative" if is_faster else "autoregressive")
    if is_faster:
        assert [int(flags["--exit_layer"]), int(flags["--num_speculations"])] == best
    more = ["--prompt", PROMPTS[0], "--max_steps", "4", "--output_dir", str(logs)]
    assert run(generate.main, *command[2:], *more) == 0
    [answer] = (logs / "generate.jsonl").read_text().splitlines()
    assert len(json.loads(answer)["tokens"]) == 4


def test_the_command_names_what_is_not_default() -> None:
    model_arguments = ModelArguments(model="a folder", dtype="float32")
    command = sweeping.command(model_arguments, sweep.SweepConfig(sample=False, max_new_tokens=64), Cell(3, 5))
    assert command == (
        "python generate.py --model 'a folder' --dtype float32 --generation_strategy self_speculative "
        "--exit_layer 3 --num_speculations 5 --max_steps 64 --sample False"
    )


def test_where_drafts_lose_the_command_is_autoregressive_decodings() -> None:
    model_arguments = ModelArguments(model="a folder")
    command = sweeping.command(model_arguments, sweep.SweepConfig(sample=False), None)
    assert command == "python generate.py --model 'a folder' --generation_strategy autoregressive --sample False"


def findings(best: Cell, speedup: float) -> Findings:
    return Findings({best: SimpleNamespace(speedup=SimpleNamespace(speedup=speedup))})


@pytest.mark.parametrize(
    ("best", "speedup", "sentences"),
    [
        (Cell(3, 2), 1.2, []),
        (
            Cell(3, 2),
            0.9,
            [r"Autoregressive decoding is faster here: the best cell, E=3, d=2, has 0\.90 × its speed\."],
        ),
        (
            Cell(3, 4),
            1.2,
            ["The best num_speculations, 4, is the greatest .* --num_speculations_last may be too small"],
        ),
        (Cell(5, 2), 1.2, ["The best exit_layer, 5, .* --exit_layer_last may be too small"]),
    ],
)
def test_what_should_be_known_of_the_best_cell(best: Cell, speedup: float, sentences: list[str]) -> None:
    cells = list(itertools.starmap(Cell, itertools.product((3, 5), (2, 4))))
    found = list(sweeping.advice(findings(best, speedup), cells))
    assert len(found) == len(sentences)
    for sentence, pattern in zip(found, sentences, strict=True):
        assert re.search(pattern, sentence)


@pytest.mark.parametrize(
    ("best", "step", "cells"),
    [
        (Cell(3, 6), 1, [(1, 7), (3, 7), (4, 7), (1, 8), (3, 8), (4, 8)]),
        (Cell(1, 6), 2, [(1, 8), (3, 8), (1, 10), (3, 10)]),
        (Cell(3, 5), 1, []),
        (Cell(3, 6), None, []),
        (Cell(3, MOST_SPECULATIONS - 1), 1, [(exit_layer, MOST_SPECULATIONS) for exit_layer in (1, 3, 4)]),
    ],
)
def test_longer_drafts_are_looked_at_where_the_best_cell_has_the_longest(
    best: Cell, step: int | None, cells: list[tuple[int, int]]
) -> None:
    """At its exit and the neighbours of it."""
    most = max(6, best.num_speculations)
    speeds = {Cell(exit_layer, d): 1.0 for exit_layer in (1, 3, 4, 9) for d in (5, 6, most)}
    assert longer_drafts(speeds | {best: 2.0}, step) == cells


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("mode", ["grid", "fast"])
@pytest.mark.parametrize(("given", "greatest"), [([], 8), (["--num_speculations_last", 6], 6)])
def test_a_range_that_was_not_given_is_widened(
    mode: str, given: list[object], greatest: int, run_sweep: Run, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the longer drafts are faster up to eight; the best cell is one of those beyond the first range."""

    def speed(cell: Cell | None) -> float:
        return 1.0 if cell is None else 10.0 - abs(cell.num_speculations - 8)

    measure = Sweep.measure

    def measured(self: Sweep, cell: Cell | None) -> GridRow:
        row = measure(self, None if cell is None else Cell(1, 1))
        times = dataclasses.replace(row.totals.times, tokens_per_second=speed(cell))
        return GridRow(cell, dataclasses.replace(row.totals, times=times), row.wall_seconds)

    def predicted(self: Sweep, cells: list[Cell], num_samples: int) -> dict[Cell, Prediction]:
        return {cell: Prediction(*cell, speed(cell), 0.5, 2.0) for cell in cells}

    monkeypatch.setattr(Sweep, "measure", measured)
    monkeypatch.setattr(Sweep, "predictions", predicted)
    flags = ["--mode", mode, "--exit_layer_first", 2, "--exit_layer_last", 2, "--num_speculations_first", 5]
    assert run_sweep(*flags, *given, "--num_samples", 1, "--max_steps", 2) == 0
    found = document(logs)
    assert found["best"]["num_speculations"] == greatest
    looked_at = [row["cell"] for row in found["grid"][1:]] or [
        [one["exit_layer"], one["num_speculations"]] for one in found["predicted"]
    ]
    # Twice: after the first time the best still had the longest draft.
    assert looked_at == [[2, d] for d in range(5, 11 if greatest == 8 else 7)]


def test_a_choice_is_kept_beside_the_weights(tmp_path: Path) -> None:
    cases = [{"dtype": "float32", "exit_layer": 1, "num_speculations": 1}]
    path = tmp_path / "layerskip.json"
    path.write_text(json.dumps({"exit_layer": 9, "num_speculations": 9, "draft_vocab": 7, "cases": cases}))
    menu = {"exit_layers": [3, 4], "acceptance": {3: 0.5, 4: 0.75}}
    assert sweeping.save(tmp_path, Cell(3, 2), None, menu) == path
    written = menu | {"acceptance": {"3": 0.5, "4": 0.75}}
    assert json.loads(path.read_text()) == {"exit_layer": 3, "num_speculations": 2, "cases": cases} | written
    advice = read_recommendation(str(tmp_path), num_layers=6)
    assert (advice.exit_layers, advice.acceptance) == ((3, 4), {3: 0.5, 4: 0.75})
    sweeping.save(tmp_path, Cell(4, 1), 200, {"acceptance": {4: 0.9}})
    advice = read_recommendation(str(tmp_path), num_layers=6)
    assert (advice.draft_vocab, advice.exit_layers, advice.acceptance) == (200, (), {4: 0.9})
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"^--save True: \S*layerskip\.json is not a JSON object\.$"):
        sweeping.save(tmp_path, Cell(3, 2), None, {})


def test_a_choice_needs_a_folder(run_sweep: Run, capsys: pytest.CaptureFixture[str], logs: Path) -> None:
    assert run_sweep("--save", "True", "--model", "someone/model") == 2
    assert "--save True: --model someone/model is not a folder" in capsys.readouterr().err
    assert not logs.exists()


SOME_DRAFTS = ["--num_speculations_first", 2, "--num_speculations_last", 6]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("flags", "cells"),
    [
        (["--exit_layer_step", 2, "--num_speculations_last", 1], [(1, 1), (3, 1), (5, 1)]),
        (
            [*SOME_DRAFTS, "--exit_layer_first", 5, "--num_speculations_step", 3],
            [(5, 2), (5, 5)],
        ),
        (["--exit_layer_first", 4, "--exit_layer_last", 6, "--exit_layer_step", 2], [(4, 3), (6, 3)]),
    ],
)
def test_steps_and_ends_of_the_axes(
    run_sweep: Run, logs: Path, flags: list[object], cells: list[tuple[int, int]]
) -> None:
    if "--num_speculations_first" not in flags:
        flags = ["--num_speculations_first", cells[0][1], "--num_speculations_last", cells[0][1], *flags]
    assert run_sweep("--max_steps", 2, "--num_samples", 1, *flags) == 0
    assert cells_of(table(logs)) == cells


def test_default_axes() -> None:
    cells = sweep.SweepArguments().cells(num_layers=4)
    assert cells == list(itertools.product((1, 2, 3), range(1, 7)))


def test_every_cell_answers_the_same_prompts(folder: Path, logs: Path) -> None:
    seen: dict[tuple[str, int | None, int | None], list[tuple[list[int], list[int]]]] = {}

    class Noted(Contestant):
        def run(self, prompts: list[list[int]]) -> list[Measurement]:
            [measurement], config = super().run(prompts), self.config
            key = (config.generation_strategy, config.exit_layer, config.num_speculations)
            seen.setdefault(key, []).append((prompts[0], measurement.tokens))
            return [measurement]

    class NotedSweep(Sweep):
        def contestant(self, cell: Cell | None) -> Contestant:
            own = super().contestant(cell)
            return Noted(own.generator, own.config)

    log = RunLog(logs, "sweep")
    log.begin({}, resume=False)
    search(NotedSweep(*load(ModelArguments(str(folder))), GREEDY, PROMPTS), SMALL_CELLS, log, BRIEF)
    expected = [("autoregressive", None, None), *(("self_speculative", *cell) for cell in SMALL_CELLS)]
    assert list(seen) == expected
    answers = seen["autoregressive", None, None]
    assert len({tuple(prompt) for prompt, _ in answers}) == 3
    # Once in the grid, once more if it is measured again at the end: the baseline and one finalist.
    assert sorted(map(len, seen.values())) == [3] * 5 + [6] * 2
    assert all(answers[: len(own)] == own for own in seen.values())
    assert answers[3:] == answers[:3]


def test_only_the_first_process_sweeps(run_sweep: Run, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_sweep() == 0
    assert not logs.exists()


@pytest.mark.usefixtures("without_pictures")
def test_transformers_own_early_exit_is_swept_too(
    run_sweep: Run, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--generation_strategy", "hf_early_exit", "--exit_layer_last", 2, "--num_speculations_last", 1]
    assert run_sweep(*flags, "--num_samples", 1) == 0
    assert cells_of(table(logs)) == [(1, 1), (2, 1)]
    speedup = document(logs)["best"]["speedup"]
    strategy = "hf_early_exit" if speedup > 1 else "autoregressive"
    assert f"--generation_strategy {strategy}" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("mode", ["fast", "both"])
def test_transformers_own_early_exit_cannot_be_predicted(
    run_sweep: Run, logs: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep("--generation_strategy", "hf_early_exit", "--mode", mode) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert f"--mode {mode}" in sentence
    assert "hf_early_exit" in sentence
    assert not logs.exists()


# The prediction


def test_fast_predicts_every_cell_and_measures_the_best(run_sweep: Run, logs: Path) -> None:
    assert run_sweep("--mode", "fast", *SMALL_GRID, "--profile_samples", 2, "--finalists", 2) == 0
    found = document(logs)
    predicted = {(one["exit_layer"], one["num_speculations"]): one for one in found["predicted"]}
    assert list(predicted) == SMALL_CELLS
    ranked = sorted(SMALL_CELLS, key=lambda cell: -predicted[cell]["tokens_per_second"])
    assert {tuple(row["cell"]) for row in found["final"]} == set(ranked[:2])
    assert found["choices"] == {"fast": found["final"][0]["cell"]}
    assert found["seconds"].keys() == {"fast"}
    assert found["best"]["samples"] == 2
    assert found["grid"] == []
    for name in ("sweep_speed.png", "sweep_acceptance.png"):
        assert_is_picture(logs / name)


def test_fast_foretells_exactly_what_the_grid_counts_and_both_duel(
    run_sweep: Run, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_sweep("--mode", "both", "--exit_layer_step", 2, "--num_speculations_last", 3, "--profile_samples", 3) == 0
    )
    found = document(logs)
    measured = {tuple(row["cell"]): row for row in found["grid"][1:]}
    predicted = {(one["exit_layer"], one["num_speculations"]): one for one in found["predicted"]}
    assert measured.keys() == predicted.keys() == set(itertools.product((1, 3, 5), (1, 2, 3)))
    for cell, one in predicted.items():
        assert one["acceptance_rate"] == pytest.approx(measured[cell]["acceptance_rate"], rel=1e-12)
        assert one["tokens_per_step"] == pytest.approx(measured[cell]["tokens_per_step"], rel=1e-12)
        assert one["tokens_per_second"] > 0

    assert found["choices"].keys() == found["seconds"].keys() == {"fast", "grid"}
    assert found["choices"]["grid"] == max(found["grid"][1:], key=lambda row: row["tokens_per_second"])["cell"]
    duellists = [row["cell"] for row in found["final"]]
    assert sorted(duellists) == sorted(map(list, {tuple(cell) for cell in found["choices"].values()}))
    assert duellists[0] == [found["best"]["exit_layer"], found["best"]["num_speculations"]]
    assert_is_picture(logs / "sweep_prediction.png")
    assert str(logs / "sweep_prediction.png") in capsys.readouterr().out

    [section] = read_sections(logs, most_answers=1)
    assert f"{found['best']['speedup']:.2f} ×" in section.summary
    assert [(table.title, len(table.rows)) for table in section.tables] == [
        ("The best cells, measured again", len(found["final"])),
        ("Measured cells", 10),
        ("Predicted cells", 9),
    ]
    assert list(section.pictures) == ["Speed", "Acceptance", "Predicted against measured"]


@pytest.mark.parametrize("mode", ["grid", "fast", "both"])
def test_answers_of_no_tokens_are_refused(
    run_sweep: Run, logs: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep("--mode", mode, "--max_steps", 0) == 2
    assert "--max_steps must be at least 1" in capsys.readouterr().err
    assert not logs.exists()


# Interruptions

QUICK_GRID = (*SMALL_GRID, "--num_samples", 1)


class InterruptionError(Exception):
    """What no one catches."""


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(
    run_sweep: Run, folder: Path, rows: Path, tmp_path: Path, logs: Path
) -> None:
    assert run_sweep(*QUICK_GRID, "--output_dir", tmp_path / "uninterrupted") == 0
    flags = [*SHORT, *QUICK_GRID, "--data_path", rows, "--model", folder, "--output_dir", logs]
    process = subprocess.Popen([sys.executable, "sweep.py", *map(str, flags)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not ((logs / "sweep.jsonl").is_file() and (logs / "sweep.jsonl").read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.Random(7).uniform(0, 0.2))
    finally:
        process.kill()
        process.wait()
    before = (logs / "sweep.jsonl").read_text()
    done = before.count("\n")
    rows_before = table(logs)[:done]
    assert done >= 1

    assert run_sweep(*QUICK_GRID, "--resume", "True") == 0
    assert cells_of(table(logs)) == SMALL_CELLS
    assert counts_of(logs) == counts_of(tmp_path / "uninterrupted")
    assert (logs / "sweep.jsonl").read_text().startswith(before)
    assert (logs / "sweep.jsonl").read_text().count("\n") == 7
    assert table(logs)[: len(rows_before)] == rows_before
    assert sorted(path.name for path in logs.iterdir()) == sorted(
        path.name for path in (tmp_path / "uninterrupted").iterdir()
    )


def test_only_what_is_missing_is_measured_after_an_interruption(folder: Path, tmp_path: Path, logs: Path) -> None:
    """The third cell is interrupted, in the middle of its line."""
    measured: list[Cell | None] = []

    class Noted(Sweep):
        def measure(self, cell: Cell | None) -> GridRow:
            measured.append(cell)
            return super().measure(cell)

    class Interrupted(Noted):
        def measure(self, cell: Cell | None) -> GridRow:
            row = super().measure(cell)
            if cell == (2, 1):
                with (logs / "sweep.jsonl").open("a") as file:
                    file.write('{"cell": [2, 1], "tok')
                raise InterruptionError
            return row

    def swept(kind: type[Sweep], folder_of_log: Path, resume: bool) -> None:
        measured.clear()
        log = RunLog(folder_of_log, "sweep")
        log.begin({}, resume)
        kind(*load(ModelArguments(str(folder))), GREEDY, PROMPTS[:1]).grid(SMALL_CELLS, log)

    swept(Noted, tmp_path / "uninterrupted", resume=False)
    assert measured == [None, *SMALL_CELLS]
    with pytest.raises(InterruptionError):
        swept(Interrupted, logs, resume=False)
    assert measured == [None, (1, 1), (1, 2), (2, 1)]
    assert cells_of(table(logs)) == [(1, 1), (1, 2)]
    before = table(logs)

    swept(Noted, logs, resume=True)
    assert measured == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert table(logs)[:3] == before
    assert counts_of(logs) == counts_of(tmp_path / "uninterrupted")

    swept(Noted, logs, resume=True)
    assert measured == []


@pytest.mark.usefixtures("without_pictures")
def test_another_sweep_is_not_resumed(run_sweep: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(*QUICK_GRID) == 0
    assert run_sweep(*QUICK_GRID, "--resume", "True", "--max_steps", 9) == 2
    assert "--max_steps 8, not 9" in capsys.readouterr().err


def test_nothing_to_resume_is_a_mistake(run_sweep: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep("--resume", "True") == 2
    assert "--resume" in capsys.readouterr().err
