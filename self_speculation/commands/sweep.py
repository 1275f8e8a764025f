"""Find the exit layer and the number of speculations that decode fastest: by the whole grid, or by a prediction.

python sweep.py --mode fast --sample False --num_samples 8 --max_steps 128
torchrun sweep.py --model facebook/layerskip-llama3.2-1B --dataset human_eval --num_samples 10 --sample False

`grid` measures every cell. `fast` reads from one pass over a few answers how many drafts every exit layer would have
had accepted, times the single passes, predicts every cell, and measures the best few. `both` does the two and compares
them. All end with the best cells measured again, interleaved with autoregressive decoding, and a command to paste.
"""

import dataclasses
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import RECOMMENDATION_FILE, ModelArguments, load
from self_speculation.measuring.contestants import MOST_REPEATS
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.sweep import Findings, Mode, SearchPlan, Sweep, search
from self_speculation.measuring.tables import finalist_table
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import Settings, by_flag, flag_of, setting, shown
from self_speculation.writing import write_text

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
    if int(os.environ.get("RANK", "0")) > 0:
        return
    arguments, model_arguments, dataset, config, output = groups = parse(*GROUPS, description=__doc__)
    transformers.utils.logging.set_verbosity_error()
    if arguments.mode != "grid" and config.generation_strategy != "self_speculative":
        raise ValueError(f"--mode {arguments.mode} predicts self_speculative only, not {config.generation_strategy}.")
    if arguments.save and not Path(model_arguments.model).is_dir():
        raise ValueError(f"--save True: --model {model_arguments.model} is not a folder, in which to keep a choice.")
    settings = by_flag(*groups)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load(model_arguments)
    examples = as_chats(examples, tokenizer, dataset.chat_template)
    cells = arguments.cells(model.config.num_hidden_layers)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    examples = shorten(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
    sweep = Sweep(model, tokenizer, config, [example.prompt for example in examples])
    log = RunLog(Path(output.output_dir), "sweep")
    log.begin(settings, arguments.resume)
    found = search(sweep, cells, log, arguments.plan())
    surrounding = surroundings(model.device) | {"dtype": str(model.dtype)}
    log.write({"arguments": settings, "surroundings": surrounding} | found.document())
    pictures = found.save_pictures(log.folder)
    Console(highlight=False).print(finalist_table(found.final))
    print(f"{log.document} has all figures; pictures: {', '.join(map(str, pictures))}")
    for sentence in advice(found, found.cells):
        print(sentence)
    if arguments.save and found.is_faster:
        print(f"{save(Path(model_arguments.model), found.best, config.draft_vocab)} recommends {found.best.name}.")
    print(command(model_arguments, config, found.best if found.is_faster else None))


def advice(found: Findings, cells: list[Cell]) -> Iterator[str]:
    """What a user should know of the best cell before taking it."""
    best, speedup = found.best, found.final[found.best].speedup.speedup
    if not found.is_faster:
        yield f"Autoregressive decoding is faster here: the best cell, {best.name}, has {speedup:.2f} × its speed."
        return
    for flag, axis in zip(Cell._fields, zip(*cells, strict=True), strict=True):
        value = getattr(best, flag)
        if value == max(axis) > min(axis):
            yield f"The best {flag}, {value}, is the greatest that was looked at: --{flag}_last may be too small."


def save(folder: Path, best: Cell, draft_vocab: int | None) -> Path:
    """Recommend a cell beside a model's weights; what else the file says stays. Returns the file.

    Raises:
        ValueError: the file there is no JSON object.
    """
    path = folder / RECOMMENDATION_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise ValueError(f"--save True: {path} is not a JSON object.") from error
    if not isinstance(kept, dict):
        raise ValueError(f"--save True: {path} is not a JSON object.")
    kept.pop("draft_vocab", None)
    found = best._asdict() | ({} if draft_vocab is None else {"draft_vocab": draft_vocab})
    write_text(path, json.dumps(kept | found, indent=2) + "\n")
    return path


def command(model_arguments: ModelArguments, config: SweepConfig, best: Cell | None) -> str:
    """The best cell, or autoregressive decoding, as a command to paste, with what else is not at its default."""
    chosen: dict[str, Any] = {"generation_strategy": "autoregressive"}
    if best is not None:
        chosen = {"generation_strategy": config.generation_strategy} | best._asdict()
    words = ["python", "generate.py", *flags(model_arguments)]
    words += [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    return shlex.join(words + flags(dataclasses.replace(config, generation_strategy=SweepConfig.generation_strategy)))


def flags(arguments: Any) -> list[str]:
    """The flags of a dataclass that are not at their defaults."""
    words = []
    for item in dataclasses.fields(arguments):
        value = shown(item, getattr(arguments, item.name))
        if value != item.default:
            words += [f"--{flag_of(item)}", *map(str, value if isinstance(value, list) else [value])]
    return words


if __name__ == "__main__":
    main()
