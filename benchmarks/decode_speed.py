# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""How fast is self-speculative decoding here? Against autoregressive decoding and transformers' `generate`, greedy.

python benchmarks/decode_speed.py --model checkpoints/layerskip-python-6M --num_samples 12 --repeats 5

All strategies run in one process, interleaved over the prompts. Both self-speculative decoding and transformers'
early-exit assistant are given the best of a few (E, d). The last line of standard output is one JSON object.
"""

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from arguments import one_sentence_errors, parse
from data import DatasetArguments, read_examples
from self_speculation.autoregressive_generator import AutoregressiveGenerator
from self_speculation.benchmarking import HuggingfaceRival, measure_passes, peak_tensor_bytes
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.loading import BUNDLED_CHECKPOINT, ModelArguments, load
from self_speculation.self_speculation_generator import SelfSpeculativeGenerator

NAMES = ("hf_generate", "hf_early_exit", "autoregressive", "self_speculative")
TUNING_PROMPTS = 4


@dataclass
class SpeedArguments:
    """What to measure."""

    model: str = field(default=str(BUNDLED_CHECKPOINT), metadata={"help": "Folder or hub name."})
    data_path: str | None = field(default=None, metadata={"help": "JSON lines with prompt and response."})
    num_samples: int = field(default=12, metadata={"help": "Prompts."})
    max_steps: int = field(default=128, metadata={"help": "Most new tokens for a prompt."})
    repeats: int = field(default=5, metadata={"help": "Rounds over all prompts; medians are over the rounds."})
    dtype: str = field(default="auto", metadata={"help": "As in the other scripts."})
    seed: int = field(default=42, metadata={"help": "Seed of the choice of prompts."})
    exit_layers: list[int] = field(default_factory=lambda: [2, 3, 4], metadata={"help": "Exit layers to try."})
    draft_lengths: list[int] = field(default_factory=lambda: [2, 3, 4, 6], metadata={"help": "Draft lengths to try."})


Run = Callable[[list[int]], GenerationResult]


@dataclass
class Round:
    """Totals of one strategy over all prompts, once."""

    seconds: float = 0.0
    results: list[GenerationResult] = field(default_factory=list)

    def add(self, result: GenerationResult, seconds: float) -> None:
        """Count one answer, timed end to end."""
        self.seconds += seconds
        self.results.append(result)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all time, prefill included."""
        return sum(len(result.tokens) for result in self.results) / self.seconds

    def total(self, name: str) -> float:
        """The sum of a figure of the answers."""
        return sum(getattr(result, name) for result in self.results)


class Contest:
    """The strategies, and one prompt's run of each."""

    def __init__(self, arguments: SpeedArguments) -> None:
        self.model, tokenizer = load(ModelArguments(model=arguments.model, dtype=arguments.dtype))
        dataset = DatasetArguments(data_path=arguments.data_path, num_samples=arguments.num_samples)
        self.config = GenerationConfig(max_steps=arguments.max_steps, sample=False)
        self.ours = {
            "autoregressive": HuggingfaceLlamaGenerator(tokenizer, AutoregressiveGenerator(self.model)),
            "self_speculative": HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeGenerator(self.model)),
        }
        encode = self.ours["autoregressive"].encode
        self.prompts = [encode(example.prompt) for example in read_examples(dataset, arguments.seed)]

    def our(self, name: str, exit_layer: int | None = None, num_speculations: int | None = None) -> Run:
        """One of our strategies as a function of the prompt."""
        config = dataclasses.replace(self.config, exit_layer=exit_layer, num_speculations=num_speculations)
        return lambda prompt: self.ours[name].generate([prompt], config)[0]

    def rival(self, exit_layer: int | None = None, num_speculations: int | None = None) -> Run:
        """transformers' `generate`, plain or assisted by its own early exit, as a function of the prompt."""
        rival = HuggingfaceRival(self.model, self.config.max_steps, exit_layer, num_speculations)
        return lambda prompt: GenerationResult(tokens=rival.tokens(prompt))


def rounds(runs: dict[Any, Run], prompts: list[list[int]], repeats: int, label: str) -> dict[Any, list[Round]]:
    """Every run on every prompt, interleaved, `repeats` times after one warm-up."""
    results: dict[Any, list[Round]] = {name: [Round() for _ in range(repeats)] for name in runs}
    for run in runs.values():
        run(prompts[0])
    for index in tqdm(range(repeats), desc=label, unit="round"):
        for prompt in prompts:
            for name, run in runs.items():
                start = time.perf_counter()
                result = run(prompt)
                results[name][index].add(result, time.perf_counter() - start)
    return results


def best_cell(
    contest: Contest, arguments: SpeedArguments, make: Callable[[int, int], Run], label: str
) -> tuple[int, int]:
    """The (E, d) with the most tokens per second on a few prompts."""
    cells = [(exit_layer, drafts) for exit_layer in arguments.exit_layers for drafts in arguments.draft_lengths]
    results = rounds({cell: make(*cell) for cell in cells}, contest.prompts[:TUNING_PROMPTS], 2, label)
    return max(cells, key=lambda cell: max(one.tokens_per_second for one in results[cell]))


def ratio(over: list[Round], under: list[Round]) -> tuple[float, float, float]:
    """Median, least and greatest ratio of tokens per second, round by round."""
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def share_of_ideal(contest: Contest, results: dict[str, list[Round]], cell: tuple[int, int]) -> tuple[float, float]:
    """Decode speed-up over autoregressive decoding, as a share of what acceptance and pass costs allow; and that."""
    rates = {}
    for name in ("autoregressive", "self_speculative"):
        per_token = [
            one.total("decode_seconds") / sum(len(result.tokens) for result in one.results) for one in results[name]
        ]
        rates[name] = statistics.median(per_token)
    one = results["self_speculative"][0]
    num_steps = sum(len(result.steps) for result in one.results)
    tokens_per_step = sum(len(result.tokens) for result in one.results) / num_steps
    drafts_per_step = one.total("drafted") / num_steps
    costs = measure_passes(contest.model, contest.prompts[0], *cell, repeats=200)
    ideal = costs.ideal_speedup(drafts_per_step, tokens_per_step)
    return rates["autoregressive"] / rates["self_speculative"] / ideal, ideal


def memory_ratio(contest: Contest, cell: tuple[int, int]) -> float:
    """Peak live tensor bytes of self-speculative over autoregressive decoding."""
    config = dataclasses.replace(contest.config, exit_layer=cell[0], num_speculations=cell[1])
    peaks = {name: peak_tensor_bytes(ours, contest.prompts[0], config) for name, ours in contest.ours.items()}
    return peaks["self_speculative"] / peaks["autoregressive"]


def report(results: dict[str, list[Round]], cells: dict[str, tuple[int, int]]) -> None:
    """The table: tokens per second, and the speed-up over transformers' `generate` with its spread."""
    table = Table("strategy", "E, d", "tokens/s", "over hf_generate (min to max)", "acceptance", "tokens per step")
    for name in NAMES:
        median, least, most = ratio(results[name], results["hf_generate"])
        one = results[name][0]
        drafted, steps = one.total("drafted"), sum(len(result.steps) for result in one.results)
        table.add_row(
            name,
            "{}, {}".format(*cells[name]) if name in cells else "",
            f"{statistics.median(r.tokens_per_second for r in results[name]):.1f}",
            f"{median:.2f} ({least:.2f} to {most:.2f})",
            f"{one.total('accepted') / drafted:.1%}" if drafted else "",
            f"{sum(len(result.tokens) for result in one.results) / steps:.2f}" if steps else "",
        )
    Console(highlight=False, width=110).print(table)


def same_outputs(results: dict[str, list[Round]]) -> float:
    """The share of prompts whose tokens all four strategies agree on."""
    answers = zip(*([result.tokens for result in results[name][0].results] for name in NAMES), strict=True)
    agreed = [all(tokens == first for tokens in rest) for first, *rest in answers]
    return sum(agreed) / len(agreed)


@one_sentence_errors()
def main() -> None:
    [arguments] = parse(SpeedArguments)
    transformers.utils.logging.set_verbosity_error()
    contest = Contest(arguments)
    ours = partial(contest.our, "self_speculative")
    cells = {
        "self_speculative": best_cell(contest, arguments, ours, "Tuning ours"),
        "hf_early_exit": best_cell(contest, arguments, contest.rival, "Tuning transformers'"),
    }
    runs = {
        "hf_generate": contest.rival(),
        "hf_early_exit": contest.rival(*cells["hf_early_exit"]),
        "autoregressive": contest.our("autoregressive"),
        "self_speculative": ours(*cells["self_speculative"]),
    }
    results = rounds(runs, contest.prompts, arguments.repeats, "Measuring")
    report(results, cells)
    figures = measured(contest, results, cells)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()} | surroundings(contest, arguments)))


def measured(contest: Contest, results: dict[str, list[Round]], cells: dict[str, tuple[int, int]]) -> dict[str, float]:
    """The figures of the comparison."""
    share, ideal = share_of_ideal(contest, results, cells["self_speculative"])
    ours = results["self_speculative"]
    exit_layer, num_speculations = cells["self_speculative"]
    return {
        "ar_over_hf_generate": ratio(results["autoregressive"], results["hf_generate"])[0],
        "self_speculative_over_ar": ratio(ours, results["autoregressive"])[0],
        "self_speculative_over_hf_early_exit": ratio(ours, results["hf_early_exit"])[0],
        "self_speculative_over_hf_generate": ratio(ours, results["hf_generate"])[0],
        "share_of_ideal": share,
        "ideal_speedup": ideal,
        "peak_memory_ratio": memory_ratio(contest, cells["self_speculative"]),
        "exit_layer": exit_layer,
        "num_speculations": num_speculations,
        "acceptance_rate": ours[0].total("accepted") / ours[0].total("drafted"),
        "same_outputs": same_outputs(results),
    }


def surroundings(contest: Contest, arguments: SpeedArguments) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "arguments": dataclasses.asdict(arguments),
        "dtype": str(contest.model.dtype),
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
