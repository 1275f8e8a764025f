"""Pictures of exit layers and draft lengths, as PNG and PDF: maps of a grid, predictions, and a policy's choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from self_speculation.decoding.cell import Cell, Source
from self_speculation.measuring.choices import ChosenStep
from self_speculation.measuring.colours import BLUE, GREY, ORANGE
from self_speculation.writing import naming

CELL_INCHES = (0.85, 0.42)
# How steps are drawn, by the source of their drafts: name, colour and marker.
SOURCES = {
    Source.EXIT: ("drafts by an exit", BLUE, "o"),
    Source.LOOKUP: ("drafts by lookup", ORANGE, "s"),
    Source.NONE: ("no drafts", GREY, "x"),
}


@dataclass(frozen=True)
class GridMap:
    """A value in every cell (E, d), what it is, a label where there is one, and the cell to mark."""

    title: str
    quantity: str
    values: dict[Cell, float]
    labels: dict[Cell, str]
    best: Cell | None = None


def save_map(grid: GridMap, path: Path) -> None:
    """A heat map: exit layers upwards, draft lengths to the right, the best cell in a frame."""
    exit_layers, drafts = (sorted(set(axis)) for axis in zip(*grid.values, strict=True))
    values = np.array([[grid.values.get(Cell(e, d), np.nan) for d in drafts] for e in exit_layers])
    width, height = CELL_INCHES
    figure = Figure(
        figsize=(max(5, width * len(drafts) + 2.5), max(3, height * len(exit_layers) + 1.6)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(drafts)), drafts)
    axes.set_yticks(range(len(exit_layers)), exit_layers)
    axes.set_title(grid.title, fontsize=10)
    axes.set(xlabel="num_speculations d", ylabel="exit_layer E")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (exit_layer, num_drafts), label in grid.labels.items():
        x, y = drafts.index(num_drafts), exit_layers.index(exit_layer)
        axes.text(
            x, y, label, ha="center", va="center", fontsize=8, color="white" if values[y, x] < middle else "black"
        )
    if grid.best is not None:
        x, y = drafts.index(grid.best.num_speculations), exit_layers.index(grid.best.exit_layer)
        # White on black, which is seen on every colour of the map, by every eye.
        for colour, width in (("black", 5), ("white", 2)):
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False)
            )
    figure.colorbar(image, label=grid.quantity)
    _save(figure, path)


def save_scatter(predicted: dict[Cell, float], measured: dict[Cell, float], path: Path) -> None:
    """Predicted against measured tokens a second, coloured by exit layer, with the line on which they agree."""
    cells = sorted(predicted.keys() & measured.keys())
    x, y = ([source[cell] for cell in cells] for source in (measured, predicted))
    error = np.median([abs(a / b - 1) for a, b in zip(y, x, strict=True)])
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = figure.add_subplot()
    points = axes.scatter(x, y, c=[cell.exit_layer for cell in cells], cmap="viridis")
    ends = [min(x + y), max(x + y)]
    axes.plot(ends, ends, color="grey", linewidth=1, linestyle="--")
    axes.set(
        title=f"{len(cells)} cells, median error {error:.1%}",
        xlabel="measured tokens/s",
        ylabel="predicted tokens/s",
        aspect="equal",
    )
    figure.colorbar(points, label="exit_layer E", ticks=MaxNLocator(integer=True))
    _save(figure, path)


def save_choices(steps: Sequence[ChosenStep], path: Path) -> None:
    """What a policy chose over the course of an answer, step by step, and what was accepted."""
    _save(_choices_figure(steps), path)


def choices_png(steps: Sequence[ChosenStep]) -> bytes:
    """The same picture for a page."""
    return _as_bytes(_choices_figure(steps), "png")


def _choices_figure(steps: Sequence[ChosenStep]) -> Figure:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    exits, drafts = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    _draw_exits(exits, steps)
    _draw_drafts(drafts, steps)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def _draw_exits(axes: Axes, steps: Sequence[ChosenStep]) -> None:
    """Who drafted in each step: an exit layer, the lookup or nobody."""
    rows = [_drafter(step) for step in steps]
    # From below: nobody, the lookup, the exits.
    upward = sorted(steps, key=lambda step: ([Source.NONE, Source.LOOKUP, Source.EXIT].index(step.cell.source), step))
    names = list(dict.fromkeys(map(_drafter, upward)))
    for source, (label, colour, marker) in SOURCES.items():
        own = [index for index, step in enumerate(steps) if step.cell.source == source]
        if own:
            places = [names.index(rows[index]) for index in own]
            axes.scatter([index + 1 for index in own], places, s=14, color=colour, marker=marker, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_ylabel("drafted by\nexit layer E")
    axes.grid(axis="y", alpha=0.3)


def _draw_drafts(axes: Axes, steps: Sequence[ChosenStep]) -> None:
    """Each step's draft, what of it was accepted filled."""
    colours = [SOURCES[step.cell.source][1] for step in steps]
    places = range(1, len(steps) + 1)
    axes.bar(places, [step.drafted for step in steps], 0.8, color="white", edgecolor=colours, linewidth=0.8)
    axes.bar(places, [step.accepted for step in steps], 0.8, color=colours, edgecolor=colours, linewidth=0.8)
    axes.bar(0, 0, color="white", edgecolor=GREY, label="drafted")
    axes.bar(0, 0, color=GREY, edgecolor=GREY, label="accepted")
    axes.set(xlabel="step of the answer", ylabel="drafted tokens d", xlim=(0, len(steps) + 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)


def _drafter(step: ChosenStep) -> str:
    """A row's name: the number of an exit layer, or what stands in the place of one."""
    source = step.cell.source
    return str(step.cell.exit_layer) if source == Source.EXIT else str(source)


def _save(figure: Figure, path: Path) -> None:
    for suffix in (".png", ".pdf"):
        picture = _as_bytes(figure, suffix.removeprefix("."))
        with naming(path.with_suffix(suffix)):
            path.with_suffix(suffix).write_bytes(picture)


def _as_bytes(figure: Figure, format: str) -> bytes:
    """The picture in memory: on a full disk matplotlib's writer of PDF fails over its own failure."""
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format=format)
    return picture.getvalue()
