"""What do layer dropout and early-exit loss each do? The same small model trained with neither, either and both.

python benchmarks/ablation.py --output_dir runs/ablation --muon True --exit_weights uniform

Four variants of one recipe, on the same text in the same order, for each seed: Python source, by default the standard
library's. LayerSkip's flags describe the variant `both`. Every finished model is a folder of OUTPUT_DIR and every
finished measurement a line of ablation.jsonl, so a killed run goes on with --resume True; with it, seeds may be added.
Speed is measured when all models are trained. At the end stand a table (ablation.md, ablation.csv), all figures
(ablation.json) and a picture (ablation.png); the last line of standard output is the table as one JSON object.
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, default_data_collator

from benchmarks.small_models import (
    AUTOREGRESSIVE,
    Run,
    SideBySide,
    SmallModelArguments,
    TrainingSet,
    acceptance_rate,
    begin,
    decoding_figures,
    fastest,
    greedy,
    kept_tokenizer,
    markdown,
)
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.cell import Cell
from self_speculation.ending import one_sentence_errors
from self_speculation.measuring.colours import BLUE, GREEN, GREY, MARKERS, VERMILION
from self_speculation.measuring.exit_report import evaluate_exits
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.texts import read_texts, split_held_out
from self_speculation.settings import Settings, by_flag, setting
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.packing import PackedTexts, Packing
from self_speculation.training.tokenizer import train_tokenizer

# Tests, and tables of characters and of help texts, which are not what programs look like.
LEFT_OUT = ["site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
# The split of the held-out blocks into those for the loss and those for prompts.
SPLIT_SEED = 0
COLOURS = {"baseline": GREY, "layer dropout": BLUE, "early-exit loss": VERMILION, "both": GREEN}
# The groups of bars are 1 apart.
BAR_WIDTH = 0.2
# The draft length whose acceptance the table gives: the rule for checkpoints that recommend nothing.
TABLE_DRAFTS = 4


@dataclass
class AblationArguments(Settings):
    """Which texts and seeds, and what to decode."""

    data_path: list[str] = setting(
        default_factory=lambda: [sysconfig.get_paths()["stdlib"]],
        help="Folders of Python source; the standard library without tests and tables by default.",
    )
    seeds: list[int] = setting(default_factory=lambda: [0, 1, 2], help="A model of each variant for each.")
    block_size: int = setting(256, help="Tokens in a training sequence.", at_least=2)
    eval_blocks: int = setting(128, help="Held-out sequences for loss and acceptance.", at_least=1)
    num_prompts: int = setting(16, help="More of them for speed; the first half choose (E, d).", at_least=2)
    prompt_tokens: int = setting(64, help="Tokens of a prompt.")
    max_steps: int = setting(64, help="New tokens of an answer.", at_least=1)
    num_speculations: list[int] = setting(
        default_factory=lambda: [2, 4, 6], help="Draft lengths to try at L/4 and L/2; the table has 4."
    )
    repeats: int = setting(2, help="Rounds over the prompts; times are medians.", at_least=1)
    resume: bool = setting(False, help="Go on with the run in --output_dir that was interrupted.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prompt_tokens <= self.block_size:
            raise ValueError(f"--prompt_tokens must lie between 1 and --block_size, not {self.prompt_tokens}.")
        if not self.seeds:
            raise ValueError("--seeds needs at least one seed.")
        if TABLE_DRAFTS not in self.num_speculations:
            raise ValueError(f"--num_speculations must have {TABLE_DRAFTS} in it, for the table.")


def variants(both: LayerSkipArguments) -> dict[str, LayerSkipArguments]:
    """LayerSkip's settings for each of the four variants."""
    return {
        "baseline": replace(both, p_max=0.0, e_scale=0.0),
        "layer dropout": replace(both, e_scale=0.0),
        "early-exit loss": replace(both, p_max=0.0),
        "both": both,
    }


def read_source(arguments: AblationArguments) -> tuple[list[str], list[str]]:
    """The source files to train on, and those held out; the split is the same for all seeds."""
    source = TextArguments(arguments.data_path, file_pattern="*.py", exclude=LEFT_OUT)
    return split_held_out(read_texts(source), source.held_out, source.split_seed)


@dataclass(frozen=True)
class Texts:
    """Training blocks, and held-out blocks for the loss and for prompts, with their tokenizer."""

    train: TrainingSet
    held_out: PackedTexts
    prompts: list[list[int]]

    @classmethod
    def of(
        cls,
        train_texts: list[str],
        held_out_texts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        arguments: AblationArguments,
    ) -> "Texts":
        """Cut the texts into blocks."""
        blocks = PackedTexts(train_texts, tokenizer, arguments.block_size, packing=Packing(separate=False))
        held_out = PackedTexts(held_out_texts, tokenizer, arguments.block_size, packing=Packing(separate=False))
        num_blocks = arguments.eval_blocks + arguments.num_prompts
        if len(held_out) < num_blocks:
            raise ValueError(
                f"--data_path holds out {len(held_out)} blocks, too few for --eval_blocks + --num_prompts."
            )
        # In a random order, so that both parts are of many files.
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(SPLIT_SEED))
        prompts_NT = held_out.blocks[order[arguments.eval_blocks : num_blocks], : arguments.prompt_tokens]
        chosen = order[: arguments.eval_blocks]
        held_out.blocks, held_out.is_first = held_out.blocks[chosen], held_out.is_first[chosen]
        return cls(TrainingSet(blocks, tokenizer, default_data_collator), held_out, prompts_NT.tolist())


class Ablation:
    """The four variants for every seed: trained, then decoded with, each once and noted as soon as it is done."""

    def __init__(self, arguments: AblationArguments, sizes: SmallModelArguments, both: LayerSkipArguments) -> None:
        self.arguments = arguments
        self.sizes = sizes
        self.variants = variants(both)

    def runs(self, folder: Path) -> Iterator[tuple[dict[str, Any], Run]]:
        """Every model: what its lines in the log begin with, and how it is trained. A seed's variants together."""
        for seed in self.arguments.seeds:
            for variant, layerskip in self.variants.items():
                name = f"{variant.replace(' ', '-')}-{seed}"
                yield {"variant": variant, "seed": seed}, Run(folder / name, seed, layerskip)

    def complete(self, log: RunLog, texts: Texts) -> None:
        """Train and evaluate what is missing; when that is done, measure the speed that is missing."""
        stages = {"exits": self._exits, "acceptance": self._acceptance, "decoding": self._decoding}
        for stage, measure in stages.items():
            done = [{name: line[name] for name in ("stage", "variant", "seed")} for line in log.lines()]
            for key, run in self.runs(log.folder):
                if {"stage": stage} | key not in done:
                    print(f"{key['variant']}, seed {key['seed']}: {stage}", file=sys.stderr)
                    model = run.model(self.sizes, texts.train)
                    log.append({"stage": stage} | key | {"figures": measure(model, texts)})

    def _exits(self, model: LlamaForCausalLM, texts: Texts) -> list[dict[str, float]]:
        """Loss and agreement with the last layer at every exit layer."""
        return evaluate_exits(model, texts.held_out, self.sizes.train_batch_size).to_dict("records")

    def _acceptance(self, model: LlamaForCausalLM, texts: Texts) -> dict[str, float]:
        """The acceptance rate at L/4 and L/2, over answers to the beginnings of the held-out blocks."""
        quarter, half, _ = self.sizes.quarters
        cells = [Cell(exit_layer, TABLE_DRAFTS) for exit_layer in (quarter, half)]
        contestants = SideBySide(model, texts.train.tokenizer, greedy(self.arguments.max_steps, cells)).contestants
        prompts = texts.held_out.blocks[:, : self.arguments.prompt_tokens].tolist()
        both = {name: contestants[cell.name] for name, cell in zip(("L/4", "L/2"), cells, strict=True)}
        return {name: acceptance_rate(one.generator, prompts, one.config) for name, one in both.items()}

    def _decoding(self, model: LlamaForCausalLM, texts: Texts) -> dict[str, Any]:
        """Each (E, d) beside autoregressive decoding; the fastest is chosen on the first half of the prompts.

        All figures are of the second half.
        """
        quarter, half, _ = self.sizes.quarters
        cells = [Cell(exit_layer, d) for exit_layer in (quarter, half) for d in self.arguments.num_speculations]
        side_by_side = SideBySide(model, texts.train.tokenizer, greedy(self.arguments.max_steps, cells))
        middle = len(texts.prompts) // 2
        chosen = fastest(side_by_side.rounds(texts.prompts[:middle], self.arguments.repeats))
        rounds = side_by_side.rounds(texts.prompts[middle:], self.arguments.repeats)
        baseline = rounds[AUTOREGRESSIVE]
        return {"chosen": chosen, "ways": {name: decoding_figures(own, baseline) for name, own in rounds.items()}}


def rows(lines: list[dict[str, Any]], sizes: SmallModelArguments) -> pd.DataFrame:
    """One row for each model: the figures that the table is made of."""
    makers = {"exits": exit_row, "acceptance": acceptance_row, "decoding": decoding_row}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: list(makers).index(line["stage"])):
        key = line["variant"], line["seed"]
        row = found.setdefault(key, dict(zip(("variant", "seed"), key, strict=True)))
        row |= makers[line["stage"]](line["figures"], sizes)
    return pd.DataFrame(found.values())


def exit_row(figures: list[dict[str, float]], sizes: SmallModelArguments) -> dict[str, float]:
    """The last layer's loss, and loss and agreement at L/4 and L/2."""
    quarter, half, _ = sizes.quarters
    return {"loss, last": figures[-1]["loss"]} | {
        f"{figure}, {name}": figures[exit_layer - 1][figure]
        for figure in ("loss", "agreement")
        for name, exit_layer in (("L/4", quarter), ("L/2", half))
    }


def acceptance_row(figures: dict[str, float], sizes: SmallModelArguments) -> dict[str, float]:
    """The acceptance rates."""
    return {f"acceptance, {name}": rate for name, rate in figures.items()}


def decoding_row(figures: dict[str, Any], sizes: SmallModelArguments) -> dict[str, Any]:
    """The speed-up at L/4 and L/2 with the table's draft length, and that of the chosen (E, d).

    A speed-up is the median over answers: on a machine that does other work a few take much longer than they should.
    """
    quarter, half, _ = sizes.quarters
    ways = figures["ways"]
    at = {name: ways[Cell(exit_layer, TABLE_DRAFTS).name] for name, exit_layer in (("L/4", quarter), ("L/2", half))}
    return (
        {f"speed-up, {name}": way["sample_speedup_median"] for name, way in at.items()}
        | {"speed-up, chosen": ways[figures["chosen"]]["sample_speedup_median"], "chosen": figures["chosen"]}
        | {"different answers": sum(way["different_answers"] for way in ways.values())}
    )


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, least and greatest of every figure over the seeds, a row for each variant, in the order of the runs."""
    figures = runs.drop(columns=["seed", "chosen", "different answers"])
    return figures.groupby("variant", sort=False).agg(["mean", "min", "max"])


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The summary with each figure as 'mean (least–greatest)'; variants are columns, which a page has room for."""
    styles = {"loss": "{:.2f}", "agreement": "{:.1%}", "acceptance": "{:.1%}", "speed-up": "{:.2f}"}
    cells: dict[str, list[str]] = {}
    for name in table.columns.unique(level=0):
        style = styles[name.split(",")[0]]
        pattern = f"{style} ({style}–{style})"
        cells[name] = [pattern.format(*values) for values in table[name].itertuples(index=False)]
    return pd.DataFrame(cells, index=table.index).T


def exit_losses(lines: list[dict[str, Any]]) -> pd.DataFrame:
    """Loss by variant, exit layer and seed, in long form."""
    records = [
        {"variant": line["variant"], "exit_layer": figures["exit_layer"], "loss": figures["loss"]}
        for line in lines
        if line["stage"] == "exits"
        for figures in line["figures"]
    ]
    return pd.DataFrame(records)


def draw(losses: pd.DataFrame, table: pd.DataFrame, path: Path) -> Figure:
    """A picture of the loss over exit layers with the spread over seeds, and of acceptance at L/4 and L/2."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, losses)
    _draw_acceptance(right, table)
    figure.savefig(path, dpi=110)
    return figure


def _draw_losses(axes: Axes, losses: pd.DataFrame) -> None:
    for marker, (variant, own) in zip(MARKERS, losses.groupby("variant", sort=False), strict=False):
        spread = own.groupby("exit_layer")["loss"].agg(["mean", "min", "max"])
        axes.plot(spread.index, spread["mean"], marker=marker, markersize=4, color=COLOURS[variant], label=variant)
        axes.fill_between(spread.index, spread["min"], spread["max"], color=COLOURS[variant], alpha=0.2, linewidth=0)
    axes.set(xlabel="exit layer", ylabel="nats per token", title="Loss on held-out files")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_acceptance(axes: Axes, table: pd.DataFrame) -> None:
    exits = ["L/4", "L/2"]
    for number, variant in enumerate(table.index):
        spreads = [table.loc[variant, f"acceptance, {name}"] for name in exits]
        means = [spread["mean"] for spread in spreads]
        errors = [[s["mean"] - s["min"] for s in spreads], [s["max"] - s["mean"] for s in spreads]]
        places = [group + (number - (len(table) - 1) / 2) * BAR_WIDTH for group in range(len(exits))]
        bars = axes.bar(places, means, BAR_WIDTH * 0.92, yerr=errors, capsize=3, color=COLOURS[variant], label=variant)
        axes.bar_label(bars, [f"{mean:.0%}" for mean in means], label_type="center", fontsize=8, color="white")
    axes.set_xticks(range(len(exits)), [f"exit at {name}" for name in exits])
    axes.set(ylim=(0, 1), ylabel="accepted / drafted", title=f"Acceptance of drafts, greedy, d = {TABLE_DRAFTS}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def report(log: RunLog, ablation: Ablation) -> pd.DataFrame:
    """Write the table, all figures and the picture; returns the table as text."""
    wanted = [key for key, _ in ablation.runs(log.folder)]
    lines = [line for line in log.lines() if {"variant": line["variant"], "seed": line["seed"]} in wanted]
    runs = rows(lines, ablation.sizes)
    table = summary(runs)
    text = as_text(table)
    table.to_csv(log.folder / "ablation.csv")
    (log.folder / "ablation.md").write_text(markdown(text), encoding="utf-8")
    draw(exit_losses(lines), table, log.folder / "ablation.png")
    document = json.loads(log.document.read_text(encoding="utf-8"))
    log.write(document | {"surroundings": surroundings(torch.device("cpu")), "models": runs.to_dict("records")})
    return text


@one_sentence_errors(go_on="What was measured is kept; the same command with --resume True goes on.")
def main() -> None:
    arguments, sizes, both, output = groups = parse(
        AblationArguments, SmallModelArguments, LayerSkipArguments, OutputArguments, description=__doc__
    )
    log = RunLog(Path(output.output_dir), "ablation")
    settings = {name: value for name, value in by_flag(*groups).items() if name != "seeds"}
    train_texts, held_out_texts = read_source(arguments)
    begin(log, settings, arguments.resume)
    tokenizer = kept_tokenizer(log.folder / "tokenizer", lambda: train_tokenizer(train_texts, sizes.vocab_size))
    texts = Texts.of(train_texts, held_out_texts, tokenizer, arguments)
    ablation = Ablation(arguments, sizes, both)
    ablation.complete(log, texts)
    table = report(log, ablation)
    print(table.to_string())
    print(json.dumps(table.to_dict()))


if __name__ == "__main__":
    main()
