"""Looking for the fastest (E, d): by measuring the whole grid, or by predicting it and measuring the best few."""

import csv
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.generator_base import GenerationConfig, check_exit_layer
from self_speculation.measuring.contestants import Contestant, interleaved
from self_speculation.measuring.exit_menu import exit_menu
from self_speculation.measuring.figures import Comparison, Totals
from self_speculation.measuring.line_up import make_contestant
from self_speculation.measuring.measurements import Round
from self_speculation.measuring.passes import measure_passes
from self_speculation.measuring.pictures import GridMap, save_map, save_scatter
from self_speculation.measuring.prediction import Prediction, predict, profile
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.search_plan import SearchPlan

COLUMNS = (
    "exit_layer",
    "num_speculations",
    "tokens_per_second",
    "decode_tokens_per_second",
    "speedup",
    "acceptance_rate",
    "tokens_per_step",
)
AUTOREGRESSIVE = "autoregressive"
# How often the grid is widened, and by how many draft lengths, while the best cell lies at its end.
WIDENINGS, MORE_DRAFTS = 3, 2


@dataclass(frozen=True)
class GridRow:
    """A measured cell, None being the autoregressive baseline, and how long it took to measure."""

    cell: Cell | None
    totals: Totals
    wall_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """End to end."""
        return self.totals.times.tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """A line of the log."""
        return {"cell": self.cell} | self.totals.as_json() | {"wall_seconds": self.wall_seconds}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "GridRow":
        """What `as_json` made."""
        cell = Cell(*line["cell"]) if line["cell"] else None
        return cls(cell, Totals.from_json(line), line["wall_seconds"])


Grid = dict[Cell | None, GridRow]


@dataclass
class Findings:
    """What a sweep found: measured and predicted cells, the best of them measured again, and how long each part took.

    `final` has the best first; in mode `both` these are the choices of the two modes.
    """

    final: dict[Cell, Comparison]
    grid: Grid = field(default_factory=dict)
    predicted: dict[Cell, Prediction] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    choices: dict[str, Cell] = field(default_factory=dict)

    @property
    def best(self) -> Cell:
        """The cell to use."""
        return next(iter(self.final))

    @property
    def cells(self) -> list[Cell]:
        """All cells that were looked at."""
        return list(dict.fromkeys([*(cell for cell in self.grid if cell), *self.predicted, *self.final]))

    @property
    def is_faster(self) -> bool:
        """Whether it is faster than autoregressive decoding."""
        return self.final[self.best].speedup.speedup > 1

    @property
    def menu(self) -> dict[str, Any]:
        """What a policy may choose from, and expect of exits."""
        return exit_menu(self._speeds(), self._rates())

    def document(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "best": self.best._asdict() | self.final[self.best].as_json(),
            "choices": self.choices,
            "seconds": self.seconds,
            "final": [{"cell": cell} | own.as_json() for cell, own in self.final.items()],
            "grid": [row.as_json() for row in self.grid.values()],
            "predicted": [asdict(one) for one in self.predicted.values()],
        }

    def save_pictures(self, folder: Path) -> list[Path]:
        """Maps of speed and acceptance over the grid, and predicted against measured speed where there are both."""
        kind = "measured" if self.grid else "predicted"
        baseline = self._baseline()
        speed, rates = self._speeds(), self._rates()
        labels = {cell: f"{value / baseline:.2f}×" for cell, value in speed.items()}
        pictures = [folder / "sweep_speed.png", folder / "sweep_acceptance.png"]
        title = f"Tokens/s, {kind}; in the cells: over autoregressive decoding"
        save_map(GridMap(title, "tokens/s", speed, labels, self.best), pictures[0])
        labels = {cell: f"{value:.0%}" for cell, value in rates.items()}
        save_map(GridMap(f"Acceptance rate, {kind}", "accepted / drafted", rates, labels, self.best), pictures[1])
        if self.grid and self.predicted:
            pictures.append(folder / "sweep_prediction.png")
            predicted = {cell: one.tokens_per_second for cell, one in self.predicted.items()}
            save_scatter(predicted, speed, pictures[2])
        return pictures

    def _baseline(self) -> float:
        """Tokens a second of autoregressive decoding."""
        if self.grid:
            return self.grid[None].tokens_per_second
        best = self.final[self.best]
        return best.totals.times.tokens_per_second / best.speedup.speedup

    def _speeds(self) -> dict[Cell, float]:
        """Tokens a second of every cell, measured or else predicted."""
        found = {cell: row.tokens_per_second for cell, row in self.grid.items() if cell}
        return found or {cell: one.tokens_per_second for cell, one in self.predicted.items()}

    def _rates(self) -> dict[Cell, float]:
        """Every cell's acceptance rate, measured or else predicted."""
        found = {cell: row.totals.counts.acceptance_rate or 0.0 for cell, row in self.grid.items() if cell}
        return found or {cell: one.acceptance_rate for cell, one in self.predicted.items()}


class Sweep:
    """A model and its prompts, measured at any (E, d); the autoregressive baseline is the cell None."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, prompts: list[str]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config.generation()
        self.baseline = self.contestant(None)
        self.prompts = [self.baseline.generator.encode(prompt) for prompt in prompts]

    def contestant(self, cell: Cell | None) -> Contestant:
        """A cell's strategy."""
        settings = {"generation_strategy": AUTOREGRESSIVE} if cell is None else cell._asdict()
        return make_contestant(self.model, self.tokenizer, dataclasses.replace(self.config, **settings))

    def grid(self, cells: Sequence[Cell], log: RunLog) -> Grid:
        """Every cell over all prompts, the baseline's first; those in the log are not measured again."""
        rows = {row.cell: row for row in log.read(GridRow.from_json)}
        with GridTable(log.folder / "sweep.csv", rows) as table:
            todo = [cell for cell in (None, *cells) if cell not in rows]
            num_cells = len(rows) + len(todo)
            progress = tqdm(todo, desc="Measuring cells", unit="cell", initial=len(rows), total=num_cells)
            for cell in progress:
                rows[cell] = self.measure(cell)
                log.append(rows[cell].as_json())
                table.add(rows[cell])
                progress.set_postfix_str(f"best {max(row.tokens_per_second for row in rows.values()):.1f} tokens/s")
        return rows

    def measure(self, cell: Cell | None) -> GridRow:
        """One cell over all prompts."""
        start = time.perf_counter()
        contestant = self.contestant(cell)
        contestant.warm_up(self.prompts[:1])
        one = Round([answer for prompt in self.prompts for answer in contestant.run([prompt])])
        return GridRow(cell, Totals.of([one]), time.perf_counter() - start)

    def predictions(self, cells: Sequence[Cell], num_samples: int) -> dict[Cell, Prediction]:
        """Every cell's predicted figures, from the full model's answers to the first prompts."""
        exit_layers = sorted({cell.exit_layer for cell in cells})
        for exit_layer in exit_layers:
            check_exit_layer(exit_layer, self.model)
        self.baseline.warm_up(self.prompts[:1])
        generator, config = self.baseline.generator, self.baseline.config
        prompts = tqdm(self.prompts[:num_samples], desc="Looking at answers", unit="answer")
        profiles = [profile(generator, config, prompt, exit_layers) for prompt in prompts]
        middle = self.prompts[0] + profiles[0].result.tokens[: len(profiles[0].result.tokens) // 2]
        costs = measure_passes(self.model, generator.request([middle], config), cells)
        return {one.cell: one for one in predict(profiles, cells, costs)}

    def final(self, cells: Sequence[Cell], num_samples: int, repeats: int) -> dict[Cell, Comparison]:
        """The cells and the baseline, interleaved over the first prompts: figures and speed-up, best first."""
        contestants = {cell: self.contestant(cell) for cell in (None, *cells)}
        rounds = {cell: [Round() for _ in range(repeats)] for cell in contestants}
        for contestant in contestants.values():
            contestant.warm_up(self.prompts[:1])
        turns = list(itertools.product(range(repeats), self.prompts[:num_samples]))
        for turn, (index, prompt) in enumerate(tqdm(turns, desc="Measuring the best", unit="sample")):
            for cell, answers in interleaved(contestants, [prompt], turn).items():
                rounds[cell][index].measurements += answers
        found = {cell: Comparison.of(rounds[cell], rounds[None]) for cell in cells}
        return dict(sorted(found.items(), key=lambda item: -item[1].speedup.speedup))


class GridTable:
    """The grid as CSV, a row appended as soon as its cell has been measured."""

    def __init__(self, path: Path, rows: Grid) -> None:
        self.path = path
        self.rows = rows

    def __enter__(self) -> "GridTable":
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)
        for row in self.rows.values():
            self.add(row)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, row: GridRow) -> None:
        """One cell; the baseline has neither exit layer nor draft length."""
        exit_layer, num_speculations = row.cell or ("", "")
        values = row.totals.as_json() | {
            "exit_layer": exit_layer,
            "num_speculations": num_speculations,
            "speedup": row.tokens_per_second / self.rows[None].tokens_per_second,
        }
        self.writer.writerow([values[name] for name in COLUMNS])
        self.file.flush()


def search(sweep: Sweep, cells: list[Cell], log: RunLog, plan: SearchPlan) -> Findings:
    """Look for the best cell as the plan says."""
    fast = fast_search(sweep, cells, plan) if plan.mode in ("fast", "both") else None
    if fast is not None and plan.mode == "fast":
        return fast
    rows = sweep.grid(cells, log)
    for _ in range(WIDENINGS):
        more = longer_drafts({cell: row.tokens_per_second for cell, row in rows.items() if cell}, plan.draft_step)
        rows = sweep.grid(more, log) if more else rows
    ranked = sorted(filter(None, rows), key=lambda cell: -rows[cell].tokens_per_second)
    seconds = {"grid": sum(row.wall_seconds for row in rows.values())}
    if fast is None:
        final = sweep.final(ranked[: plan.finalists], len(sweep.prompts), plan.repeats)
        return Findings(final, rows, seconds=seconds, choices={"grid": ranked[0]})
    choices = {"fast": fast.best, "grid": ranked[0]}
    final = sweep.final(list(dict.fromkeys(choices.values())), len(sweep.prompts), plan.duel_repeats)
    return Findings(final, rows, fast.predicted, fast.seconds | seconds, choices)


def longer_drafts(speeds: dict[Cell, float], step: int | None) -> list[Cell]:
    """Cells to look at beyond the greatest draft length, at the best exit and its neighbours, if the best cell has it.

    `speeds` are tokens a second; without a step there are none.
    """
    best, most = max(speeds, key=lambda cell: speeds[cell]), max(cell.num_speculations for cell in speeds)
    if step is None or best.num_speculations < most:
        return []
    drafts = (most + number * step for number in range(1, MORE_DRAFTS + 1))
    exit_layers = sorted({cell.exit_layer for cell in speeds})
    place = exit_layers.index(best.exit_layer)
    near = exit_layers[max(0, place - 1) : place + 2]
    return [Cell(exit_layer, d) for d in drafts if d <= MOST_SPECULATIONS for exit_layer in near]


def fast_search(sweep: Sweep, cells: list[Cell], plan: SearchPlan) -> Findings:
    """Predict every cell and measure the best few."""
    start = time.perf_counter()
    predicted = sweep.predictions(cells, plan.profile_samples)
    for _ in range(WIDENINGS):
        more = longer_drafts({cell: one.tokens_per_second for cell, one in predicted.items()}, plan.draft_step)
        predicted |= sweep.predictions(more, plan.profile_samples) if more else {}
    ranked = sorted(predicted, key=lambda cell: -predicted[cell].tokens_per_second)
    final = sweep.final(ranked[: plan.finalists], plan.profile_samples, plan.repeats)
    seconds = {"fast": time.perf_counter() - start}
    return Findings(final, predicted=predicted, seconds=seconds, choices={"fast": next(iter(final))})
