"""What a policy may choose from, by literal tables."""

import pytest

from self_speculation.decoding.cell import Cell
from self_speculation.measuring.exit_menu import acceptance, exit_menu, one_draft


@pytest.mark.parametrize(
    ("speeds", "near"),
    [
        ({1: 50, 2: 100, 3: 90, 4: 84}, [2, 3]),
        ({1: 50, 2: 100}, None),
        ({1: 86, 2: 100, 3: 90, 4: 95, 5: 87}, [2, 3, 4, 5]),
    ],
)
def test_exits_near_the_best_are_named(speeds: dict[int, float], near: list[int] | None) -> None:
    """By their best cells, four at most; none where there is nothing to choose."""
    cells = {Cell(exit_layer, 2): speed for exit_layer, speed in speeds.items()}
    slower = {Cell(exit_layer, 8): 1.0 for exit_layer in speeds}
    menu = exit_menu(slower | cells, dict.fromkeys(cells, 0.5))
    assert menu.get("exit_layers") == near
    assert menu["acceptance"].keys() == speeds.keys()


def test_acceptance_is_that_of_the_shortest_drafts() -> None:
    rates = {Cell(2, 4): 0.1, Cell(2, 1): 0.8, Cell(1, 2): 0.375, Cell(3, 0): 0.0}
    assert acceptance(rates) == {1: 0.5, 2: 0.8}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 8])
def test_the_chance_of_one_draft(alpha: float, drafts: int) -> None:
    assert one_draft(sum(alpha**n for n in range(1, drafts + 1)) / drafts, drafts) == pytest.approx(alpha, abs=1e-3)
