"""A cell of a sweep's grid and of a policy's menu: an exit layer and a draft length."""

from typing import NamedTuple


class Cell(NamedTuple):
    """An exit layer E and a draft length d."""

    exit_layer: int
    num_speculations: int

    @property
    def name(self) -> str:
        """As tables write it."""
        return f"E={self.exit_layer}, d={self.num_speculations}"
