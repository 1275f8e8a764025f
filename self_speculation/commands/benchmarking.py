"""The benchmark's work: prompts, contestants and judges from the flags, and a report of what was measured."""

import json
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console

from self_speculation.commands.flag_files import save_settings
from self_speculation.commands.flags import OutputArguments
from self_speculation.commands.outputs import ends_with_totals
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import advice_for
from self_speculation.measuring.benchmark import Benchmark, Scorer, score_code, score_text
from self_speculation.measuring.ceiling import Ceiling
from self_speculation.measuring.code_execution import best_isolation
from self_speculation.measuring.figures import StrategyFigures, rounded
from self_speculation.measuring.isolation import Isolation
from self_speculation.measuring.line_up import line_up
from self_speculation.measuring.other_work import OtherWork
from self_speculation.measuring.passes import TimePasses, measure_passes
from self_speculation.measuring.probes import PROBES, Probes
from self_speculation.measuring.rivals import RIVALS
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.tables import print_figures
from self_speculation.measuring.threads import load_to_decode
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import fit, prompt_limit
from self_speculation.prompts.sources import read_examples
from self_speculation.rendezvous import all_present
from self_speculation.settings import by_flag
from self_speculation.strategies import STRATEGIES

if TYPE_CHECKING:
    from self_speculation.commands.benchmark import BenchmarkArguments, BenchmarkConfig

KINDS = {**STRATEGIES, **RIVALS}


@dataclass
class Bench:
    """A benchmark as its flags describe it."""

    arguments: "BenchmarkArguments"
    model: ModelArguments
    dataset: DatasetArguments
    config: "BenchmarkConfig"
    output: OutputArguments

    def run(self, folder: Path, probes: Probes | None = None, pass_costs: TimePasses | None = None) -> None:
        """Measure, write the results into the folder, and report them; the first rank does the last two."""
        arguments, dataset, config, probes = self.arguments, self.dataset, self.config, probes or PROBES
        transformers.utils.logging.set_verbosity_error()
        # Gives each rank a device of its own, so before a model is loaded. Without `cpu`, ranks on CPUs would be alone.
        # Ranks wait for the slowest, however long.
        with all_present(arguments.rendezvous_timeout):
            ranks = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
        if arguments.execute_code and dataset.dataset != "human_eval":
            raise ValueError(f"--execute_code needs --dataset human_eval, not {dataset.dataset}.")
        if ranks.num_processes > 1 and not self.output.log:
            raise ValueError("--no_log takes one process: several find each other's answers in --output_dir.")
        isolation = best_isolation(arguments.execute_code_unsafely) if arguments.execute_code else None
        if arguments.batch_size > 1:
            check_batches(config)
        examples = read_examples(dataset, config.seed)
        model, tokenizer = load_to_decode(self.model, config)
        examples = as_chats(examples, tokenizer, dataset.chat_template)
        advice = advice_for(model, dataset.dataset)
        contestants = line_up(model, tokenizer, of_each_strategy(config), advice)
        limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
        examples, num_shortened = fit(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
        log = RunLog(folder, "benchmark")
        benchmark = Benchmark(contestants, examples, log, arguments.batch_size, probes, pass_costs or measure_passes)
        note = partial(Console(stderr=True, quiet=not ranks.is_main_process).print, highlight=False, soft_wrap=True)
        if num_shortened:
            note(f"{num_shortened} of {len(examples)} prompts were shortened to {limit.most} tokens.")
        if ranks.is_main_process:
            log.begin(self.settings, arguments.resume)
            # A run that goes on has the settings that it began with.
            if not arguments.resume:
                save_settings(folder / "benchmark_settings.json", *self.groups)
            others = OtherWork(model.device, note)
            ceiling = Ceiling.measure(model, probes)
            note(ceiling.sentence)
        benchmark.run(arguments.repeats, arguments.verbose)
        if ranks.is_main_process:
            others.end()
            judge = benchmark.judge() if arguments.judge else None
            figures = benchmark.results(ceiling, scorers(arguments.score_text, isolation), judge)
            prompts = {"samples": len(examples), "shortened": num_shortened, "most_tokens": limit.most}
            found = benchmark.document(ceiling, figures, isolation)
            found["surroundings"] |= others.as_json()
            log.write(found | {"arguments": self.settings, "prompts": prompts})
            self.report(figures)
            if self.output.log:
                note(f"{log.document} has all figures, {log.log} every answer.")
        benchmark.ranks.destroy_process_group()

    @property
    def groups(self) -> tuple[Any, ...]:
        """The flags that say what is measured, by group."""
        return self.arguments, self.model, self.dataset, self.config

    @property
    def settings(self) -> dict[str, Any]:
        """All flags' values."""
        return by_flag(*self.groups, self.output)

    def report(self, figures: dict[str, StrategyFigures]) -> None:
        """Tables, and the totals as one JSON object where a program reads them."""
        print_figures(figures, Console(highlight=False))
        if ends_with_totals(self.output):
            print(json.dumps({"strategies": rounded({name: own.as_json() for name, own in figures.items()})}))


def scorers(scores_text: bool, isolation: Isolation | None) -> list[Scorer]:
    """What the answers are scored by; programs are run only in what isolates them."""
    code: list[Scorer] = [] if isolation is None else [partial(score_code, isolation=isolation)]
    return [*([score_text] if scores_text else []), *code]


def check_batches(config: "BenchmarkConfig") -> None:
    """Refuse strategies that cannot answer several prompts at once."""
    kinds = {name: KINDS[name] for name in config.generation_strategy if name in KINDS}
    for name, kind in kinds.items():
        if not kind.takes_batches:
            raise ValueError(f"--generation_strategy {name} takes one prompt at a time: it needs --batch_size 1.")
    for name, kind in kinds.items():
        if config.no_repeat_ngram_size and not kind.takes_batched_processors:
            raise ValueError(
                f"--no_repeat_ngram_size would see the padding of {name}'s batches: it needs --batch_size 1."
            )


def of_each_strategy(config: "BenchmarkConfig") -> dict[str, GenerationConfig]:
    """One config a strategy; autoregressive with an exit layer, alone, is early exit."""
    names = list(dict.fromkeys(config.generation_strategy))
    if names == ["autoregressive"] and config.exit_layer is not None:
        names = ["early_exit"]
    configs = {}
    for name in names:
        unused = {"exit_layer", "num_speculations"} - set(KINDS[name].uses if name in KINDS else ())
        configs[name] = config.generation(generation_strategy=name, **dict.fromkeys(unused))
    return configs
