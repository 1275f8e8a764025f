"""How near do decoding speeds come to what the memory allows? Measured on synthetic models of real sizes.

python benchmarks/hardware_limit.py --minutes 9
python benchmarks/hardware_limit.py --shapes 160m --dtype float32 --max_steps 64 --batch_sizes 1 2

Autoregressive decoding is set against the bandwidth, self-speculative decoding against the speed-up that section 4's
arithmetic of weight reads allows at the acceptance measured, and both against transformers' own. Results are written
after every part to OUTPUT_DIR/hardware_limit.json and .md; what does not begin within --minutes is skipped, and said
to be skipped.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from benchmarks.synthetic import (
    CONTEXT,
    Goal,
    byte_tokenizer,
    choose_dtype,
    damp_to,
    find_shape,
    make_model,
    random_prompts,
    sentence,
)
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import choose_device
from self_speculation.measuring import tables
from self_speculation.measuring.ceiling import Ceiling, Memory, WeightBytes
from self_speculation.measuring.contestants import WARM_UP_TOKENS, Contestant, WarmUp, interleaved
from self_speculation.measuring.figures import Comparison, Counts, SpeedUp, Totals
from self_speculation.measuring.line_up import make_contestant
from self_speculation.measuring.measurements import Round
from self_speculation.measuring.other_work import OtherWork
from self_speculation.measuring.probes import PROBES, Probes
from self_speculation.measuring.rivals import RIVALS, TRANSFORMERS_RIVALS
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import styled
from self_speculation.settings import Settings, setting
from self_speculation.strategies import strategy_type

OWN = ("autoregressive", "self_speculative")
CUDA_SHAPES = ["llama3.2-1b", "llama2-7b"]

Figures = dict[str, Any]
# Seconds since some moment.
Clock = Callable[[], float]


@dataclass
class LimitArguments(Settings):
    """What to measure, and for how long."""

    shapes: list[str] | None = setting(
        None, help=f"Shapes of benchmarks/synthetic.py. Default on CUDA: {', '.join(CUDA_SHAPES)}."
    )
    batch_sizes: list[int] = setting(
        default_factory=lambda: [1, 2, 4, 8, 16, 32], help="Batches whose throughput is measured."
    )
    max_steps: int = setting(256, help="New tokens of every answer.")
    prompt_tokens: int = setting(64, help="Tokens of every prompt, random.", at_least=1)
    num_prompts: int = setting(2, help="Prompts at batch 1.", at_least=1)
    repeats: int = setting(2, help="Rounds; times are medians over them.", at_least=1)
    rivals: list[str] = setting(
        default_factory=lambda: list(TRANSFORMERS_RIVALS),
        help=f"Of {', '.join(RIVALS)}; hf_static compiles, which takes its time.",
    )
    compile: Literal["none", "default", "max"] = setting(
        "none", help="How our strategies' steps are compiled; each batch size anew."
    )
    minutes: float = setting(9.0, help="No part begins later than this.")
    device: str | None = setting(None, help="cuda, cpu …; CUDA by default where there is any.")
    dtype: str = setting("bfloat16", help="float64, float32, bfloat16 or float16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < 2:
            raise ValueError(f"--max_steps must be at least 2, not {self.max_steps}: the first token is not decoding.")
        if self.prompt_tokens + self.max_steps > CONTEXT:
            raise ValueError(f"--prompt_tokens and --max_steps must be at most {CONTEXT} together.")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"--batch_sizes must be at least 1, not {min(self.batch_sizes)}.")
        if self.minutes <= 0:
            raise ValueError(f"--minutes must be positive, not {self.minutes}.")
        for name in self.rivals:
            if name not in RIVALS:
                raise ValueError(f"--rivals may be {', '.join(RIVALS)}, not {name!r}.")
        for name in self.shapes or ():
            find_shape(name)

    def shapes_for(self, device: torch.device) -> list[str]:
        """The shapes asked for, each once."""
        if self.shapes is None and device.type != "cuda":
            raise ValueError("--shapes must be given without CUDA; 160m and tiny are small ones.")
        return list(dict.fromkeys(self.shapes or CUDA_SHAPES))


@dataclass(frozen=True)
class ReadShares:
    """What a pass reads, in units of all layers' weights: E layers, the head, and the head as the draft reads it.

    e, h and h_d of the arithmetic of memory-bound decoding.
    """

    early: float
    head: float
    draft_head: float

    @classmethod
    def of(cls, weights: WeightBytes, exit_layer: int, draft_share: float = 1.0) -> "ReadShares":
        """From the bytes of layers and head, and the share of the head's rows that drafting reads."""
        layers, head = sum(weights.layers), weights.head
        return cls(sum(weights.layers[:exit_layer]) / layers, head / layers, draft_share * head / layers)


def ideal_speedup(tokens_per_step: float, drafts_per_step: float, shares: ReadShares) -> float:
    """S = τ (1 + h) / [d (e + h_d) + 1 + h]: the speed-up if a step took the time in which its weights are read.

    τ is measured, 1 + d times the share of drafted tokens that were accepted; where a token is accepted with chance α
    whatever went before, it is (1 − α^{d+1}) / (1 − α). The last steps of an answer draft less, so d is a mean.
    """
    read = drafts_per_step * (shares.early + shares.draft_head) + 1 + shares.head
    return tokens_per_step * (1 + shares.head) / read


@dataclass
class ShapeStudy:
    """All that is measured of one shape, part by part."""

    shape: str
    arguments: LimitArguments
    goal: Goal
    memory: Memory
    probes: Probes = PROBES
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    batches: dict[int, dict[str, Figures]] = field(default_factory=dict)
    warm_ups: dict[str, WarmUp] = field(default_factory=dict)

    @cached_property
    def model(self) -> LlamaForCausalLM:
        """The synthetic model, damped to the acceptance asked for."""
        device = choose_device(self.arguments.device)
        dtype = choose_dtype(self.arguments.dtype, device)
        model = make_model(find_shape(self.shape).config(self.shape), device, dtype, self.goal.seed)
        damp_to(model, self.goal.for_model(model))
        return model

    @cached_property
    def contestants(self) -> dict[str, Contestant]:
        """Our strategies and transformers'."""
        tokenizer = byte_tokenizer()
        return {name: make_contestant(self.model, tokenizer, self.config(name)) for name in self.names}

    @property
    def names(self) -> list[str]:
        """The strategies, ours first."""
        return [*OWN, *dict.fromkeys(self.arguments.rivals)]

    @cached_property
    def ceiling(self) -> Ceiling:
        """What the memory allows."""
        return Ceiling(self.memory, WeightBytes.of(self.model))

    def config(self, strategy: str) -> GenerationConfig:
        """How a strategy decodes: greedy, with exit layer and draft length if it uses them."""
        goal = self.goal.for_model(self.model)
        config = GenerationConfig(generation_strategy=strategy)
        own = {name: getattr(goal, name) for name in strategy_type(config, RIVALS).uses}
        return GenerationConfig(
            max_new_tokens=self.arguments.max_steps,
            generation_strategy=strategy,
            sample=False,
            seed=goal.seed,
            compile=self.arguments.compile if strategy in OWN else "none",
            **own,
        )

    def prompts(self, count: int) -> list[list[int]]:
        """Random prompts, others than those that the acceptance was set on."""
        return random_prompts(self.model.config.vocab_size, count, self.arguments.prompt_tokens, self.goal.seed + 1)

    def parts(self) -> dict[str, Callable[[], Figures]]:
        """What to do, in order; each returns what is new in the document."""
        warm_ups = {f"warm-up of {name}": partial(self.warm_up, name) for name in self.names}
        rounds = {f"round {number}": self.add_round for number in range(1, self.arguments.repeats + 1)}
        sizes = dict.fromkeys(self.arguments.batch_sizes)
        batches = {f"batch size {size}": partial(self.add_batch, size) for size in sizes}
        return {"model": self.describe, **warm_ups, **rounds, "peak memory": self.add_peaks, **batches}

    def describe(self) -> Figures:
        """The model, and the ceiling of autoregressive decoding at batch 1 where memory bounds it."""
        return {
            "sentence": sentence(self.model.config),
            "parameters": self.model.num_parameters(),
            "weight_bytes_read": self.ceiling.weights.all,
            "most_autoregressive_tokens_per_second": self.ceiling.most_tokens_per_second,
            "damping": self.model.config.synthetic_damping,
        }

    def warm_up(self, name: str) -> Figures:
        """Answers that do not count: what a strategy compiles, it compiles here. Ours answer in full."""
        most = self.arguments.max_steps if name in OWN else WARM_UP_TOKENS
        self.warm_ups[name] = self.contestants[name].warm_up(self.prompts(1), most)
        return {}

    def add_round(self) -> Figures:
        """Every strategy's answers to all prompts, batch 1, interleaved."""
        new = {name: Round() for name in self.names}
        turn = len(self.rounds.get(OWN[0], ()))
        for index, prompt in enumerate(self.prompts(self.arguments.num_prompts)):
            for name, answers in interleaved(self.contestants, [prompt], turn + index).items():
                new[name].measurements += answers
        for name, one in new.items():
            self.rounds.setdefault(name, []).append(one)
        figures = {
            name: self.figures(name, self.rounds) | self.ideal(name) | self.preparing(name) for name in self.names
        }
        return {"strategies": figures}

    def figures(self, name: str, rounds: dict[str, list[Round]]) -> Figures:
        """A strategy's figures over the rounds so far; how near the bandwidth, where that is what bounds."""
        own = rounds[name]
        share = self.ceiling.share(own, self.contestants[name])
        return Comparison.of(own, rounds[OWN[0]]).as_json() | {"rounds": len(own), "bandwidth_share": share}

    def preparing(self, name: str) -> Figures:
        """Seconds for building and compiling before a strategy's first answer."""
        return {"preparing_seconds": self.warm_ups[name].preparing_seconds(Totals.of(self.rounds[name]).times)}

    def ideal(self, name: str) -> Figures:
        """Exit layer and draft length, and how near their ideal a strategy that drafts is at batch 1."""
        rounds, config = self.rounds[name], self.contestants[name].config
        cell = {"exit_layer": config.exit_layer, "num_speculations": config.num_speculations}
        counts = Counts.of(rounds[0])
        if not counts.drafted:
            return cell | {"ideal_speedup": None, "ideal_share": None}
        vocab_size = self.model.config.vocab_size
        draft_share = (config.draft_vocab or vocab_size) / vocab_size
        shares = ReadShares.of(self.ceiling.weights, config.exit_layer, draft_share)
        ideal = ideal_speedup(counts.tokens_per_step, counts.drafted / counts.steps, shares)
        reached = SpeedUp.of(rounds, self.rounds[OWN[0]]).decode_speedup
        return cell | {"ideal_speedup": ideal, "ideal_share": reached / ideal}

    def add_peaks(self) -> Figures:
        """Every strategy's most memory at batch 1, weights included."""
        prompts = self.prompts(1)
        peaks = {name: one.peak_bytes(prompts, self.probes) for name, one in self.contestants.items()}
        return {"peak_bytes": peaks}

    def add_batch(self, size: int) -> Figures:
        """Our strategies' throughput at a batch size, interleaved, after a run that does not count."""
        contestants = {name: self.contestants[name] for name in OWN}
        rounds: dict[str, list[Round]] = {name: [] for name in OWN}
        for contestant in contestants.values():
            contestant.run(self.prompts(size))
        for turn in range(self.arguments.repeats):
            for name, answers in interleaved(contestants, self.prompts(size), turn).items():
                rounds[name].append(Round(answers, list_size=size))
        self.batches[size] = {name: self.figures(name, rounds) for name in OWN}
        return {"batches": self.batches}


class Study:
    """Runs the parts of all shapes until the time is up, and writes down what is known after each."""

    def __init__(
        self, arguments: LimitArguments, goal: Goal, log: RunLog, probes: Probes = PROBES, clock: Clock = time.monotonic
    ) -> None:
        self.clock = clock
        self.probes = probes
        self.deadline = clock() + 60 * arguments.minutes
        self.arguments = arguments
        self.goal = goal
        self.log = log
        self.device = choose_device(arguments.device)
        self.shapes = arguments.shapes_for(self.device)
        choose_dtype(arguments.dtype, self.device)
        settings = asdict(arguments) | asdict(goal)
        log.begin(settings, resume=False)
        self.document: Figures = {
            "synthetic": True,
            "arguments": settings,
            "surroundings": surroundings(self.device) | {"dtype": arguments.dtype},
            "shapes": {},
            "skipped": [],
        }

    def run(self, note: Callable[[str], None]) -> None:
        """Every shape, one after the other; `note` is told what is done."""
        others = OtherWork(self.device, note)
        self.document["surroundings"] |= others.as_json()
        memory = Memory.measure(self.device, self.probes)
        self.document["memory"] = asdict(memory)
        for shape in self.shapes:
            self._run_shape(ShapeStudy(shape, self.arguments, self.goal, memory, self.probes), note)
            # The next model needs the room.
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        others.end()
        self.document["surroundings"] |= others.as_json()
        self._write()

    def _run_shape(self, study: ShapeStudy, note: Callable[[str], None]) -> None:
        found = {"synthetic": True, "name": f"synthetic-{study.shape}"}
        self.document["shapes"][study.shape] = found
        for name, part in study.parts().items():
            start = self.clock()
            if start > self.deadline:
                self.document["skipped"].append(f"{study.shape}: {name}")
                note(f"{study.shape}: {name} skipped, --minutes {self.arguments.minutes:g} are over.")
            else:
                found |= part()
                note(f"{study.shape}: {name}, {self.clock() - start:.1f} s.")
            self._write()

    def _write(self) -> None:
        self.log.write(self.document)
        self.markdown.write_text(as_markdown(self.document), encoding="utf-8")

    @property
    def markdown(self) -> Path:
        """Where the tables stand, to be pasted."""
        return self.log.document.with_suffix(".md")


@dataclass(frozen=True)
class Grid:
    """A table of text: names in the first columns, numbers in the others."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    num_names: int

    def rich(self) -> Table:
        """For the terminal."""
        table = tables.plain_table(self.columns, self.rows, self.num_names)
        for column in table.columns[: self.num_names]:
            column.no_wrap = True
        return table

    def markdown(self) -> str:
        """For a README."""
        return tables.markdown(self.columns, self.rows, self.num_names)


SPEED_COLUMNS = (
    "synthetic model",
    "strategy",
    "E, d",
    "tokens/s, decoding",
    "of bandwidth",
    "accepted",
    "tokens per step",
    "speed-up",
    "ideal",
    "of ideal",
)
COST_COLUMNS = ("synthetic model", "strategy", "first token, ms", "peak memory, GB", "preparing, s")
BATCH_COLUMNS = ("synthetic model", "batch", *(f"`{name}` tokens/s" for name in OWN), "speed-up", "accepted")


def speed_grid(shapes: dict[str, Figures]) -> Grid:
    """Batch 1: a row for each shape and strategy."""
    rows = []
    for found in shapes.values():
        for name, one in found.get("strategies", {}).items():
            drafts = one["num_speculations"] is not None
            rows.append(
                (
                    found["name"],
                    f"`{name}`",
                    f"{one['exit_layer']}, {one['num_speculations']}" if drafts else "",
                    styled(one["decode_tokens_per_second"], "{:.1f}"),
                    styled(one["bandwidth_share"], "{:.1%}"),
                    styled(one["acceptance_rate"], "{:.1%}"),
                    styled(one["tokens_per_step"], "{:.2f}"),
                    styled(one["decode_speedup"], "{:.2f}"),
                    styled(one["ideal_speedup"], "{:.2f}"),
                    styled(one["ideal_share"], "{:.1%}"),
                )
            )
    return Grid(SPEED_COLUMNS, rows, num_names=2)


def cost_grid(shapes: dict[str, Figures]) -> Grid:
    """What stands beside the speed at batch 1: a row for each shape and strategy."""
    rows = []
    for found in shapes.values():
        for name, one in found.get("strategies", {}).items():
            peak = found.get("peak_bytes", {}).get(name)
            first, preparing = one["mean_first_token_seconds"], one["preparing_seconds"]
            figures = styled(first, "{:.1f}", 1e3), styled(peak, "{:.2f}", 1e-9), styled(preparing, "{:.1f}")
            rows.append((found["name"], f"`{name}`", *figures))
    return Grid(COST_COLUMNS, rows, num_names=2)


def batch_grid(shapes: dict[str, Figures]) -> Grid:
    """A row for each shape and batch size."""
    rows = []
    for found in shapes.values():
        for size, strategies in found.get("batches", {}).items():
            speeds = [f"{strategies[name]['decode_tokens_per_second']:.1f}" for name in OWN]
            own = strategies["self_speculative"]
            rows.append(
                (found["name"], str(size), *speeds, f"{own['decode_speedup']:.2f}", f"{own['acceptance_rate']:.1%}")
            )
    return Grid(BATCH_COLUMNS, rows, num_names=1)


def grids(shapes: dict[str, Figures]) -> list[Grid]:
    """The tables that have rows."""
    return [grid for grid in (speed_grid(shapes), cost_grid(shapes), batch_grid(shapes)) if grid.rows]


def as_markdown(document: Figures) -> str:
    """The tables, where they come from, and what is missing."""
    machine = document["surroundings"]
    speed = document["memory"]["bytes_per_second"] / 1e9
    head = (
        f"Synthetic models (random weights; acceptance set, see benchmarks/synthetic.py), {machine['dtype']}, "
        f"{machine['device']}, memory read at {speed:.0f} GB/s, torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}, {machine['date'][:10]}, commit {machine['commit']}. "
        f"Greedy, {document['arguments']['max_steps']} new tokens; speed-up and ideal are over `autoregressive`.\n"
    )
    caveat = [f"{machine['caveat']}\n"] if "caveat" in machine else []
    parts = [head, *caveat, *(grid.markdown() for grid in grids(document["shapes"]))]
    if document["skipped"]:
        parts.append(f"Skipped for want of time: {'; '.join(document['skipped'])}.\n")
    return "\n".join(parts)


@one_sentence_errors()
def main(probes: Probes = PROBES, clock: Clock = time.monotonic) -> None:
    arguments, goal, output = parse(LimitArguments, Goal, OutputArguments, description=__doc__)
    transformers.utils.logging.set_verbosity_error()
    study = Study(arguments, goal, RunLog(Path(output.output_dir), "hardware_limit"), probes, clock)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    study.run(errors.print)
    # Where there is no terminal, the tables need more room than rich takes.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for found in study.document["shapes"].values():
        console.print(found.get("sentence", f"{found['name']}: nothing was measured."), soft_wrap=True)
    for grid in grids(study.document["shapes"]):
        console.print(grid.rich())
    if study.document["skipped"]:
        console.print(f"Skipped for want of time: {'; '.join(study.document['skipped'])}.", soft_wrap=True)
    print(f"{study.log.document} has all figures, {study.markdown} the tables.")


if __name__ == "__main__":
    main()
