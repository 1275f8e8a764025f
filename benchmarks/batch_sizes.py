"""What do batches gain, and what do they cost? Throughput and latency over batch sizes, with and without drafts.

python benchmarks/batch_sizes.py --dtype float32 --max_steps 64 --repeats 3 --batch_sizes 1 2 4 8 16 32

Every batch size answers the same prompts, greedily, by autoregressive and by self-speculative decoding, interleaved in
one process, in lists of eight batches: a row that ends is replaced by the next prompt of its list. Throughput is a
list's new tokens over its seconds. Latency is what a row waits: its own seconds after its first tokens, over its own
tokens after them.

Writes OUTPUT_DIR/batch_sizes.csv, .png and .json. Every text is compared with the one that its prompt gets alone, and
judged token by token, as by correctness.py; the exit code is 1 if a token is wrong, in float32 also if more than 1 % of
the texts differ by ties, and in float64 if one does.
"""

import csv
import dataclasses
import itertools
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments, Recommendation, advice_for
from self_speculation.measuring.colours import line_style
from self_speculation.measuring.contestants import Contestant, interleaved
from self_speculation.measuring.equivalence import MOST_TIES, CellReport
from self_speculation.measuring.figures import Times, Totals
from self_speculation.measuring.judge import Judge
from self_speculation.measuring.line_up import line_up
from self_speculation.measuring.measurements import Round, list_size, ratio
from self_speculation.measuring.other_work import OtherWork
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import plain_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import Settings, by_flag, setting
from self_speculation.strategies import with_fixed_drafts

STRATEGIES = ("autoregressive", "self_speculative")
# The batch whose throughput over batch 1's is told at the end, if it was measured.
TOLD = 8
COLUMNS = (
    "strategy",
    "batch_size",
    "tokens_per_second",
    "tokens_per_second_least",
    "tokens_per_second_greatest",
    "over_batch_1",
    "decode_tokens_per_second",
    "decode_seconds_per_token",
    "decode_seconds_per_token_least",
    "decode_seconds_per_token_greatest",
    "mean_batch_seconds",
    "acceptance_rate",
    "tokens_per_step",
    "samples",
    "ties",
    "failures",
    "tokens_within_rounding",
    "wrong",
)
Batched = dict[tuple[str, int], list[Round]]


@dataclass
class BatchSizesArguments(Settings):
    """Which batch sizes, and how often."""

    batch_sizes: list[int] = setting(
        default_factory=lambda: [1, 2, 4, 8, 16, 32],
        help="Prompts answered together; 1 is always measured. All sizes answer the same prompts, as many as "
        "every size divides: the first of the data's, again from the first where there are too few.",
    )
    repeats: int = setting(3, help="Rounds; figures are medians over them.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch_sizes) < 1:
            raise ValueError(f"--batch_sizes must be at least 1, not {min(self.batch_sizes)}.")
        self.batch_sizes = sorted({1, *self.batch_sizes})


@dataclass
class BatchSizesConfig(GenerationConfig):
    """Greedy decoding, by both strategies."""

    max_new_tokens: int = setting(64, help="Most new tokens.", at_least=2, flag="max_steps")
    sample: bool = setting(False, help="Must be False: answers are judged by the greatest logits.")
    generation_strategy: str = setting(
        "self_speculative", help="Accepted, and always autoregressive and self_speculative."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample:
            raise ValueError("--sample must be False: sampled texts cannot be judged token by token.")

    def of_both_strategies(self, advice: Recommendation) -> dict[str, GenerationConfig]:
        """Their configs; the exit layer and the draft length, one for all sizes, are for drafting."""
        own = with_fixed_drafts(self.generation(generation_strategy="self_speculative"), advice)
        plain = dataclasses.replace(own, generation_strategy="autoregressive", exit_layer=None, num_speculations=None)
        return {one.generation_strategy: one for one in (plain, own)}


@one_sentence_errors()
def main(kind: type[Contestant] = Contestant) -> None:
    arguments, model_arguments, dataset, config, output = groups = parse(
        BatchSizesArguments, ModelArguments, DatasetArguments, BatchSizesConfig, OutputArguments, description=__doc__
    )
    transformers.utils.logging.set_verbosity_error()
    settings = by_flag(*groups)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load_to_decode(model_arguments, config)
    examples = as_chats(examples, tokenizer, dataset.chat_template)
    advice = advice_for(model, dataset.dataset)
    contestants = line_up(model, tokenizer, config.of_both_strategies(advice), advice, kind)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    examples = shorten(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
    encode = contestants["autoregressive"].generator.encode
    prompts = whole_batches([encode(example.prompt) for example in examples], arguments.batch_sizes)
    log = RunLog(Path(output.output_dir), "batch_sizes")
    log.begin(settings, resume=False)
    others = OtherWork(model.device)
    rounds = measure(contestants, prompts, arguments, log)
    others.end()
    surrounding = surroundings(model.device) | {"dtype": str(model.dtype)} | others.as_json()
    judge = Judge(model, contestants["autoregressive"].generator.request([], config.generation()))
    texts = {key: compared(judge, contestants[key[0]], prompts, rounds, key) for key in rounds}
    rows = [figures(rounds, key, texts[key]) for key in rounds]
    log.write({"arguments": settings, "surroundings": surrounding, "cells": rows})
    save_csv(rows, log.folder / "batch_sizes.csv")
    save_picture(rows, contestants["self_speculative"].config, log.folder / "batch_sizes.png")
    Console(highlight=False).print(table(rows))
    print(verdict(rounds, list(texts.values())))
    if not all(cell.is_correct for cell in texts.values()):
        raise SystemExit(1)


def whole_batches(prompts: list[list[int]], batch_sizes: list[int]) -> list[list[int]]:
    """As many prompts as every batch size divides: the first ones, or all again and again."""
    unit = math.lcm(*batch_sizes)
    return list(itertools.islice(itertools.cycle(prompts), unit * max(1, len(prompts) // unit)))


def measure(
    contestants: dict[str, Contestant], prompts: list[list[int]], arguments: BatchSizesArguments, log: RunLog
) -> Batched:
    """Each strategy's rounds at each batch size; strategies begin in turns.

    A round goes through the prompts once, with all sizes side by side, so that no size has a quiet minute to itself.
    """
    sizes = {size: list_size(size, len(prompts)) for size in arguments.batch_sizes}
    for contestant, size in itertools.product(contestants.values(), sizes):
        contestant.warm_up([max(prompts, key=len)] * size)
    lists = [(size, start) for size, length in sizes.items() for start in range(0, len(prompts), length)]
    lists.sort(key=lambda one: one[1] + sizes[one[0]] / 2)
    rounds: Batched = {key: [] for key in itertools.product(contestants, sizes)}
    progress = tqdm(total=arguments.repeats * len(lists), desc="Measuring", unit="list")
    for repeat in range(arguments.repeats):
        found = {(name, size): Round(list_size=sizes[size]) for name, size in rounds}
        for turn, (size, start) in enumerate(lists, repeat):
            own = {name: dataclasses.replace(contestant, batch_size=size) for name, contestant in contestants.items()}
            for name, answers in interleaved(own, prompts[start : start + sizes[size]], turn).items():
                found[name, size].measurements += answers
            progress.update()
        for (name, size), one in found.items():
            rounds[name, size].append(one)
            log.append({"repeat": repeat, "strategy": name, "batch_size": size} | Times.of(one).as_json())
    progress.close()
    return rounds


def compared(
    judge: Judge, contestant: Contestant, prompts: list[list[int]], rounds: Batched, key: tuple[str, int]
) -> CellReport:
    """Every answer of every round, judged, and compared with the strategy's answer to the prompt alone."""
    alone, config = rounds[key[0], 1][0].measurements, contestant.config
    exit_layer, most_ties = config.exit_layer or len(judge.model.model.layers), MOST_TIES.get(judge.model.dtype, 1.0)
    report = CellReport(exit_layer, config.num_speculations or 0, most_ties)
    for one in rounds[key]:
        for sample, (prompt, expected, actual) in enumerate(zip(prompts, alone, one.measurements, strict=True)):
            report.add(sample, judge.judge(prompt, actual.tokens), actual.tokens == expected.tokens)
    return report


def gains(rounds: Batched, key: tuple[str, int]) -> list[float]:
    """A batch size's throughput over batch 1's of the same strategy, round by round."""
    pairs = zip(rounds[key], rounds[key[0], 1], strict=True)
    return [ratio(one.tokens_per_second, alone.tokens_per_second) for one, alone in pairs]


def figures(rounds: Batched, key: tuple[str, int], texts: CellReport) -> dict[str, Any]:
    """A row of the table: medians over the rounds, their least and greatest, and how many texts differ."""
    values = Totals.of(rounds[key]).as_json()
    for name in ("tokens_per_second", "decode_seconds_per_token"):
        values[f"{name}_least"], values[f"{name}_greatest"] = values[f"{name}_spread"]
    values |= {"strategy": key[0], "batch_size": key[1], "over_batch_1": statistics.median(gains(rounds, key))}
    values |= {"samples": texts.num_samples, "ties": texts.num_ties, "failures": texts.num_failures}
    values |= {"tokens_within_rounding": len(texts.ties), "wrong": texts.num_wrong}
    return {name: values[name] for name in COLUMNS}


def save_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """A line for each strategy and batch size."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def save_picture(rows: list[dict[str, Any]], config: GenerationConfig, path: Path) -> None:
    """Throughput and latency over the batch size: medians, in a band from the least to the greatest."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    labels = ("autoregressive", f"self_speculative, E = {config.exit_layer}, d = {config.num_speculations}")
    for index, (strategy, label) in enumerate(zip(STRATEGIES, labels, strict=True)):
        own, style = [row for row in rows if row["strategy"] == strategy], line_style(index) | {"label": label}
        draw(throughput, own, "tokens_per_second", 1, style)
        draw(latency, own, "decode_seconds_per_token", 1e3, style)
    throughput.set(title="Throughput: all rows together", ylabel="tokens/s, prompts included")
    latency.set(title="Latency: what a row waits", ylabel="ms per token of a row, after the first")
    for axes in (throughput, latency):
        axes.set_ylim(bottom=0)
    throughput.legend()
    figure.savefig(path, dpi=130)


def draw(axes: Axes, rows: list[dict[str, Any]], name: str, factor: float, style: dict[str, str]) -> None:
    """A figure of one strategy as a line in its band."""
    sizes = [row["batch_size"] for row in rows]
    middle, least, most = ([row[name + end] * factor for row in rows] for end in ("", "_least", "_greatest"))
    axes.plot(sizes, middle, **style)
    axes.fill_between(sizes, least, most, alpha=0.2, color=style["color"], linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("batch size")
    axes.grid(alpha=0.3)


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each strategy and batch size."""
    heads = (
        "batch",
        "tokens/s",
        "over\nbatch 1",
        "decode\ntokens/s",
        "ms/token\nof a row",
        "s/list",
        "texts as\nalone",
    )
    return plain_table(("strategy", *heads), map(as_text, rows))


def as_text(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's cells."""
    differing = row["ties"] + row["failures"]
    return (
        row["strategy"],
        str(row["batch_size"]),
        f"{row['tokens_per_second']:.1f}",
        f"{row['over_batch_1']:.2f}",
        f"{row['decode_tokens_per_second']:.1f}",
        f"{row['decode_seconds_per_token'] * 1e3:.2f}",
        f"{row['mean_batch_seconds']:.2f}",
        "all" if not differing else f"all but {differing}",
    )


def verdict(rounds: Batched, texts: list[CellReport]) -> str:
    """The gain of a batch of eight (or the largest measured), and whether texts are the same in a batch as alone."""
    sizes = {size for _, size in rounds}
    told = TOLD if TOLD in sizes else max(sizes)
    ratios = {name: gains(rounds, (name, told)) for name in STRATEGIES}
    parts = [f"{name} {statistics.median(own):.2f} ({min(own):.2f}–{max(own):.2f})" for name, own in ratios.items()]
    ties, failures = sum(cell.num_ties for cell in texts), sum(cell.num_failures for cell in texts)
    total = sum(cell.num_samples for cell in texts)
    same = f"all {total} texts are the same as alone"
    if ties + failures:
        same = f"{total - ties - failures} of {total} texts are the same as alone, {ties} ties, {failures} failures"
    return f"Batch {told} over batch 1, tokens/s: {', '.join(parts)}; {same}."


if __name__ == "__main__":
    main()
