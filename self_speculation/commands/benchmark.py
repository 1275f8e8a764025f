"""Measure strategies on the same prompts, interleaved in one process: speed, acceptance, memory and text quality.

python benchmark.py --generation_strategy autoregressive self_speculative hf_generate hf_early_exit --sample False
torchrun benchmark.py --model facebook/layerskip-llama3.2-1B --dataset cnn_dm_summarization --num_samples 100 \\
    --generation_strategy self_speculative --exit_layer 8 --num_speculations 6 --output_dir ./logs

Every finished sample is a line of OUTPUT_DIR/benchmark.jsonl, the totals are OUTPUT_DIR/benchmark.json, and the last
line of standard output is the totals as one JSON object. A killed run goes on with --resume True.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.commands.flags import OutputArguments, one_sentence_errors, parse
from self_speculation.generator_base import GenerationConfig, check_exit_layer
from self_speculation.loading import STRATEGIES, ModelArguments, fill_in, load, recommendation
from self_speculation.measuring.code_execution import completion, network_isolation, pass_at_1, program
from self_speculation.measuring.figures import (
    BASELINES,
    Contestant,
    Measurement,
    Round,
    WeightBytes,
    bandwidth_share,
    ideal_speedup,
    interleaved,
    speedup,
    totals,
)
from self_speculation.measuring.prediction import measure_passes
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import last_level_cache_bytes, memory_bandwidth, surroundings
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.fitting import fit, prompt_limit
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import by_flag

# More than the defaults: the share of the ideal speed-up is no better than the passes' times.
PASS_ROUNDS = 9
PASS_CALLS = 16


@dataclass
class BenchmarkArguments:
    """What to measure besides speed, and how often."""

    repeats: int = field(default=1, metadata={"help": "Rounds over all prompts; times are medians over the rounds."})
    batch_size: int = field(
        default=1,
        metadata={
            "help": "Prompts answered together. Throughput is a batch's tokens over its seconds; latency is what a row "
            "waits until its whole batch is done. hf_early_exit takes one prompt at a time."
        },
    )
    score_text: bool = field(
        default=True, metadata={"help": "ROUGE, BLEU, exact match and edit distance to the data's responses."}
    )
    execute_code: bool = field(
        default=False,
        metadata={
            "help": "Run the answers to human_eval against its tests (pass@1). Off because it runs code that a model "
            "wrote. Each program has its own process, limits of time, memory and file size, and no network: a network "
            "namespace where the system allows one, else only blocked sockets; the results say which."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on with the run in --output_dir that was interrupted."})
    verbose: bool = field(default=False, metadata={"help": "Print every sample's prompt, response and answers."})

    def __post_init__(self) -> None:
        for name in ("repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class BenchmarkConfig(GenerationConfig):
    """How to decode: the flags of generation, for one or several strategies."""

    generation_strategy: list[str] = field(
        default_factory=lambda: ["autoregressive"],
        metadata={
            "help": "One or several of autoregressive, early_exit, self_speculative, and transformers' own "
            "hf_generate, hf_static (with a static cache, compiled) and hf_early_exit (with assistant_early_exit)."
        },
    )

    def check_batches(self) -> None:
        """Refuse strategies that cannot answer several prompts at once."""
        if "hf_early_exit" in self.generation_strategy:
            raise ValueError("--generation_strategy hf_early_exit takes one prompt at a time: it needs --batch_size 1.")
        rivals = [name for name in self.generation_strategy if name.startswith("hf_")]
        if rivals and self.no_repeat_ngram_size:
            raise ValueError(
                f"--no_repeat_ngram_size would see the padding of {rivals[0]}'s batches: it needs --batch_size 1."
            )

    def of_each_strategy(self) -> dict[str, GenerationConfig]:
        """One config a strategy; autoregressive with an exit layer, alone, is early exit."""
        names = list(dict.fromkeys(self.generation_strategy))
        if names == ["autoregressive"] and self.exit_layer is not None:
            names = ["early_exit"]
        configs = {}
        for name in names:
            unused = {"exit_layer", "num_speculations"} - set(STRATEGIES[name].uses if name in STRATEGIES else ())
            configs[name] = self.generation(generation_strategy=name, **dict.fromkeys(unused))
        return configs


class Benchmark:
    """The contestants, their prompts, and the log of what has been measured; work is shared out over the ranks.

    Samples are answered `batch_size` at a time, in order. Each is a line of the log, with the times of its batch. A
    batch of which the log has only a part is measured again as a whole, and its last lines count.
    """

    def __init__(
        self, contestants: dict[str, Contestant], examples: list[Example], log: RunLog, batch_size: int = 1
    ) -> None:
        self.contestants = contestants
        self.examples = examples
        self.log = log
        self.batch_size = batch_size
        self.ranks = PartialState()
        encode = next(iter(contestants.values())).generator.encode
        self.prompts = [encode(example.prompt) for example in examples]
        samples = range(len(examples))
        self.batches = [samples[start : start + batch_size] for start in samples[::batch_size]]

    def run(self, repeats: int, verbose: bool) -> None:
        """Measure what the log does not have yet; samples are lines as soon as all strategies have answered them."""
        todo = self._todo(repeats)
        for batch_size in {len(batch): None for _, batch in todo}:
            for contestant in self.contestants.values():
                contestant.warm_up([max(self.prompts, key=len)] * batch_size)
        unit = "sample" if self.batch_size == 1 else "batch"
        with tqdm(todo, desc="Measuring", unit=unit, disable=not self.ranks.is_main_process) as progress:
            live = {name: Round(batch_size=self.batch_size) for name in self.contestants}
            for repeat, batch in progress:
                turn = repeat + self.batches.index(batch)
                answers = interleaved(self.contestants, self.prompts_of(batch), turn)
                for row, sample in enumerate(batch):
                    of_sample = {name: measurements[row] for name, measurements in answers.items()}
                    self._append(repeat, sample, of_sample)
                    if verbose:
                        progress.write(as_text(self.examples[sample], of_sample), file=sys.stdout)
                for name, measurements in answers.items():
                    live[name].measurements += measurements
                progress.set_postfix_str(", ".join(f"{name} {live_figures(live[name])}" for name in live))
        self.ranks.wait_for_everyone()

    def prompts_of(self, batch: range) -> list[list[int]]:
        """The samples' prompts."""
        return [self.prompts[sample] for sample in batch]

    def _todo(self, repeats: int) -> list[tuple[int, range]]:
        """This rank's share of the rounds' batches that are not whole in the log, which all ranks have read."""
        self.ranks.wait_for_everyone()
        done = {(line["repeat"], line["sample"]) for line in self._lines()}
        self.ranks.wait_for_everyone()
        todo = [
            (repeat, batch)
            for repeat in range(repeats)
            for batch in self.batches
            if any((repeat, sample) not in done for sample in batch)
        ]
        return todo[self.ranks.process_index :: self.ranks.num_processes]

    def rounds(self) -> dict[str, list[Round]]:
        """Everything in the log: each strategy's rounds over all samples."""
        rounds: dict[str, list[Round]] = {name: [] for name in self.contestants}
        for line in self._lines():
            for name, values in line["strategies"].items():
                if line["sample"] == 0:
                    rounds[name].append(Round(batch_size=self.batch_size))
                rounds[name][-1].measurements.append(Measurement(**values))
        return rounds

    def peak_bytes(self) -> dict[str, int]:
        """Each strategy's most memory, on the batch whose padded prompts are largest."""
        largest = max(map(self.prompts_of, self.batches), key=lambda prompts: len(prompts) * max(map(len, prompts)))
        return {name: contestant.peak_bytes(largest) for name, contestant in self.contestants.items()}

    def ideal_speedup(self, rounds: dict[str, list[Round]]) -> float | None:
        """What the drafts' acceptance and the passes' costs allow, timed here and now; None without both strategies.

        The passes are timed in the middle of the answers to the batch that is the middle one by its prompts' sizes.
        """
        if not {"autoregressive", "self_speculative"} <= rounds.keys():
            return None
        contestant = self.contestants["self_speculative"]
        generator, config = contestant.generator, contestant.config
        batch = sorted(self.batches, key=lambda batch: sum(map(len, self.prompts_of(batch))))[len(self.batches) // 2]
        answers = [rounds["autoregressive"][0].measurements[sample].tokens for sample in batch]
        halves = [answer[: len(answer) // 2] for answer in answers]
        prompts = [prompt + half for prompt, half in zip(self.prompts_of(batch), halves, strict=True)]
        num_layers, cell = generator.model.config.num_hidden_layers, (config.exit_layer, config.num_speculations)
        request = generator.request(prompts, config)
        costs = measure_passes(generator.model, request, [cell, (num_layers, 0)], PASS_ROUNDS, PASS_CALLS)
        return ideal_speedup(rounds["self_speculative"], rounds["autoregressive"], costs, cell, num_layers)

    def _append(self, repeat: int, sample: int, answers: dict[str, Measurement]) -> None:
        self.log.append(
            {
                "repeat": repeat,
                "sample": sample,
                "prompt_tokens": len(self.prompts[sample]),
                "prompt": self.examples[sample].prompt,
                "response": self.examples[sample].response,
                "strategies": {name: asdict(measurement) for name, measurement in answers.items()},
            }
        )

    def _lines(self) -> list[dict[str, Any]]:
        found = {(line["repeat"], line["sample"]): line for line in self.log.lines()}
        lines = [found[key] for key in sorted(found)]
        for line in lines:
            if line["prompt"] != self.examples[line["sample"]].prompt:
                raise ValueError(f"--resume: sample {line['sample']} of {self.log.log} is not what the data has now.")
        return lines


@dataclass(frozen=True)
class Ceiling:
    """What the memory allows: its bandwidth, and the weights that autoregressive decoding reads for each token."""

    bytes_per_second: float
    weights: WeightBytes
    cache_bytes: int | None

    @classmethod
    def measure(cls, model: LlamaForCausalLM) -> "Ceiling":
        """Time a read-only pass over the memory of the model's device."""
        return cls(memory_bandwidth(model.device), WeightBytes.of(model), last_level_cache_bytes(model.device))

    @property
    def is_bound(self) -> bool:
        """Whether the weights must come from memory each time: they are larger than the last-level cache."""
        return self.cache_bytes is not None and self.weights.all > self.cache_bytes

    @property
    def sentence(self) -> str:
        """The ceiling in words."""
        bandwidth = f"Memory is read at {self.bytes_per_second / 1e9:.1f} GB/s"
        weights = f"an autoregressive token reads {self.weights.all / 1e6:.1f} MB of weights"
        if self.is_bound:
            most = self.bytes_per_second / self.weights.all
            return f"{bandwidth}, {weights}: at most {most:.1f} tokens/s, batch 1."
        cache = "a cache of unknown size" if self.cache_bytes is None else f"{self.cache_bytes / 1e6:.1f} MB of cache"
        return f"{bandwidth}; {weights}, and there is {cache} in front of it: no ceiling, no share of it is given."


@one_sentence_errors()
def main() -> None:
    arguments, model_arguments, dataset, config, output = groups = parse(
        BenchmarkArguments, ModelArguments, DatasetArguments, BenchmarkConfig, OutputArguments, description=__doc__
    )
    transformers.utils.logging.set_verbosity_error()
    # Gives each rank a device of its own, so before a model is loaded. Without `cpu`, ranks on CPUs would be alone.
    # Ranks wait for the slowest, however long.
    is_main = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)).is_main_process
    if arguments.execute_code and dataset.dataset != "human_eval":
        raise ValueError(f"--execute_code needs --dataset human_eval, not {dataset.dataset}.")
    if arguments.batch_size > 1:
        config.check_batches()
    settings = by_flag(*groups)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load(model_arguments)
    contestants = make_contestants(model, tokenizer, config, model_arguments.model)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    examples, num_shortened = fit(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
    benchmark = Benchmark(contestants, examples, RunLog(Path(output.output_dir), "benchmark"), arguments.batch_size)
    note = partial(Console(stderr=True, quiet=not is_main).print, highlight=False, soft_wrap=True)
    if num_shortened:
        note(f"{num_shortened} of {len(examples)} prompts were shortened to {limit.most} tokens.")
    if is_main:
        benchmark.log.begin(settings, arguments.resume)
        ceiling = Ceiling.measure(model)
        note(ceiling.sentence)
    benchmark.run(arguments.repeats, arguments.verbose)
    if is_main:
        figures = results(benchmark, ceiling, arguments)
        prompts = {"samples": len(examples), "shortened": num_shortened, "most_tokens": limit.most}
        benchmark.log.write(document(benchmark, ceiling, figures) | {"arguments": settings, "prompts": prompts})
        report(figures, Console(highlight=False))
        note(f"{benchmark.log.document} has all figures, {benchmark.log.log} every answer.")
        print(json.dumps({"strategies": rounded(figures)}))
    benchmark.ranks.destroy_process_group()


def rounded(value: Any) -> Any:
    """The same with numbers of six digits, as much as anyone reads."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def document(benchmark: Benchmark, ceiling: Ceiling, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All totals, and what they depend on."""
    model = next(iter(benchmark.contestants.values())).generator.model
    surrounding = surroundings(model.device) | {"dtype": str(model.dtype), "ranks": benchmark.ranks.num_processes}
    if any("pass_at_1" in values for values in figures.values()):
        surrounding["programs_are_kept_from_the_network_by"] = str(network_isolation())
    return {"surroundings": surrounding, "ceiling": asdict(ceiling), "strategies": figures}


def make_contestants(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, config: BenchmarkConfig, name: str
) -> dict[str, Contestant]:
    """Each strategy, with the exit layer and draft length that were given, or else recommended."""
    advice = recommendation(name, model.config.num_hidden_layers)
    contestants = {}
    for strategy, own in config.of_each_strategy().items():
        filled = fill_in(own, advice)
        contestants[strategy] = Contestant.of(model, tokenizer, filled)
        if filled.exit_layer is not None:
            check_exit_layer(filled.exit_layer, model)
    return contestants


def results(benchmark: Benchmark, ceiling: Ceiling, arguments: BenchmarkArguments) -> dict[str, dict[str, Any]]:
    """Every figure of every strategy."""
    rounds, peaks = benchmark.rounds(), benchmark.peak_bytes()
    baseline = next((name for name in BASELINES if name in rounds), next(iter(rounds)))
    figures: dict[str, dict[str, Any]] = {}
    for name, own in rounds.items():
        config = benchmark.contestants[name].config
        figures[name] = totals(own) | {"peak_memory_bytes": peaks[name]}
        if ceiling.is_bound:
            share = bandwidth_share(own, config, ceiling.weights, ceiling.bytes_per_second)
            figures[name]["bandwidth_share"] = share
        figures[name] |= {"speedup_over": baseline} | speedup(own, rounds[baseline])
        figures[name] |= {"exit_layer": config.exit_layer, "num_speculations": config.num_speculations}
        figures[name] |= text_figures([m.text for m in own[0].measurements], benchmark.examples, arguments)
    ideal = benchmark.ideal_speedup(rounds)
    if ideal:
        share = figures["self_speculative"]["decode_speedup"] / ideal
        figures["self_speculative"] |= {"ideal_decode_speedup": ideal, "share_of_ideal": share}
    return figures


def text_figures(answers: list[str], examples: list[Example], arguments: BenchmarkArguments) -> dict[str, float]:
    """Scores of the answers against the responses, and pass@1 if programs may be run."""
    figures = {}
    if arguments.score_text:
        # Needs packages that decoding and timing do without.
        from self_speculation.measuring.text_scores import text_scores

        figures |= text_scores(answers, [example.response for example in examples])
    if arguments.execute_code:
        sources = [program(example.row, completion(text)) for example, text in zip(examples, answers, strict=True)]
        outcomes = pass_at_1(sources)
        figures["pass_at_1"] = sum(outcome.passed for outcome in outcomes) / len(outcomes)
    return figures


def live_figures(one: Round) -> str:
    """Speed and acceptance so far, for the progress bar."""
    acceptance = one.counts["acceptance_rate"]
    speed = f"{one.decode_tokens_per_second:.1f}/s"
    return speed if acceptance is None else f"{speed} {acceptance:.0%}"


def as_text(example: Example, answers: dict[str, Measurement]) -> str:
    """A sample in full."""
    parts = {"prompt": example.prompt, "response": example.response}
    parts |= {name: measurement.text for name, measurement in answers.items()}
    return "\n".join(f"--- {name}\n{text}" for name, text in parts.items()) + "\n"


def report(figures: dict[str, dict[str, Any]], console: Console) -> None:
    """The tables: speed, costs, and text where it was scored; and acceptance by draft position."""
    baseline = next(iter(figures.values()))["speedup_over"]
    console.print(table(figures, SPEED_COLUMNS))
    console.print(f"Speed-up: tokens/s over {baseline}'s, end to end; over the rounds, the median (least–greatest).")
    for values in figures.values():
        if "share_of_ideal" in values:
            sentence = "Ideal: with these drafts accepted, and nothing taking time but the passes, decoding would be"
            console.print(f"{sentence} {values['ideal_decode_speedup']:.2f} times as fast as autoregressive decoding.")
    console.print()
    console.print(table(figures, COST_COLUMNS))
    console.print(table(figures, TEXT_COLUMNS))
    for name, values in figures.items():
        if values["drafted"]:
            rates = " ".join(f"{rate:.0%}" for rate in values["acceptance_by_position"])
            console.print(f"Acceptance by draft position, {name}: {rates}")


Column = Callable[[dict[str, Any]], str | None]


def table(figures: dict[str, dict[str, Any]], columns: dict[str, Column]) -> Table:
    """A row for each strategy; columns that say nothing of any are left out."""
    shown = {head: make for head, make in columns.items() if any(map(make, figures.values()))}
    result = Table("strategy", box=SIMPLE_HEAD, padding=0)
    for head in shown:
        result.add_column(head, justify="right")
    for name, values in figures.items():
        result.add_row(name, *(make(values) or "–" for make in shown.values()))
    return result


def _cell(values: dict[str, Any]) -> str | None:
    numbers = (values["exit_layer"], values["num_speculations"])
    return None if None in numbers else "{}, {}".format(*numbers)


def _speedup(values: dict[str, Any]) -> str:
    least, most = values["speedup_spread"]
    return f"{values['speedup']:.2f} ({least:.2f}–{most:.2f})"


def _column(name: str, style: str, factor: float = 1) -> Column:
    """A figure in a style, if there is one."""
    return lambda values: None if values.get(name) is None else style.format(values[name] * factor)


SPEED_COLUMNS: dict[str, Column] = {
    "E, d": _cell,
    "tokens/s": _column("tokens_per_second", "{:.1f}"),
    "decode\ntokens/s": _column("decode_tokens_per_second", "{:.1f}"),
    "accepted": _column("acceptance_rate", "{:.1%}"),
    "tokens\n/step": _column("tokens_per_step", "{:.2f}"),
    "speed-up": _speedup,
}
COST_COLUMNS = {
    "prefill\nms": _column("mean_prefill_seconds", "{:.1f}", 1e3),
    "first token\nms": _column("mean_first_token_seconds", "{:.1f}", 1e3),
    "ms/token": _column("decode_seconds_per_token", "{:.2f}", 1e3),
    "answer\nms": _column("mean_batch_seconds", "{:.0f}", 1e3),
    "peak\nMB": _column("peak_memory_bytes", "{:.1f}", 1e-6),
    "share of\nbandwidth": _column("bandwidth_share", "{:.1%}"),
    "share of\nideal": _column("share_of_ideal", "{:.0%}"),
}
TEXT_COLUMNS = {
    "rouge1": _column("rouge1", "{:.3f}"),
    "rouge2": _column("rouge2", "{:.3f}"),
    "rouge3": _column("rouge3", "{:.3f}"),
    "rougeL": _column("rougeL", "{:.3f}"),
    "bleu": _column("bleu", "{:.2f}"),
    "exact\nmatch": _column("exact_match", "{:.1%}"),
    "edit\ndistance": _column("edit_distance", "{:.1f}"),
    "pass@1": _column("pass_at_1", "{:.1%}"),
}


if __name__ == "__main__":
    main()
