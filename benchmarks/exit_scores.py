"""What does it cost to score every exit layer at once, against the last layer alone and against one run a layer?

python benchmarks/exit_scores.py --num_layers 12 --vocab_size 4096 --hidden_size 192 --repeats 5

A random model (times do not depend on its weights), interleaved rounds, one warm-up. Multiple choice: four
continuations of a few tokens for each context; rolling: whole windows. The last line of standard output is one JSON
object.
"""

import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from self_speculation.commands.flags import parse
from self_speculation.ending import one_sentence_errors
from self_speculation.harness.continuation_scores import ScoredText, score_continuations
from self_speculation.settings import Settings, setting


@dataclass
class ScoresArguments(Settings):
    """The model's shape, and what to score with it."""

    num_layers: int = setting(12, help="Layers.", at_least=1)
    hidden_size: int = setting(192, help="Width; heads are 32 wide, the MLP 8/3 as wide.", at_least=1)
    vocab_size: int = setting(4096, help="Tokens in the vocabulary.", at_least=1)
    context_tokens: int = setting(96, help="Tokens of a multiple-choice question.", at_least=1)
    choice_tokens: int = setting(8, help="Tokens of each of its four choices.", at_least=1)
    window_tokens: int = setting(512, help="Tokens of a window of running text.", at_least=1)
    batch_size: int = setting(8, help="Texts in a pass.", at_least=1)
    num_batches: int = setting(4, help="Batches in a round.", at_least=1)
    repeats: int = setting(5, help="Rounds.", at_least=1)
    single_runs: bool = setting(False, help="Also time one run for each exit layer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % 32:
            raise ValueError(f"--hidden_size must be a multiple of 32, not {self.hidden_size}.")


Batches = list[list[ScoredText]]


def make_model(arguments: ScoresArguments) -> LlamaForCausalLM:
    """A random model of the shape asked for."""
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.hidden_size // 32,
        num_key_value_heads=arguments.hidden_size // 32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def multiple_choice(arguments: ScoresArguments, rng: random.Random) -> Batches:
    """Questions with four choices each; every choice is a text of its own."""

    def text() -> ScoredText:
        tokens = rng.choices(range(arguments.vocab_size), k=arguments.context_tokens + arguments.choice_tokens)
        return ScoredText(tuple(tokens[:-1]), [tuple(tokens[-arguments.choice_tokens :])])

    return [[text() for _ in range(arguments.batch_size)] for _ in range(arguments.num_batches)]


def rolling(arguments: ScoresArguments, rng: random.Random) -> Batches:
    """Windows of which every token is scored."""

    def text() -> ScoredText:
        tokens = tuple(rng.choices(range(arguments.vocab_size), k=arguments.window_tokens + 1))
        return ScoredText(tokens[:-1], [tokens[1:]])

    return [[text() for _ in range(arguments.batch_size)] for _ in range(arguments.num_batches)]


def seconds(model: LlamaForCausalLM, batches: Batches, exit_layers: list[int]) -> float:
    """How long it takes to score the batches at the exit layers, together."""
    start = time.perf_counter()
    for batch in batches:
        score_continuations(model, batch, exit_layers)
    return time.perf_counter() - start


def measure(model: LlamaForCausalLM, batches: Batches, arguments: ScoresArguments) -> dict[str, float]:
    """Median seconds of each way, and the median ratio of all exits at once to the last alone, round by round."""
    every = list(range(1, arguments.num_layers + 1))
    times: dict[str, list[float]] = {"last": [], "all": [], "one by one": []}
    for index in tqdm(range(arguments.repeats + 1), unit="round", leave=False):
        found = {"last": seconds(model, batches, every[-1:]), "all": seconds(model, batches, every)}
        if arguments.single_runs:
            found["one by one"] = sum(seconds(model, batches, [exit_layer]) for exit_layer in every)
        if index:
            for name, value in found.items():
                times[name].append(value)
    ratios = [all_exits / last for all_exits, last in zip(times["all"], times["last"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    return medians | {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


@one_sentence_errors()
def main() -> None:
    [arguments] = parse(ScoresArguments, description=__doc__)
    torch.manual_seed(0)
    model = make_model(arguments)
    results = {
        "multiple choice": measure(model, multiple_choice(arguments, random.Random(0)), arguments),
        "rolling": measure(model, rolling(arguments, random.Random(0)), arguments),
    }
    table = Table("requests", "last layer (s)", "all layers (s)", "ratio (min to max)", "one by one (s)")
    for name, found in results.items():
        single = f"{found['one by one']:.2f}" if "one by one" in found else ""
        spread = f"{found['ratio']:.2f} ({found['least']:.2f} to {found['greatest']:.2f})"
        table.add_row(name, f"{found['last']:.2f}", f"{found['all']:.2f}", spread, single)
    Console(highlight=False, width=100).print(table)
    surroundings = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(results | {"arguments": asdict(arguments)} | surroundings))


if __name__ == "__main__":
    main()
