"""Pictures of a grid: what they show, and that they are files that can be opened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from self_speculation.decoding.cell import FREE, Cell
from self_speculation.measuring.choices import ChosenStep
from self_speculation.measuring.colours import line_style
from self_speculation.measuring.pictures import GridMap, save_choices, save_map, save_scatter


def assert_is_picture(path: Path) -> None:
    """A PNG with something on it, and a PDF."""
    pixels = imread(path)
    assert pixels.shape[0] > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    pdf = path.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"%%EOF" in pdf[-20:]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved; they are saved all the same."""
    saved: list[Figure] = []
    save = Figure.savefig

    def noted(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    return saved


def test_a_map_with_missing_cells(figures: list[Figure], tmp_path: Path) -> None:
    values = {Cell(2, 1): 10.0, Cell(2, 3): 20.0, Cell(7, 1): 50.0}
    grid = GridMap("A title", "tokens/s", values, {Cell(2, 1): "a", Cell(7, 1): "c"}, best=Cell(7, 1))
    save_map(grid, tmp_path / "map.png")
    assert_is_picture(tmp_path / "map.png")
    axes = figures[0].axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[10.0, 20.0], [50.0, np.nan]])
    assert axes.images[0].origin == "lower"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "7"]
    texts = {text.get_text(): (text.get_position(), text.get_color()) for text in axes.texts}
    assert texts == {"a": ((0, 0), "white"), "c": ((0, 1), "black")}
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [frame.get_xy() for frame in frames] == [(-0.5, 0.5)] * 2
    assert axes.get_title() == "A title"
    assert axes.images[0].colorbar.ax.get_ylabel() == "tokens/s"


def test_a_map_of_one_cell_without_a_best(figures: list[Figure], tmp_path: Path) -> None:
    save_map(GridMap("", "", {Cell(1, 1): 0.0}, {}), tmp_path / "map.png")
    assert_is_picture(tmp_path / "map.png")
    assert list(figures[0].axes[0].patches) == []


def test_a_scatter_picture_states_the_median_error(figures: list[Figure], tmp_path: Path) -> None:
    """Of the cells that are both predicted and measured: 10 %, 20 % and 50 % off."""
    predicted = {Cell(1, 1): 110.0, Cell(1, 2): 160.0, Cell(3, 1): 450.0, Cell(4, 4): 1.0}
    measured = {Cell(1, 1): 100.0, Cell(1, 2): 200.0, Cell(3, 1): 300.0, Cell(5, 5): 1.0}
    save_scatter(predicted, measured, tmp_path / "scatter.png")
    assert_is_picture(tmp_path / "scatter.png")
    axes = figures[0].axes[0]
    assert axes.get_title() == "3 cells, median error 20.0%"
    points = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_array_equal(points, [[100, 110], [200, 160], [300, 450]])
    assert list(axes.collections[0].get_array()) == [1, 1, 3]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("measured tokens/s", "predicted tokens/s")
    assert axes.collections[0].colorbar.ax.get_ylabel() == "exit_layer E"


def test_a_policy_s_choices_step_by_step(figures: list[Figure], tmp_path: Path) -> None:
    """Two exits, the lookup and a step without drafts: who drafted above, drafted and accepted tokens below."""
    steps = [
        ChosenStep(Cell(10, 4), 4, 1, 2),
        ChosenStep(Cell(FREE, 6), 6, 6, 7),
        ChosenStep(Cell(2, 0), 0, 0, 1),
        ChosenStep(Cell(2, 1), 1, 0, 1),
    ]
    save_choices(steps, tmp_path / "choices.png")
    assert_is_picture(tmp_path / "choices.png")
    above, below = figures[0].axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["none", "lookup", "2", "10"]
    points = {dots.get_label(): np.asarray(dots.get_offsets()).tolist() for dots in above.collections}
    assert points == {
        "drafts by an exit": [[1, 3], [4, 2]],
        "drafts by lookup": [[2, 1]],
        "no drafts": [[3, 0]],
    }
    drafted, accepted = ([bar.get_height() for bar in bars] for bars in below.containers[:2])
    assert (drafted, accepted) == ([4, 6, 0, 1], [1, 6, 0, 0])
    assert len({tuple(bar.get_edgecolor()) for bar in below.containers[0]}) == 3


def test_lines_of_a_picture_differ_in_colour_and_marker() -> None:
    styles = [line_style(index) for index in range(7)]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 7
    assert line_style(7) == styles[0]
