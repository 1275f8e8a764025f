"""Measure strategies on the same prompts, interleaved in one process: speed, acceptance, memory and text quality.

python benchmark.py --generation_strategy autoregressive self_speculative hf_generate hf_early_exit --sample False
torchrun benchmark.py --model facebook/layerskip-llama3.2-1B --dataset cnn_dm_summarization --num_samples 100 \\
    --generation_strategy self_speculative --exit_layer 8 --num_speculations 6 --output_dir ./logs

Every finished sample is a line of OUTPUT_DIR/benchmark.jsonl, the totals are OUTPUT_DIR/benchmark.json, and the last
line of standard output is the totals as one JSON object. A killed run goes on with --resume True.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from rich.console import Console

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments, advice_for, load
from self_speculation.measuring.benchmark import Benchmark, Scorer, score_code, score_text
from self_speculation.measuring.ceiling import Ceiling
from self_speculation.measuring.code_execution import best_isolation
from self_speculation.measuring.contestants import MOST_REPEATS
from self_speculation.measuring.figures import rounded
from self_speculation.measuring.isolation import Isolation
from self_speculation.measuring.line_up import line_up
from self_speculation.measuring.passes import TimePasses, measure_passes
from self_speculation.measuring.probes import PROBES, Probes
from self_speculation.measuring.rivals import RIVALS
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.tables import print_figures
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import fit, prompt_limit
from self_speculation.prompts.sources import read_examples
from self_speculation.rendezvous import RENDEZVOUS_HELP, RENDEZVOUS_SECONDS, all_present
from self_speculation.settings import Settings, by_flag, setting
from self_speculation.strategies import STRATEGIES

KINDS = {**STRATEGIES, **RIVALS}


@dataclass
class BenchmarkArguments(Settings):
    """What to measure besides speed, and how often."""

    repeats: int = setting(
        1, help="Rounds over all prompts; times are medians over the rounds.", at_least=1, at_most=MOST_REPEATS
    )
    batch_size: int = setting(
        1,
        help="Prompts answered at once; the next takes the place of one that ends, in lists of eight batches. "
        "Throughput is a list's tokens over its seconds, latency a row's seconds over its tokens.",
        at_least=1,
    )
    score_text: bool = setting(True, help="ROUGE, BLEU, exact match and edit distance to the data's responses.")
    judge: bool = setting(
        True,
        help="Judge every token of greedy answers, as correctness.py does. A model in 16 bits is copied in float32 for "
        "it, once all is measured.",
        is_rare=True,
    )
    execute_code: bool = setting(
        False,
        help="Run the answers to human_eval against its tests (pass@1). Off because it runs code that a model "
        "wrote. Each program is shut off from files, processes and network, by bubblewrap or else by Landlock, and "
        "has limits of time, memory, disk space and processes; the results say which. docs/sandbox.md has the rest.",
    )
    execute_code_unsafely: bool = setting(
        False,
        help="Where there is neither, run them all the same: with your rights on files and processes, and kept from "
        "the network alone.",
        is_rare=True,
    )
    resume: bool = setting(False, help="Go on with the run in --output_dir that was interrupted.")
    rendezvous_timeout: int = setting(RENDEZVOUS_SECONDS, help=RENDEZVOUS_HELP, at_least=1, is_rare=True)
    verbose: bool = setting(False, help="Print every sample's prompt, response and answers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execute_code_unsafely and not self.execute_code:
            raise ValueError("--execute_code_unsafely needs --execute_code True.")

    def isolation(self) -> Isolation | None:
        """What isolates the programs that are run; None if there are none.

        Raises:
            ValueError: nothing does, and nobody asked for that.
        """
        return best_isolation(self.execute_code_unsafely) if self.execute_code else None

    def scorers(self) -> list[Scorer]:
        """What the answers are scored by."""
        isolation = self.isolation()
        code: list[Scorer] = [] if isolation is None else [partial(score_code, isolation=isolation)]
        return [*([score_text] if self.score_text else []), *code]


@dataclass
class BenchmarkConfig(GenerationConfig):
    """How to decode: the flags of generation, for one or several strategies."""

    # Several, where the base has one: `of_each_strategy` makes configs with one each.
    generation_strategy: list[str] = setting(  # type: ignore[assignment]
        default_factory=lambda: ["autoregressive"],
        help="One or several of autoregressive, early_exit, self_speculative, and transformers' own "
        "hf_generate, hf_static (with a static cache, compiled) and hf_early_exit (with assistant_early_exit), and "
        "llama_cpp and llama_cpp_4bit (the same weights in llama.cpp).",
    )

    def check_batches(self) -> None:
        """Refuse strategies that cannot answer several prompts at once."""
        kinds = {name: KINDS[name] for name in self.generation_strategy if name in KINDS}
        for name, kind in kinds.items():
            if not kind.takes_batches:
                raise ValueError(f"--generation_strategy {name} takes one prompt at a time: it needs --batch_size 1.")
        for name, kind in kinds.items():
            if self.no_repeat_ngram_size and not kind.takes_batched_processors:
                raise ValueError(
                    f"--no_repeat_ngram_size would see the padding of {name}'s batches: it needs --batch_size 1."
                )

    def of_each_strategy(self) -> dict[str, GenerationConfig]:
        """One config a strategy; autoregressive with an exit layer, alone, is early exit."""
        names = list(dict.fromkeys(self.generation_strategy))
        if names == ["autoregressive"] and self.exit_layer is not None:
            names = ["early_exit"]
        configs = {}
        for name in names:
            unused = {"exit_layer", "num_speculations"} - set(KINDS[name].uses if name in KINDS else ())
            configs[name] = self.generation(generation_strategy=name, **dict.fromkeys(unused))
        return configs


# The flags, in the order in which `main` takes them.
GROUPS = (BenchmarkArguments, ModelArguments, DatasetArguments, BenchmarkConfig, OutputArguments)


@one_sentence_errors(go_on="What was measured is kept; the same command with --resume True goes on.")
def main(probes: Probes = PROBES, pass_costs: TimePasses = measure_passes) -> None:
    arguments, model_arguments, dataset, config, output = groups = parse(*GROUPS, description=__doc__)
    transformers.utils.logging.set_verbosity_error()
    # Gives each rank a device of its own, so before a model is loaded. Without `cpu`, ranks on CPUs would be alone.
    # Ranks wait for the slowest, however long.
    with all_present(arguments.rendezvous_timeout):
        is_main = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)).is_main_process
    if arguments.execute_code and dataset.dataset != "human_eval":
        raise ValueError(f"--execute_code needs --dataset human_eval, not {dataset.dataset}.")
    isolation = arguments.isolation()
    if arguments.batch_size > 1:
        config.check_batches()
    settings = by_flag(*groups)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load(model_arguments)
    examples = as_chats(examples, tokenizer, dataset.chat_template)
    advice = advice_for(model, dataset.dataset)
    contestants = line_up(model, tokenizer, config.of_each_strategy(), advice)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    examples, num_shortened = fit(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
    log = RunLog(Path(output.output_dir), "benchmark")
    benchmark = Benchmark(contestants, examples, log, arguments.batch_size, probes, pass_costs)
    note = partial(Console(stderr=True, quiet=not is_main).print, highlight=False, soft_wrap=True)
    if num_shortened:
        note(f"{num_shortened} of {len(examples)} prompts were shortened to {limit.most} tokens.")
    if is_main:
        log.begin(settings, arguments.resume)
        ceiling = Ceiling.measure(model, probes)
        note(ceiling.sentence)
    benchmark.run(arguments.repeats, arguments.verbose)
    if is_main:
        judge = benchmark.judge() if arguments.judge else None
        figures = benchmark.results(ceiling, arguments.scorers(), judge)
        prompts = {"samples": len(examples), "shortened": num_shortened, "most_tokens": limit.most}
        log.write(benchmark.document(ceiling, figures, isolation) | {"arguments": settings, "prompts": prompts})
        print_figures(figures, Console(highlight=False))
        note(f"{log.document} has all figures, {log.log} every answer.")
        print(json.dumps({"strategies": rounded({name: own.as_json() for name, own in figures.items()})}))
    benchmark.ranks.destroy_process_group()


if __name__ == "__main__":
    main()
