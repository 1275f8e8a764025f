"""Find the exit layer and the number of speculations that decode fastest: by the whole grid, or by a prediction.

python sweep.py --mode fast --sample False --num_samples 8 --max_steps 128
torchrun sweep.py --model facebook/layerskip-llama3.2-1B --dataset human_eval --num_samples 10 --sample False

`grid` measures every cell. `fast` reads from one pass over a few answers how many drafts every exit layer would have
had accepted, times the single passes, predicts every cell, and measures the best few. `both` does the two and compares
them. All end with the best cells measured again, interleaved with autoregressive decoding, and a command to paste.
"""

import itertools
import os
from dataclasses import dataclass

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.late import late
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.config import MOST_SPECULATIONS, GenerationConfig
from self_speculation.ending import one_sentence_errors
from self_speculation.measuring.search_plan import MOST_REPEATS, Mode, SearchPlan
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.settings import Settings, setting

# The greatest draft length to begin with, where none is given.
MOST_DRAFTS = 6


@dataclass
class SweepArguments(Settings):
    """Which cells, and how to look for the best."""

    exit_layer_first: int = setting(1, help="Least exit layer.", at_least=1)
    exit_layer_last: int | None = setting(
        None, help="Greatest exit layer. Default: all but the last of the model's layers.", at_least=1
    )
    exit_layer_step: int = setting(1, help="Step between exit layers.", at_least=1)
    num_speculations_first: int = setting(1, help="Least draft length.", at_least=1, at_most=MOST_SPECULATIONS)
    num_speculations_last: int | None = setting(
        None,
        help=f"Greatest draft length. Default: {MOST_DRAFTS}, and more while they are best.",
        at_least=1,
        at_most=MOST_SPECULATIONS,
    )
    num_speculations_step: int = setting(1, help="Step between draft lengths.", at_least=1)
    mode: Mode = setting("grid", help="Measure every cell; predict all and measure the best few; or both.")
    finalists: int = setting(
        3, help="The best cells so far that are measured again, interleaved, to choose one.", at_least=1
    )
    repeats: int = setting(2, help="Rounds of that measurement.", at_least=1, at_most=MOST_REPEATS)
    profile_samples: int = setting(
        4, help="Answers that the prediction looks at, and on which its finalists are measured.", at_least=1
    )
    duel_repeats: int = setting(
        10,
        help="Rounds of the two modes' choices against each other, in mode both.",
        at_least=1,
        at_most=MOST_REPEATS,
    )
    save: bool = setting(False, help="Write the choice into layerskip.json in --model's folder, if it is faster.")
    resume: bool = setting(False, help="Go on with the sweep in --output_dir that was interrupted.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_speculations_last is not None and self.num_speculations_last < self.num_speculations_first:
            raise ValueError("--num_speculations_last must not be less than --num_speculations_first.")

    def plan(self) -> SearchPlan:
        """How to look."""
        step = self.num_speculations_step if self.num_speculations_last is None else None
        return SearchPlan(self.mode, self.finalists, self.repeats, self.profile_samples, self.duel_repeats, step)

    def cells(self, num_layers: int) -> list[Cell]:
        """Every (E, d) of the grid for a model of so many layers."""
        last = num_layers - 1 if self.exit_layer_last is None else self.exit_layer_last
        if last < self.exit_layer_first:
            raise ValueError(
                f"--exit_layer_last {last} must not be less than --exit_layer_first {self.exit_layer_first}."
            )
        if last > num_layers:
            raise ValueError(f"--exit_layer_last {last} is more than the model's {num_layers} layers.")
        exit_layers = range(self.exit_layer_first, last + 1, self.exit_layer_step)
        most = self.num_speculations_last or max(MOST_DRAFTS, self.num_speculations_first)
        drafts = range(self.num_speculations_first, most + 1, self.num_speculations_step)
        return list(itertools.starmap(Cell, itertools.product(exit_layers, drafts)))


@dataclass
class SweepConfig(GenerationConfig):
    """How to decode; the sweep sets exit layer and draft length."""

    generation_strategy: str = setting(
        "self_speculative", help="self_speculative, or transformers' own hf_early_exit (grid only)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generation_strategy not in ("self_speculative", "hf_early_exit"):
            raise ValueError(
                f"--generation_strategy must be self_speculative or hf_early_exit, not {self.generation_strategy!r}."
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_steps must be at least 1, not {self.max_new_tokens}: no tokens have no speed.")
        for name in ("exit_layer", "num_speculations"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name}: the sweep takes --{name}_first and --{name}_last.")


# The flags, in the order in which `main` takes them.
GROUPS = (SweepArguments, ModelArguments, DatasetArguments, SweepConfig, OutputArguments)


@one_sentence_errors(
    go_on="What was measured is kept; the same command with --resume True goes on.",
    lower="--max_steps or --max_prompt_tokens",
)
def main() -> None:
    """Look for the best cell as the flags ask; under `torchrun` the first process does."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    groups = parse(*GROUPS, description=__doc__)
    late("sweeping").look_for_the_best(*groups)


if __name__ == "__main__":
    main()
