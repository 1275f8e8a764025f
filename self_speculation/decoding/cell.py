"""A cell of a sweep's grid and of a policy's menu: an exit layer and a draft length."""

from enum import StrEnum
from typing import NamedTuple

# The exit layer of cells whose drafts cost nothing (`decoding/lookup.py`): no layer drafts.
FREE = 0
# A policy's draft lengths.
DRAFTS = (0, 1, 2, 3, 4, 6, 8)


class Source(StrEnum):
    """Where a step's draft comes from: an early exit, a lookup of what followed before, or nowhere."""

    EXIT = "exit"
    LOOKUP = "lookup"
    NONE = "none"


class Cell(NamedTuple):
    """An exit layer E and a draft length d."""

    exit_layer: int
    num_speculations: int

    @property
    def name(self) -> str:
        """As tables write it."""
        return f"E={self.exit_layer}, d={self.num_speculations}"

    @property
    def source(self) -> Source:
        """Where its drafts come from."""
        if not self.num_speculations:
            return Source.NONE
        return Source.LOOKUP if self.exit_layer == FREE else Source.EXIT
