"""Does a policy keep up with the best fixed choice of each task, and beat the best fixed choice for all of them?

python benchmarks/streams.py --data_path "$LAYERSKIP_DATA" --compile default --sample False

Four streams of prompts (code, summaries, arithmetic, parses), one after the other. Autoregressive decoding, every fixed
(E, d) of a grid, our policy, and others' in the same steps (benchmarks/policies.py) answer each prompt in turns, in one
process. Policies remember: each stream begins with what the one before has taught. Ratios are of tokens a second, end
to end: over autoregressive decoding, over the best fixed choice of the stream, and, for all streams together, over the
best single one. Medians over the rounds, with their least and greatest. Reading a prompt is the same work for all
contestants, and often longer than the answer: each is given the median of all their times.

Writes OUTPUT_DIR/streams.json and .jsonl. Answers that are not autoregressive decoding's are counted.
"""

import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.policies import Del, PlusMinusOne, Scored, ScoringStrategy, WithoutLookup, WithoutStops
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.cell import Cell
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, Recommendation, advice_for
from self_speculation.measuring.contestants import Contestant, interleaved
from self_speculation.measuring.figures import rounded
from self_speculation.measuring.measurements import Measurement, Round
from self_speculation.measuring.other_work import OtherWork
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import plain_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.self_speculation_generator import AdaptiveStrategy, SelfSpeculativeStrategy
from self_speculation.settings import Settings, by_flag, setting

PLAIN = "autoregressive"
OURS = "adaptive"
ALL = "all streams"
# Dataset and file of each stream.
STREAMS = {
    "human_eval": "humaneval/HumanEval.jsonl",
    "cnn_dm_summarization": "cnn_dm/test.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "top_v2": "topv2/test.jsonl",
}
# One stream's answers, by contestant, round by round.
Answers = dict[str, list[Round]]


@dataclass
class StreamsArguments(Settings):
    """Which prompts, and which fixed choices."""

    data_path: str = setting(".", help=f"Folder with {', '.join(STREAMS.values())}.")
    num_samples: int = setting(4, help="Prompts of each stream.", at_least=1)
    max_prompt_tokens: int = setting(512, help="Longer prompts lose words of their articles.", at_least=1)
    exit_layers: list[int] = setting(default_factory=list, help="Of the grid; by default the recommended one.")
    draft_lengths: list[int] = setting(default_factory=lambda: [1, 2, 4, 6], help="Of the grid.")
    repeats: int = setting(3, help="Rounds.", at_least=1)


@dataclass
class StreamsConfig(GenerationConfig):
    """Greedy decoding."""

    max_new_tokens: int = setting(96, help="Most new tokens.", at_least=2, flag="max_steps")
    sample: bool = setting(False, help="Must be False: answers are compared.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample:
            raise ValueError("--sample must be False: answers are compared.")


@one_sentence_errors()
def main() -> None:
    arguments, model_arguments, config, output = groups = parse(
        StreamsArguments, ModelArguments, StreamsConfig, OutputArguments, description=__doc__
    )
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load_to_decode(model_arguments, config)
    line_up = LineUp(model, tokenizer, config.generation(policy_memory="run"), advice_for(model))
    prompts = {name: read_prompts(name, arguments, line_up) for name in STREAMS}
    log = RunLog(Path(output.output_dir), "streams")
    log.begin(by_flag(*groups), resume=False)
    others = OtherWork(model.device)
    rounds = measure(line_up.contestants(arguments), prompts, arguments.repeats, log)
    others.end()
    rows = [row for stream in [*STREAMS, ALL] for row in figures(stream, rounds)]
    surrounding = surroundings(model.device) | {"dtype": str(model.dtype)} | others.as_json()
    log.write({"surroundings": surrounding, "rows": rows, "arguments": by_flag(*groups)})
    Console(highlight=False).print(table(rows))
    print(verdict(rows))
    print(json.dumps({"streams": rounded(rows)}))


@dataclass(frozen=True)
class LineUp:
    """The contestants over one model."""

    model: transformers.LlamaForCausalLM
    tokenizer: transformers.PreTrainedTokenizerBase
    config: GenerationConfig
    advice: Recommendation

    def contestants(self, arguments: StreamsArguments) -> dict[str, Callable[[], Contestant]]:
        """How each is made, anew for every round: nothing is remembered from one to the next."""
        exits = arguments.exit_layers or [self.config.exit_layer or self.advice.exit_layer]
        num_layers = self.model.config.num_hidden_layers
        policies = {
            OURS: lambda: AdaptiveStrategy(self.model),
            "without lookup": lambda: AdaptiveStrategy(self.model, WithoutLookup),
            "without stops": lambda: AdaptiveStrategy(self.model, WithoutStops),
            "scored": lambda: ScoringStrategy(self.model, Scored),
            "DEL": lambda: ScoringStrategy(self.model, partial(Del, num_layers=num_layers)),
            "±1": lambda: AdaptiveStrategy(self.model, PlusMinusOne),
        }
        found = {PLAIN: partial(self.contestant, lambda: AutoregressiveStrategy(self.model))}
        for cell in itertools.starmap(Cell, itertools.product(exits, arguments.draft_lengths)):
            found[cell.name] = partial(self.contestant, lambda: SelfSpeculativeStrategy(self.model), cell)
        first = Cell(exits[0], max(arguments.draft_lengths))
        return found | {name: partial(self.contestant, make, first) for name, make in policies.items()}

    def contestant(self, make: Callable[[], GenerationStrategy], cell: Cell | None = None) -> Contestant:
        """A strategy; its exit layer and draft length, if it has any, and the draft's vocabulary to go with them."""
        config = self.config
        if cell is not None:
            draft_vocab = config.draft_vocab or self.advice.draft_vocab
            config = dataclasses.replace(
                config, exit_layer=cell.exit_layer, num_speculations=cell.num_speculations, draft_vocab=draft_vocab
            )
        return Contestant(HuggingfaceLlamaGenerator(self.tokenizer, make()), config)


def read_prompts(name: str, arguments: StreamsArguments, line_up: LineUp) -> list[list[int]]:
    """A stream's prompts, as token ids."""
    dataset = DatasetArguments(
        dataset=name,
        data_path=str(Path(arguments.data_path, STREAMS[name])),
        num_samples=arguments.num_samples,
        max_prompt_tokens=arguments.max_prompt_tokens,
    )
    model, tokenizer, config = line_up.model, line_up.tokenizer, line_up.config
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    examples = read_examples(dataset, config.seed)
    examples = shorten(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
    return [tokenizer(example.prompt)["input_ids"] for example in examples]


def measure(
    made: dict[str, Callable[[], Contestant]], prompts: dict[str, list[list[int]]], repeats: int, log: RunLog
) -> dict[str, Answers]:
    """Every contestant's answers to every stream, round by round, in turns."""
    rounds: dict[str, Answers] = {stream: {name: [] for name in made} for stream in prompts}
    turns = itertools.count()
    for repeat in range(repeats):
        contestants = {name: make() for name, make in made.items()}
        for contestant in contestants.values():
            contestant.warm_up(prompts[next(iter(prompts))][:1])
            forget(contestant)
        for stream, own in prompts.items():
            for name in contestants:
                rounds[stream][name].append(Round())
            for sample, prompt in enumerate(tqdm(own, desc=f"Round {repeat + 1}, {stream}", unit="prompt")):
                answers = interleaved(contestants, [prompt], next(turns))
                place = {"repeat": repeat, "stream": stream, "sample": sample}
                for name, [answer] in answers.items():
                    rounds[stream][name][-1].measurements.append(answer)
                    log.append(place | {"contestant": name} | short(answer))
    return rounds


def forget(contestant: Contestant) -> None:
    """What the warm-up has taught a policy."""
    strategy = contestant.generator.strategy
    if isinstance(strategy, AdaptiveStrategy):
        strategy.learnt = None


def short(answer: Measurement) -> dict[str, Any]:
    """What the log keeps of an answer."""
    return {
        "tokens": len(answer.tokens),
        "steps": len(answer.committed),
        "drafted": sum(answer.drafted),
        "accepted": sum(answer.accepted),
        "seconds": answer.seconds,
        "first_token_seconds": answer.first_token_seconds,
    }


def joined(rounds: dict[str, Answers], stream: str) -> Answers:
    """A stream's answers, or those of all."""
    if stream != ALL:
        return rounds[stream]
    names = next(iter(rounds.values()))
    together = {name: zip(*(answers[name] for answers in rounds.values()), strict=True) for name in names}
    return {
        name: [Round([one for part in parts for one in part.measurements]) for parts in own]
        for name, own in together.items()
    }


def figures(stream: str, rounds: dict[str, Answers]) -> list[dict[str, Any]]:
    """A row for each contestant: speed, and its ratios round by round."""
    answers = joined(rounds, stream)
    fixed = [name for name in answers if name.startswith("E=")]
    speeds = speeds_of(answers)
    best = max(fixed, key=lambda name: statistics.median(speeds[name]))
    rows = []
    for name, own in answers.items():
        over_plain = ratios(speeds[name], speeds[PLAIN])
        over_best = ratios(speeds[name], speeds[best])
        rows.append(
            {
                "stream": stream,
                "contestant": name,
                "tokens_per_second": statistics.median(speeds[name]),
                "over_autoregressive": statistics.median(over_plain),
                "over_autoregressive_spread": [min(over_plain), max(over_plain)],
                "over_best_fixed": statistics.median(over_best),
                "over_best_fixed_spread": [min(over_best), max(over_best)],
                "is_best_fixed": name == best,
                "unequal": unequal(own, answers[PLAIN]),
            }
        )
    return rows


def speeds_of(answers: Answers) -> dict[str, list[float]]:
    """Tokens a second of each round, where reading a prompt takes what it took in the median."""
    rounds = [one.measurements for own in answers.values() for one in own]
    reading = sum(statistics.median(answer.prefill_seconds for answer in same) for same in zip(*rounds, strict=True))

    def speed(own: Round) -> float:
        return own.total(lambda one: len(one.tokens)) / (
            reading + own.total(lambda one: one.seconds - one.prefill_seconds)
        )

    return {name: list(map(speed, own)) for name, own in answers.items()}


def ratios(one: list[float], other: list[float]) -> list[float]:
    """Round by round."""
    return [own / base for own, base in zip(one, other, strict=True)]


def unequal(own: list[Round], plain: list[Round]) -> int:
    """How many answers of the first round are not autoregressive decoding's."""
    pairs = zip(own[0].measurements, plain[0].measurements, strict=True)
    return sum(one.tokens != other.tokens for one, other in pairs)


def table(rows: list[dict[str, Any]]) -> Table:
    """Policies, autoregressive decoding and the best fixed choice of each stream."""
    shown = [row for row in rows if row["is_best_fixed"] or not row["contestant"].startswith("E=")]
    return plain_table(
        ("stream", "contestant", "tokens/s", "over\nautoregressive", "over\nbest fixed"), map(cells, shown)
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""

    def ratio(name: str) -> str:
        least, greatest = row[f"{name}_spread"]
        return f"{row[name]:.2f} ({least:.2f}–{greatest:.2f})"

    name = f"{row['contestant']} (best fixed)" if row["is_best_fixed"] else row["contestant"]
    return (
        row["stream"],
        name,
        f"{row['tokens_per_second']:.1f}",
        ratio("over_autoregressive"),
        ratio("over_best_fixed"),
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """Our policy's worst and overall ratios, and whether all answers are the same."""
    own = {row["stream"]: row for row in rows if row["contestant"] == OURS}
    tasks = [row for stream, row in own.items() if stream != ALL]
    wrong = sum(row["unequal"] for row in rows if row["stream"] == ALL)
    same = "all answers are the same" if not wrong else f"{wrong} answers differ"
    return (
        f"{OURS}: at least {min(row['over_autoregressive'] for row in tasks):.2f} × autoregressive decoding, at least "
        f"{min(row['over_best_fixed'] for row in tasks):.2f} × the best fixed choice of each stream, "
        f"{own[ALL]['over_best_fixed']:.2f} × the best single one over all; {same}."
    )


if __name__ == "__main__":
    main()
