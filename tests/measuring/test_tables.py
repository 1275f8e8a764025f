"""What tables say beside their figures."""

from types import SimpleNamespace

import pytest

from self_speculation.measuring.figures import SpeedUp, Spread
from self_speculation.measuring.tables import above_all, has_spread, with_spread


def speedup(*rounds: float) -> SpeedUp:
    spread = Spread.of(rounds)
    return SpeedUp(sum(rounds) / len(rounds), spread, 1.0, 1.0, spread)


def test_one_round_has_no_spread() -> None:
    assert with_spread(speedup(1.5)) == "1.50"
    assert with_spread(speedup(1.0, 2.0)) == "1.50 (1.00–2.00)"
    assert not has_spread([speedup(1.5), speedup(1.0)])
    assert has_spread([speedup(1.0, 1.0), speedup(1.0, 2.0)])


@pytest.mark.parametrize(
    ("bandwidth", "ideal", "named"),
    [
        (None, None, []),
        (1.0, 1.0, []),
        (1.01, 0.9, ["bandwidth"]),
        (0.9, 1.2, ["ideal"]),
        (2, 2, ["bandwidth", "ideal"]),
    ],
)
def test_more_than_all_is_explained(bandwidth: float | None, ideal: float | None, named: list[str]) -> None:
    figures = [SimpleNamespace(bandwidth_share=bandwidth, share_of_ideal=ideal)]
    found = list(above_all(figures))
    assert len(found) == len(named)
    for sentence, name in zip(found, named, strict=True):
        assert sentence.startswith(f"More than 100 % of the {name}: ")
