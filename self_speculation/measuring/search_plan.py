"""How a sweep looks for the best cell, and how often anything is measured; known without loading anything."""

from dataclasses import dataclass
from typing import Literal

# More rounds say no more, and each is planned beforehand.
MOST_REPEATS = 10_000

Mode = Literal["grid", "fast", "both"]


@dataclass(frozen=True)
class SearchPlan:
    """How to look: the mode, and how many cells and answers are looked at how often.

    `finalists` are the best cells so far, measured again `repeats` times, interleaved, to choose one. `profile_samples`
    are the answers that a prediction looks at. In mode `both` the two modes' choices meet in `duel_repeats` rounds.
    While the best cell has the greatest draft length, some longer ones are looked at, `draft_step` apart; None if not.
    """

    mode: Mode
    finalists: int
    repeats: int
    profile_samples: int
    duel_repeats: int
    draft_step: int | None = None
