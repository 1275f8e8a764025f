"""What a policy may choose from, and what it may expect, by what was measured of exits: for `layerskip.json`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from self_speculation.decoding.cell import Cell

# How much of the best cell's speed an exit's own best cell must have, and how many such exits are named.
NEAR, MOST_EXITS = 0.85, 4
# Shares are rounded to a thousandth.
ALPHAS = np.linspace(0, 1, 1001)


def exit_menu(speeds: Mapping[Cell, float], rates: Mapping[Cell, float]) -> dict[str, Any]:
    """Each exit's acceptance, and the exits to choose from, if there is another whose speed is near the best one's.

    `speeds` are tokens a second of cells, `rates` the shares of their drafts that were accepted.
    """
    fastest: dict[int, float] = {}
    for cell, speed in speeds.items():
        fastest[cell.exit_layer] = max(speed, fastest.get(cell.exit_layer, 0.0))
    ranked = sorted(fastest, key=lambda exit_layer: -fastest[exit_layer])[:MOST_EXITS]
    near = sorted(exit_layer for exit_layer in ranked if fastest[exit_layer] >= NEAR * fastest[ranked[0]])
    return ({"exit_layers": near} if len(near) > 1 else {}) | {"acceptance": acceptance(rates)}


def acceptance(rates: Mapping[Cell, float]) -> dict[int, float]:
    """By exit, the chance that a draft behind accepted ones is accepted, from its shortest drafts."""
    shortest = {cell.exit_layer: cell for cell in sorted(rates, reverse=True) if cell.num_speculations}
    return {exit_layer: one_draft(rates[cell], cell.num_speculations) for exit_layer, cell in sorted(shortest.items())}


def one_draft(rate: float, num_speculations: int) -> float:
    """α, where the share of d drafts that were accepted is (α + α² + … + α^d) / d."""
    powers = np.arange(1, num_speculations + 1)
    shares = (ALPHAS[:, None] ** powers).mean(1)
    return round(float(np.interp(rate, shares, ALPHAS)), 3)
