"""Find the exit layer and the number of speculations that decode fastest: by the whole grid, or by a prediction.

python sweep.py --mode fast --sample False --num_samples 8 --max_steps 128
torchrun sweep.py --model facebook/layerskip-llama3.2-1B --dataset human_eval --num_samples 10 --sample False

`grid` measures every cell. `fast` reads from one pass over a few answers how many drafts every exit layer would have
had accepted, times the single passes, predicts every cell, and measures the best few. `both` does the two and compares
them. All end with the best cells measured again, interleaved with autoregressive decoding, and a command to paste.
"""

import csv
import dataclasses
import itertools
import os
import shlex
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.commands.flags import OutputArguments, one_sentence_errors, parse
from self_speculation.generator_base import GenerationConfig, check_exit_layer
from self_speculation.loading import ModelArguments, load
from self_speculation.measuring.figures import Contestant, Round, interleaved, speedup, totals
from self_speculation.measuring.pictures import GridMap, save_map, save_scatter
from self_speculation.measuring.prediction import Prediction, measure_passes, predict, profile
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import by_flag

Cell = tuple[int, int]
COLUMNS = (
    "exit_layer",
    "num_speculations",
    "tokens_per_second",
    "decode_tokens_per_second",
    "speedup",
    "acceptance_rate",
    "tokens_per_step",
)
TABLE_COLUMNS = ("E", "d", "tokens/s", "decode\ntokens/s", "accepted", "tokens\n/step", "speed-up\n(least–greatest)")
AUTOREGRESSIVE = "autoregressive"


@dataclass
class SweepArguments:
    """Which cells, and how to look for the best."""

    exit_layer_first: int = field(default=1, metadata={"help": "Least exit layer."})
    exit_layer_last: int | None = field(
        default=None, metadata={"help": "Greatest exit layer. Default: all but the last of the model's layers."}
    )
    exit_layer_step: int = field(default=1, metadata={"help": "Step between exit layers."})
    num_speculations_first: int = field(default=1, metadata={"help": "Least draft length."})
    num_speculations_last: int = field(default=6, metadata={"help": "Greatest draft length."})
    num_speculations_step: int = field(default=1, metadata={"help": "Step between draft lengths."})
    mode: Literal["grid", "fast", "both"] = field(
        default="grid", metadata={"help": "Measure every cell; predict all and measure the best few; or both."}
    )
    finalists: int = field(
        default=3, metadata={"help": "The best cells so far that are measured again, interleaved, to choose one."}
    )
    repeats: int = field(default=2, metadata={"help": "Rounds of that measurement."})
    profile_samples: int = field(
        default=4, metadata={"help": "Answers that the prediction looks at, and on which its finalists are measured."}
    )
    duel_repeats: int = field(
        default=10, metadata={"help": "Rounds of the two modes' choices against each other, in mode both."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on with the sweep in --output_dir that was interrupted."})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}.")
        if self.num_speculations_last < self.num_speculations_first:
            raise ValueError("--num_speculations_last must not be less than --num_speculations_first.")

    def cells(self, model: LlamaForCausalLM) -> list[Cell]:
        """Every (E, d) of the grid."""
        last = model.config.num_hidden_layers - 1 if self.exit_layer_last is None else self.exit_layer_last
        if last < self.exit_layer_first:
            raise ValueError(
                f"--exit_layer_last {last} must not be less than --exit_layer_first {self.exit_layer_first}."
            )
        if last > model.config.num_hidden_layers:
            raise ValueError(
                f"--exit_layer_last {last} is more than the model's {model.config.num_hidden_layers} layers."
            )
        exit_layers = range(self.exit_layer_first, last + 1, self.exit_layer_step)
        drafts = range(self.num_speculations_first, self.num_speculations_last + 1, self.num_speculations_step)
        return list(itertools.product(exit_layers, drafts))


@dataclass
class SweepConfig(GenerationConfig):
    """How to decode; the sweep sets exit layer and draft length."""

    generation_strategy: str = field(
        default="self_speculative",
        metadata={"help": "self_speculative, or transformers' own hf_early_exit (grid only)."},
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


@one_sentence_errors()
def main() -> None:
    if int(os.environ.get("RANK", "0")) > 0:
        return
    arguments, model_arguments, dataset, config, output = groups = parse(
        SweepArguments, ModelArguments, DatasetArguments, SweepConfig, OutputArguments, description=__doc__
    )
    transformers.utils.logging.set_verbosity_error()
    if arguments.mode != "grid" and config.generation_strategy != "self_speculative":
        raise ValueError(f"--mode {arguments.mode} predicts self_speculative only, not {config.generation_strategy}.")
    settings = by_flag(*groups)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load(model_arguments)
    cells = arguments.cells(model)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    examples = shorten(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
    sweep = Sweep(model, tokenizer, config, [example.prompt for example in examples])
    log = RunLog(Path(output.output_dir), "sweep")
    log.begin(settings, arguments.resume)
    found = search(sweep, cells, log, arguments)
    log.write(
        {"arguments": settings, "surroundings": surroundings(model.device) | {"dtype": str(model.dtype)}}
        | found.document()
    )
    pictures = found.save_pictures(log.folder)
    console = Console(highlight=False)
    console.print(found.table())
    print(f"{log.document} has all figures; pictures: {', '.join(map(str, pictures))}")
    print(command(model_arguments, config, found.best))


@dataclass
class Findings:
    """What a sweep found: measured and predicted cells, the best of them measured again, and how long each part took.

    `final` has the best first; in mode `both` these are the choices of the two modes.
    """

    final: dict[Cell, dict[str, Any]]
    grid: dict[Cell | None, dict[str, Any]] = field(default_factory=dict)
    predicted: dict[Cell, Prediction] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    choices: dict[str, Cell] = field(default_factory=dict)

    @property
    def best(self) -> Cell:
        """The cell to use."""
        return next(iter(self.final))

    def document(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "best": {"exit_layer": self.best[0], "num_speculations": self.best[1]} | self.final[self.best],
            "choices": self.choices,
            "seconds": self.seconds,
            "final": [{"cell": cell} | figures for cell, figures in self.final.items()],
            "grid": list(self.grid.values()),
            "predicted": [asdict(one) for one in self.predicted.values()],
        }

    def table(self) -> Table:
        """The cells that were measured again."""
        table = Table(box=SIMPLE_HEAD, padding=0)
        for name in TABLE_COLUMNS:
            table.add_column(name, justify="right")
        for (exit_layer, drafts), figures in self.final.items():
            least, most = figures["speedup_spread"]
            table.add_row(
                *map(str, (exit_layer, drafts)),
                f"{figures['tokens_per_second']:.1f}",
                f"{figures['decode_tokens_per_second']:.1f}",
                f"{figures['acceptance_rate'] or 0:.1%}",
                f"{figures['tokens_per_step']:.2f}",
                f"{figures['speedup']:.2f} ({least:.2f}–{most:.2f})",
            )
        return table

    def save_pictures(self, folder: Path) -> list[Path]:
        """Maps of speed and acceptance over the grid, and predicted against measured speed where there are both."""
        cells = {cell: row for cell, row in self.grid.items() if cell} or {
            cell: asdict(one) for cell, one in self.predicted.items()
        }
        kind = "measured" if self.grid else "predicted"
        best = self.final[self.best]
        baseline = self.grid[None]["tokens_per_second"] if self.grid else best["tokens_per_second"] / best["speedup"]
        speed = {cell: row["tokens_per_second"] for cell, row in cells.items()}
        rates = {cell: row["acceptance_rate"] or 0.0 for cell, row in cells.items()}
        labels = {cell: f"{value / baseline:.2f}×" for cell, value in speed.items()}
        pictures = [folder / "sweep_speed.png", folder / "sweep_acceptance.png"]
        title = f"Tokens/s, {kind}; in the cells: over autoregressive decoding"
        save_map(GridMap(title, speed, labels, self.best), pictures[0])
        labels = {cell: f"{value:.0%}" for cell, value in rates.items()}
        save_map(GridMap(f"Acceptance rate, {kind}", rates, labels, self.best), pictures[1])
        if self.grid and self.predicted:
            pictures.append(folder / "sweep_prediction.png")
            predicted = {cell: one.tokens_per_second for cell, one in self.predicted.items()}
            save_scatter(predicted, speed, pictures[2])
        return pictures


def search(sweep: "Sweep", cells: list[Cell], log: RunLog, arguments: SweepArguments) -> Findings:
    """Look for the best cell as the mode says."""
    fast = fast_search(sweep, cells, arguments) if arguments.mode in ("fast", "both") else None
    if arguments.mode == "fast":
        return fast
    rows = sweep.grid(cells, log)
    ranked = sorted(cells, key=lambda cell: -rows[cell]["tokens_per_second"])
    seconds = {"grid": sum(row["wall_seconds"] for row in rows.values())}
    if fast is None:
        final = sweep.final(ranked[: arguments.finalists], len(sweep.prompts), arguments.repeats)
        return Findings(final, rows, seconds=seconds, choices={"grid": ranked[0]})
    choices = {"fast": fast.best, "grid": ranked[0]}
    final = sweep.final(list(dict.fromkeys(choices.values())), len(sweep.prompts), arguments.duel_repeats)
    return Findings(final, rows, fast.predicted, fast.seconds | seconds, choices)


def fast_search(sweep: "Sweep", cells: list[Cell], arguments: SweepArguments) -> Findings:
    """Predict every cell and measure the best few."""
    start = time.perf_counter()
    predicted = {
        (one.exit_layer, one.num_speculations): one for one in sweep.predictions(cells, arguments.profile_samples)
    }
    ranked = sorted(cells, key=lambda cell: -predicted[cell].tokens_per_second)
    final = sweep.final(ranked[: arguments.finalists], arguments.profile_samples, arguments.repeats)
    seconds = {"fast": time.perf_counter() - start}
    return Findings(final, predicted=predicted, seconds=seconds, choices={"fast": next(iter(final))})


def command(model_arguments: ModelArguments, config: SweepConfig, best: Cell) -> str:
    """The best cell as a command to paste, with whatever else was not left at its default."""
    chosen = {"generation_strategy": config.generation_strategy, "exit_layer": best[0], "num_speculations": best[1]}
    words = ["python", "generate.py", *flags(model_arguments)]
    words += [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    return shlex.join(words + flags(dataclasses.replace(config, generation_strategy=SweepConfig.generation_strategy)))


def flags(arguments: Any) -> list[str]:
    """The flags of a dataclass that are not at their defaults."""
    words = []
    for item in dataclasses.fields(arguments):
        value = getattr(arguments, item.name)
        if value != item.default:
            words += [f"--{item.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


class Sweep:
    """A model and its prompts, measured at any (E, d); the autoregressive baseline is the cell None."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, prompts: list[str]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config.generation()
        self.baseline = self.contestant(None)
        self.prompts = [self.baseline.generator.encode(prompt) for prompt in prompts]

    def contestant(self, cell: Cell | None) -> Contestant:
        """A cell's strategy."""
        settings: dict[str, Any] = {"generation_strategy": AUTOREGRESSIVE}
        if cell is not None:
            settings = {"exit_layer": cell[0], "num_speculations": cell[1]}
        return Contestant.of(self.model, self.tokenizer, dataclasses.replace(self.config, **settings))

    def grid(self, cells: list[Cell], log: RunLog) -> dict[Cell | None, dict[str, Any]]:
        """Every cell's figures over all prompts, the baseline's first; those in the log are not measured again."""
        rows = {tuple(line["cell"]) if line["cell"] else None: line for line in log.lines()}
        with GridTable(log.folder / "sweep.csv", rows) as table:
            todo = [cell for cell in (None, *cells) if cell not in rows]
            progress = tqdm(todo, desc="Measuring cells", unit="cell", initial=len(rows), total=len(cells) + 1)
            for cell in progress:
                rows[cell] = {"cell": cell, **self._measure(cell)}
                log.append(rows[cell])
                table.add(cell, rows[cell])
                progress.set_postfix_str(f"best {max(row['tokens_per_second'] for row in rows.values()):.1f} tokens/s")
        return rows

    def _measure(self, cell: Cell | None) -> dict[str, Any]:
        start = time.perf_counter()
        contestant = self.contestant(cell)
        contestant.warm_up(self.prompts[:1])
        figures = totals([Round([answer for prompt in self.prompts for answer in contestant.run([prompt])])])
        return figures | {"wall_seconds": time.perf_counter() - start}

    def predictions(self, cells: list[Cell], num_samples: int) -> list[Prediction]:
        """Every cell's predicted figures, from the full model's answers to the first prompts."""
        exit_layers = sorted({exit_layer for exit_layer, _ in cells})
        for exit_layer in exit_layers:
            check_exit_layer(exit_layer, self.model)
        self.baseline.warm_up(self.prompts[:1])
        generator, config = self.baseline.generator, self.baseline.config
        prompts = tqdm(self.prompts[:num_samples], desc="Looking at answers", unit="answer")
        profiles = [profile(generator, config, prompt, exit_layers) for prompt in prompts]
        middle = self.prompts[0] + profiles[0].result.tokens[: len(profiles[0].result.tokens) // 2]
        costs = measure_passes(self.model, generator.request([middle], config), cells)
        return predict(profiles, cells, costs)

    def final(self, cells: list[Cell], num_samples: int, repeats: int) -> dict[Cell, dict[str, Any]]:
        """The cells and the baseline, interleaved over the first prompts: figures and speed-up, best first."""
        contestants = {cell: self.contestant(cell) for cell in (None, *cells)}
        rounds = {cell: [Round() for _ in range(repeats)] for cell in contestants}
        for contestant in contestants.values():
            contestant.warm_up(self.prompts[:1])
        turns = list(itertools.product(range(repeats), self.prompts[:num_samples]))
        for turn, (index, prompt) in enumerate(tqdm(turns, desc="Measuring the best", unit="sample")):
            for cell, answers in interleaved(contestants, [prompt], turn).items():
                rounds[cell][index].measurements += answers
        figures = {cell: totals(rounds[cell]) | speedup(rounds[cell], rounds[None]) for cell in cells}
        return dict(sorted(figures.items(), key=lambda item: -item[1]["speedup"]))


class GridTable:
    """The grid as CSV, a row appended as soon as its cell has been measured."""

    def __init__(self, path: Path, rows: dict[Cell | None, dict[str, Any]]) -> None:
        self.path = path
        self.rows = rows

    def __enter__(self) -> "GridTable":
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)
        for cell, row in self.rows.items():
            self.add(cell, row)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, cell: Cell | None, row: dict[str, Any]) -> None:
        """One cell; the baseline has neither exit layer nor draft length."""
        values = row | {"speedup": row["tokens_per_second"] / self.rows[None]["tokens_per_second"]}
        self.writer.writerow([*(cell or ("", "")), *(values[name] for name in COLUMNS[2:])])
        self.file.flush()


if __name__ == "__main__":
    main()
