"""What a policy chose over the steps of its answers, and what came of it: by source of the drafts, and by cell."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from self_speculation.decoding.cell import Cell, Source
from self_speculation.generator_base import RowStep
from self_speculation.measuring.measurements import Measurement, ratio

# How a source's steps are called in a sentence.
NAMES = {Source.EXIT: "drafts by exits", Source.LOOKUP: "drafts by lookup", Source.NONE: "no drafts"}


class ChosenStep(NamedTuple):
    """A step's cell, how many tokens were drafted and accepted, and how many it committed."""

    cell: Cell
    drafted: int
    accepted: int
    tokens: int


@dataclass(frozen=True)
class Choice:
    """The steps of one cell (E, d), or of one source, whose E and d are None: how many, and what they gave."""

    source: Source
    exit_layer: int | None
    num_speculations: int | None
    steps: int
    share_of_steps: float
    tokens_per_step: float
    # None without drafts.
    acceptance_rate: float | None

    @classmethod
    def of(cls, source: Source, cell: Cell | None, steps: Sequence[ChosenStep], num_all: int) -> "Choice":
        """Of these steps, among so many."""
        exit_layer, num_speculations = cell or (None, None)
        drafted = sum(step.drafted for step in steps)
        return cls(
            source=source,
            exit_layer=exit_layer,
            num_speculations=num_speculations,
            steps=len(steps),
            share_of_steps=ratio(len(steps), num_all),
            tokens_per_step=ratio(sum(step.tokens for step in steps), len(steps)),
            acceptance_rate=sum(step.accepted for step in steps) / drafted if drafted else None,
        )

    def as_json(self) -> dict[str, Any]:
        """The figures, by name."""
        return asdict(self)

    @property
    def text(self) -> str:
        """A source's figures in a few words."""
        return f"{NAMES[self.source]} {self.share_of_steps:.0%} of steps, {self.tokens_per_step:.2f} tokens each"


def chosen_steps(steps: Iterable[RowStep]) -> list[ChosenStep]:
    """Of an answer; nothing where no policy chose."""
    return [
        ChosenStep(Cell(*step.cell), len(step.drafted), step.accepted, len(step.tokens)) for step in steps if step.cell
    ]


def measured_steps(measurements: Iterable[Measurement]) -> list[ChosenStep]:
    """Of answers that were measured; nothing where no policy chose."""
    return [
        ChosenStep(Cell(*cell), *counts)
        for one in measurements
        for cell, *counts in zip(one.cells, one.drafted, one.accepted, one.committed, strict=False)
    ]


def choices(steps: Sequence[ChosenStep]) -> list[Choice]:
    """Each source that was chosen, and behind it its cells."""
    found = []
    for source in Source:
        own = [step for step in steps if step.cell.source == source]
        if own:
            found.append(Choice.of(source, None, own, len(steps)))
        # Without drafts an exit means nothing.
        for cell in sorted({step.cell for step in own if source != Source.NONE}):
            found.append(Choice.of(source, cell, [step for step in own if step.cell == cell], len(steps)))
    return found


def sentence(found: Sequence[Choice]) -> str:
    """The sources of an answer's drafts, in one line."""
    return " · ".join(choice.text for choice in found if choice.num_speculations is None)
