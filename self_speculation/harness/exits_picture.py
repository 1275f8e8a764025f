"""A picture of every exit layer's scores."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from self_speculation.harness.task_metrics import Results, main_metrics, metrics
from self_speculation.measuring.colours import line_style


def plot_exits(results: Results, path: Path) -> None:
    """A picture of each task's main metric over the exit layer, with its standard error."""
    shown = main_metrics(results)
    sides: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name, key in shown.items():
        higher_is_better = results["higher_is_better"][name].get(key.partition(",")[0], True)
        sides[bool(higher_is_better)][name] = key
    panels = [(higher, own) for higher, own in sides.items() if own]
    figure = Figure(figsize=(5.4 * len(panels), 4), layout="constrained")
    for axes, (higher, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, (name, key) in enumerate(own.items()):
            _draw(axes, results["exit_layers"], (name, key), line_style(index))
        names = " / ".join(sorted({key.partition(",")[0] for key in own.values()}))
        axes.set(xlabel="exit layer", ylabel=names, title="higher is better" if higher else "lower is better")
        axes.set_yscale("linear" if higher else "log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, exits: dict[int, Results], task: tuple[str, str], style: dict[str, str]) -> None:
    """A task's metric (both by name) as a line in its band."""
    name, key = task
    layers = sorted(exits)
    found = [next(metric for metric in metrics(exits[layer][name]) if metric.key == key) for layer in layers]
    values, errors = [float(metric.value) for metric in found], [metric.error or 0.0 for metric in found]
    axes.plot(layers, values, label=name, color=style["color"], marker=style["marker"])
    low, high = ([value + sign * error for value, error in zip(values, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(layers, low, high, color=style["color"], alpha=0.15)
