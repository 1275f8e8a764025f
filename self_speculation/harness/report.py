"""What an evaluation says: tables, where its files are, and its totals."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from self_speculation.harness.exits_picture import plot_exits
from self_speculation.harness.task_metrics import Results, main_metrics, metrics
from self_speculation.terminal import shown_on

SPEED_COLUMNS = {
    "answers": ("answers", "{:.0f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "tokens_per_step": ("per step", "{:.2f}"),
    "acceptance_rate": ("acceptance", "{:.1%}"),
    "autoregressive_tokens_per_second": ("autoregressive", "{:.1f}"),
    "speedup": ("speed-up", "{:.2f}"),
    "equal_answers": ("equal", "{:.0f}"),
    "equal_up_to_rounding": ("up to rounding", "{:.0f}"),
}


def print_report(results: Results, path: Path | None) -> None:
    """Tables, and where the files are; a picture of the exits' scores beside the results, if those are kept."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    console.print(results_table(results))
    speed = speed_table(results)
    if speed is not None:
        console.print(speed)
    for name, count in results["shortened_prompts"].items():
        if count:
            console.print(f"{shown_on(sys.stdout, name)}: {count} prompts were shortened to fit the model's context.")
    if "exit_layers" in results:
        console.print(exits_table(results))
    if path is None:
        return
    if "exit_layers" in results:
        picture = path.with_name(path.stem.replace("results", "exits") + ".png")
        plot_exits(results, picture)
        print(f"picture: {picture}")
    print(f"results: {path}")


def results_table(results: Results) -> Table:
    """Every task's metrics."""
    table = Table("task", "shots", "documents", "metric", "value")
    for name, own in results["results"].items():
        for index, metric in enumerate(metrics(own)):
            task = (shown_on(sys.stdout, name), str(results["n-shot"].get(name, "")), str(own.get("sample_len", "")))
            name_and_filter = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
            own_name = shown_on(sys.stdout, name_and_filter)
            table.add_row(*(task if index == 0 else ("", "", "")), own_name, str(metric))
    return table


def speed_table(results: Results) -> Table | None:
    """How fast each task's answers were; None if nothing was generated."""
    shown = [key for key in SPEED_COLUMNS if any(key in own for own in results["speed"].values())]
    table = Table("task", *(SPEED_COLUMNS[key][0] for key in shown))
    for name, own in results["speed"].items():
        table.add_row(
            shown_on(sys.stdout, name), *(SPEED_COLUMNS[key][1].format(own[key]) if key in own else "" for key in shown)
        )
    return table if shown else None


def exits_table(results: Results) -> Table:
    """Each task's main metric at every exit layer."""
    shown = main_metrics(results)
    heads = (f"{name}\n{key.partition(',')[0]}" for name, key in shown.items())
    table = Table("exit layer", *(shown_on(sys.stdout, head) for head in heads))
    for exit_layer, own in sorted(results["exit_layers"].items()):
        found = [next(metric for metric in metrics(own[name]) if metric.key == key) for name, key in shown.items()]
        table.add_row(str(exit_layer), *map(str, found))
    return table


def totals(results: Results) -> dict[str, Any]:
    """The figures of a run, in a few words: each task's metrics, and its speed."""
    return {
        name: {metric.key: metric.value for metric in metrics(own)} | results["speed"].get(name, {})
        for name, own in results["results"].items()
    }
