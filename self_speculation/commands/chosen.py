"""What to say, and to draw, of the choices of adaptive decoding in an answer."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from self_speculation.generator_base import GenerationResult
from self_speculation.measuring.choices import ChosenStep, choices, chosen_steps, sentence
from self_speculation.measuring.tables import choice_table


def what_was_chosen(result: GenerationResult, picture: Path | None, is_brief: bool) -> Iterator[str | Table]:
    """What a policy chose, if there was one, in a line or a table; and where its picture is, if one is asked for."""
    steps = chosen_steps(result.steps)
    if steps:
        found = choices(steps)
        yield sentence(found) if is_brief else choice_table(found)
    if steps and picture is not None:
        yield save_picture(steps, picture)


def save_picture(steps: list[ChosenStep], path: Path) -> str:
    """Draw what was chosen; returns what to say of it."""
    try:
        # Decoding does without matplotlib.
        from self_speculation.measuring.pictures import save_choices
    except ModuleNotFoundError as error:
        return f"The picture of what was chosen needs {error.name}: pip install 'layerskip[bench]'."
    save_choices(steps, path)
    return f"what was chosen at each step: {path}"
