"""What the single passes of a step cost, and so what steps cost."""

from dataclasses import dataclass

from self_speculation.decoding.cell import Cell


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of single passes of a batch: a token's draft at E, and the verification at (E, d)."""

    draft: dict[int, float]
    verification: dict[Cell, float]

    def seconds(self, cell: Cell, steps: float, drafted: float) -> float:
        """What so many steps and drafts take at an (E, d); at d = 0 there are no drafts."""
        return steps * self.verification[cell] + (drafted * self.draft[cell.exit_layer] if drafted else 0)
