"""What an evaluation leaves behind: lm-eval's result files, tables, and a picture of every exit layer's scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from self_speculation.harness.evaluation import Results

# Entries of a task's results that are not metrics.
NOT_METRICS = {"name", "alias", "sample_len", "sample_count"}
SPEED_COLUMNS = {
    "answers": ("answers", "{:.0f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "tokens_per_step": ("per step", "{:.2f}"),
    "acceptance_rate": ("acceptance", "{:.1%}"),
    "autoregressive_tokens_per_second": ("autoregressive", "{:.1f}"),
    "speedup": ("speed-up", "{:.2f}"),
    "equal_answers": ("equal", "{:.0f}"),
}


@dataclass(frozen=True)
class Metric:
    """One figure of a task; `error` is its standard error, where lm-eval knows it."""

    name: str
    filter: str
    value: float | str
    error: float | None

    @property
    def key(self) -> str:
        """As lm-eval names it: 'acc,none'."""
        return f"{self.name},{self.filter}"

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        return value if self.error is None else f"{value} ± {self.error:.2g}"


def metrics(own: Results) -> Iterator[Metric]:
    """The figures of one task, in its own order."""
    for key, value in own.items():
        name, _, filter_name = key.partition(",")
        if key not in NOT_METRICS and not name.endswith("_stderr"):
            error = own.get(f"{name}_stderr,{filter_name}")
            yield Metric(name, filter_name, value, error if isinstance(error, float) else None)


def save(results: Results, tracker: EvaluationTracker) -> Path:
    """Write lm-eval's result file, with our figures in it, and its samples; returns the result file."""
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, own in samples.items():
        tracker.save_results_samples(task_name=name, samples=own)
    folder = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
    path = folder / f"results_{tracker.date_id}.json"
    if not path.is_file():  # lm-eval only warns.
        raise ValueError(f"--output_dir: the results could not be written to {path}.")
    return path


def results_table(results: Results) -> Table:
    """Every task's metrics."""
    table = Table("task", "shots", "documents", "metric", "value")
    for name, own in results["results"].items():
        for index, metric in enumerate(metrics(own)):
            task = (name, str(results["n-shot"].get(name, "")), str(own.get("sample_len", "")))
            name_and_filter = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
            table.add_row(*(task if index == 0 else ("", "", "")), name_and_filter, str(metric))
    return table


def speed_table(results: Results) -> Table | None:
    """How fast each task's answers were; None if nothing was generated."""
    shown = [key for key in SPEED_COLUMNS if any(key in own for own in results["speed"].values())]
    table = Table("task", *(SPEED_COLUMNS[key][0] for key in shown))
    for name, own in results["speed"].items():
        table.add_row(name, *(SPEED_COLUMNS[key][1].format(own[key]) if key in own else "" for key in shown))
    return table if shown else None


def main_metrics(results: Results) -> dict[str, str]:
    """The key of the first metric of each task or group that stands for itself."""
    members = {name for names in results["group_subtasks"].values() for name in names}
    firsts = {name: next(metrics(own), None) for name, own in results["results"].items() if name not in members}
    return {name: first.key for name, first in firsts.items() if first is not None}


def exits_table(results: Results) -> Table:
    """Each task's main metric at every exit layer."""
    shown = main_metrics(results)
    table = Table("exit layer", *(f"{name}\n{key.partition(',')[0]}" for name, key in shown.items()))
    for exit_layer, own in sorted(results["exit_layers"].items()):
        found = [next(metric for metric in metrics(own[name]) if metric.key == key) for name, key in shown.items()]
        table.add_row(str(exit_layer), *map(str, found))
    return table


def plot_exits(results: Results, path: Path) -> None:
    """A picture of each task's main metric over the exit layer, with its standard error."""
    shown = main_metrics(results)
    sides = {True: {}, False: {}}
    for name, key in shown.items():
        higher_is_better = results["higher_is_better"][name].get(key.partition(",")[0], True)
        sides[bool(higher_is_better)][name] = key
    panels = [(higher, own) for higher, own in sides.items() if own]
    figure = Figure(figsize=(5.4 * len(panels), 4), layout="constrained")
    for axes, (higher, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, key in own.items():
            _draw(axes, results["exit_layers"], name, key)
        names = " / ".join(sorted({key.partition(",")[0] for key in own.values()}))
        axes.set(xlabel="exit layer", ylabel=names, title="higher is better" if higher else "lower is better")
        axes.set_yscale("linear" if higher else "log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, exits: dict[int, Results], name: str, key: str) -> None:
    layers = sorted(exits)
    found = [next(metric for metric in metrics(exits[layer][name]) if metric.key == key) for layer in layers]
    values, errors = [metric.value for metric in found], [metric.error or 0.0 for metric in found]
    [line] = axes.plot(layers, values, marker="o", label=name)
    low, high = ([value + sign * error for value, error in zip(values, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15)


def totals(results: Results) -> dict[str, Any]:
    """The figures of a run, in a few words: each task's metrics, and its speed."""
    return {
        name: {metric.key: metric.value for metric in metrics(own)} | results["speed"].get(name, {})
        for name, own in results["results"].items()
    }
