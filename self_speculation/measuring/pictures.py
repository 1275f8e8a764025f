"""Pictures of a grid of exit layers and draft lengths, as PNG and PDF: maps, and predicted against measured."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from self_speculation.decoding.cell import Cell
from self_speculation.writing import naming

CELL_INCHES = (0.85, 0.42)


@dataclass(frozen=True)
class GridMap:
    """A value in every cell (E, d), a label where there is one, and the cell to mark."""

    title: str
    values: dict[Cell, float]
    labels: dict[Cell, str]
    best: Cell | None = None


def save_map(grid: GridMap, path: Path) -> None:
    """A heat map: exit layers upwards, draft lengths to the right, the best cell in a red frame."""
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
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    figure.colorbar(image)
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


def _save(figure: Figure, path: Path) -> None:
    for suffix in (".png", ".pdf"):
        # On a full disk matplotlib's writer of PDF fails over its own failure, so it writes to memory.
        picture = BytesIO()
        figure.savefig(picture, dpi=130, format=suffix.removeprefix("."))
        with naming(path.with_suffix(suffix)):
            path.with_suffix(suffix).write_bytes(picture.getvalue())
