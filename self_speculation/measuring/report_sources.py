"""What each program left in a folder, read for a page of results."""

import csv
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from self_speculation.measuring.choices import Choice
from self_speculation.measuring.report_answers import choice_page_table, generated_answer, measured_answers
from self_speculation.measuring.report_parts import (
    Columns,
    PageTable,
    Section,
    all_figures,
    read_lines,
    read_object,
    records_table,
    shown,
    understood,
)

SPEED: Columns = {
    "name": ("strategy", ""),
    "exit_layer": ("E", ""),
    "num_speculations": ("d", ""),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "decode_tokens_per_second": ("decode tokens/s", "{:.1f}"),
    "acceptance_rate": ("accepted", "{:.1%}"),
    "tokens_per_step": ("tokens/step", "{:.2f}"),
    "speedup": ("speed-up", "{:.2f}"),
    "speedup_spread": ("least–greatest", "{:.2f}–{:.2f}"),
    "tokens_within_rounding": ("within rounding", ""),
    "wrong": ("wrong tokens", ""),
}
JUDGED: Columns = {
    "exit_layer": ("E", ""),
    "num_speculations": ("d", ""),
    "num_samples": ("samples", ""),
    "tokens": ("tokens", "{:,}"),
    "tokens_exact": ("exact", "{:,}"),
    "tokens_within_rounding": ("within rounding", ""),
    "wrong": ("wrong", ""),
    "ties": ("answers that differ by ties", ""),
    "failures": ("answers with something wrong", ""),
    "acceptance_rate": ("accepted", "{:.1%}"),
}
EVALUATED: Columns = {
    "task": ("task", ""),
    "exit_layer": ("exit layer", ""),
    "metric": ("metric", ""),
    "value": ("value", "{:.4g}"),
    "error": ("standard error", "{:.2g}"),
}
# Lines of a training's log that are shown, the newest, and what they have.
MOST_LOGGED = 50
LOGGED: Columns = {
    "step": ("step", ""),
    "epoch": ("epoch", "{:.3f}"),
    "loss": ("loss", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "learning_rate": ("learning rate", "{:.3g}"),
    "grad_norm": ("gradient's norm", "{:.3g}"),
}
UNFINISHED = "Unfinished: there are no totals yet."

# A reader of one program's files in a folder, which shows at most so many answers; nothing where there are none.
Reader = Callable[[Path, int], Section | None]


def read_sections(folder: Path, most_answers: int) -> list[Section]:
    """What every program left in a folder, with at most so many answers of each.

    Raises:
        ValueError: there is nothing, or a file is not what its program writes.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder: {folder} is not a folder.")
    sections = [section for read in READERS if (section := read(folder, most_answers)) is not None]
    if not sections:
        raise ValueError(f"--folder: {folder} has no results of {', '.join(PROGRAMS)}.")
    return sections


def read_benchmark(folder: Path, most_answers: int) -> Section | None:
    """`benchmark.json`, and the answers of `benchmark.jsonl` in the first round."""
    path, log = folder / "benchmark.json", folder / "benchmark.jsonl"
    if not path.is_file():
        return None
    document = read_object(path)
    with understood(path, "benchmark"):
        strategies = {name: {"name": name} | own for name, own in document.get("strategies", {}).items()}
        tables = [records_table("Strategies", list(strategies.values()), SPEED)] if strategies else []
        for name, own in strategies.items():
            if own.get("choices"):
                tables.append(choice_page_table(f"What {name} chose", [Choice(**one) for one in own["choices"]]))
        tables += [all_figures(strategies)] if strategies else []
        settings = document["arguments"] | document.get("surroundings", {})
    lines = read_lines(log) if log.is_file() else []
    with understood(log, "benchmark"):
        first = [line for line in lines if line["repeat"] == 0][:most_answers]
        answers = [answer for line in first for answer in measured_answers(line)]
    summary = settings.get("caveat", "") if strategies else UNFINISHED
    return Section("benchmark", summary, settings, tables, {}, answers)


def read_sweep(folder: Path, most_answers: int) -> Section | None:
    """`sweep.json` and its pictures; before the end the cells of `sweep.jsonl`."""
    path, log = folder / "sweep.json", folder / "sweep.jsonl"
    if not path.is_file():
        return None
    document = read_object(path)
    lines = document.get("grid") or (read_lines(log) if log.is_file() else [])
    with understood(path, "sweep"):
        best = document.get("best")
        summary = UNFINISHED
        if best is not None:
            summary = "The best cell: E={exit_layer}, d={num_speculations}, {speedup:.2f} × autoregressive decoding."
            summary = " ".join(filter(None, [summary.format(**best), document.get("surroundings", {}).get("caveat")]))
        tables = [
            _folded(records_table(title, [_with_cell(one) for one in records], SPEED), is_folded)
            for title, records, is_folded in (
                ("The best cells, measured again", document.get("final", []), False),
                ("Measured cells", lines, True),
                ("Predicted cells", document.get("predicted", []), True),
            )
            if records
        ]
        settings = document["arguments"] | document.get("surroundings", {})
    pictures = {
        "Speed": "sweep_speed.png",
        "Acceptance": "sweep_acceptance.png",
        "Predicted against measured": "sweep_prediction.png",
    }
    return Section("sweep", summary, settings, tables, _pictures(folder, pictures))


def read_correctness(folder: Path, most_answers: int) -> Section | None:
    """`correctness.json`, or what an interrupted check has found."""
    names = ("correctness.json", "correctness.unfinished.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    document = read_object(path)
    with understood(path, "correctness"):
        verdict = "PASS" if document["is_correct"] else "FAIL"
        summary = verdict if path.name == names[0] else "Unfinished: the check was interrupted."
        tables = [records_table("Cells", document["cells"], JUDGED)]
        if document.get("noise_floors"):
            floors = document["noise_floors"]
            tables.append(
                records_table("Noise floors", floors, {key: (key.replace("_", " "), "") for key in floors[0]})
            )
        settings = {key: value for group in document["settings"].values() for key, value in group.items()}
        settings |= {"dtype": document["dtype"]} | document["versions"]
    return Section("correctness", summary, settings, tables)


def read_evaluation(folder: Path, most_answers: int) -> Section | None:
    """The newest `results_DATE.json` of lm-eval, in the folder or in a model's folder in it."""
    paths = [*folder.glob("results_*.json"), *folder.glob("*/results_*.json")]
    path = max((path for path in paths if path.is_file()), key=lambda path: path.name, default=None)
    if path is None:
        return None
    document = read_object(path)
    with understood(path, "eval"):
        exits = document.get("exit_layers") or {}
        tables = [records_table("Tasks", list(_metrics(document["results"])), EVALUATED)]
        if exits:
            layers = sorted(exits, key=int)
            records = [{"exit_layer": layer} | one for layer in layers for one in _metrics(exits[layer])]
            tables.append(_folded(records_table("Exit layers", records, EVALUATED)))
        speed = {name: own for name, own in (document.get("speed") or {}).items() if own}
        tables += [all_figures(speed)] if speed else []
        settings = dict(document["config"].items())
    picture = path.stem.replace("results", "exits", 1) + ".png"
    return Section("eval", "", settings, tables, _pictures(path.parent, {"Exit layers": picture}))


def read_training(folder: Path, most_answers: int) -> Section | None:
    """`layerskip_run.json`, `exits.csv`, their picture, what is recommended, and the newest checkpoint's log."""
    record, exits = folder / "layerskip_run.json", folder / "exits.csv"
    if not record.is_file() and not exits.is_file():
        return None
    settings, tables = {}, []
    if record.is_file():
        document = read_object(record)
        with understood(record, "train"):
            settings = dict(document["arguments"].items())
    if exits.is_file():
        with understood(exits, "train"):
            head, *rows = csv.reader(exits.read_text(encoding="utf-8").splitlines())
            tables.append(PageTable("Exit layers", head, [[_number(value) for value in row] for row in rows]))
    advice, state = folder / "layerskip.json", _newest_state(folder)
    if advice.is_file():
        tables.append(
            PageTable("Recommended", ["", ""], [[key, shown(own)] for key, own in read_object(advice).items()])
        )
    if state is not None:
        history = read_object(state)
        with understood(state, "train"):
            logged = [line for line in history["log_history"] if "loss" in line or "eval_loss" in line]
            tables.append(_folded(records_table("Log", logged[-MOST_LOGGED:], LOGGED)))
    return Section("train", "", settings, tables, _pictures(folder, {"Exit layers": "exits.png"}))


def read_generation(folder: Path, most_answers: int) -> Section | None:
    """The newest answers of `generate.jsonl`, and the last one's settings, where they are kept beside it."""
    path, kept = folder / "generate.jsonl", folder / "generate_settings.json"
    if not path.is_file():
        return None
    lines = read_lines(path)
    first = max(0, len(lines) - most_answers)
    with understood(path, "generate"):
        answers = [
            generated_answer(line, f"Answer {first + index}") for index, line in enumerate(lines[first:], start=1)
        ]
    settings = read_object(kept) if kept.is_file() else {}
    return Section("generate", f"The newest {len(answers)} of {len(lines)} answers.", settings, answers=answers)


READERS: tuple[Reader, ...] = (
    read_generation,
    read_correctness,
    read_benchmark,
    read_sweep,
    read_evaluation,
    read_training,
)
PROGRAMS = ("generate", "correctness", "benchmark", "sweep", "eval", "train")


def _metrics(results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each task's figures as lm-eval names them: 'acc,none', and beside it 'acc_stderr,none'."""
    for task, own in results.items():
        for key, value in own.items():
            name, comma, filtered = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                error = own.get(f"{name}_stderr,{filtered}")
                metric = name if filtered == "none" else f"{name} ({filtered})"
                yield {
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "error": error if isinstance(error, float) else None,
                }


def _with_cell(one: dict[str, Any]) -> dict[str, Any]:
    """A sweep's line with E and d by name; the baseline has neither."""
    if "cell" not in one:
        return one
    exit_layer, num_speculations = one["cell"] or (None, None)
    cell = {"exit_layer": exit_layer, "num_speculations": num_speculations}
    return one | cell if exit_layer else one | cell | {"name": "autoregressive"}


def _folded(table: PageTable, is_folded: bool = True) -> PageTable:
    return PageTable(table.title, table.columns, table.rows, is_folded)


def _pictures(folder: Path, names: dict[str, str]) -> dict[str, str]:
    """Those pictures that are there."""
    return {
        title: b64encode((folder / name).read_bytes()).decode()
        for title, name in names.items()
        if (folder / name).is_file()
    }


def _newest_state(folder: Path) -> Path | None:
    """What the Trainer logged, in the folder or in its newest checkpoint."""
    found = [
        path
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if re.fullmatch(r"checkpoint-\d+", path.parent.name)
    ]
    newest = max(found, key=lambda path: int(path.parent.name.partition("-")[2]), default=None)
    own = folder / "trainer_state.json"
    return own if own.is_file() else newest


def _number(value: str) -> str:
    """A figure of a table with as many digits as anyone reads."""
    return value if value.isdecimal() else f"{float(value):.4g}"
