"""Would leaves beside the draft pay? What tree drafts in the shape of a caterpillar would gain, before any are built.

python benchmarks/caterpillar.py --exit_layer 2:4 --dataset human_eval --num_samples 20 --max_steps 128
python benchmarks/caterpillar.py --exit_layer 3 --num_speculations 1,2,3,4,6,8 --compile default --measure_passes True

The exit drafts d tokens as ever. At each of their places its next choices, two by default, would stand as leaves, and
be verified in the same pass. Where a draft is overruled, and the full model's token is a leaf, the step gives one token
more: τ' = τ + (1 − α^d)·s tokens, where α is how likely a draft is accepted, and s how likely an overruling token is a
leaf. Both are counted on the full model's own greedy answers, which every exit reads once. So are the steps with and
without leaves, which for greedy decoding is exact; the formula's figures stand in the JSON beside them.

A leaf is one row more of the verification, and all layers read it, not only those behind the exit. What that costs is
measured (`--measure_passes True`). Else passes cost what their layers do, and a leaf what `--row_cost` says, by default
nothing: what does not pay then never does. The last two lines are the verdict and one JSON object; that is written to
OUTPUT_DIR/caterpillar.json, too.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.commands.correctness import CorrectnessConfig
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.cache import Uncached
from self_speculation.decoding.cell import Cell
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.early_exit import check_exit_layer, forward_adapter, forward_exits, head_logits
from self_speculation.decoding.kernels import forward_early, forward_remainder
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import process_logits
from self_speculation.decoding.step import EagerPasses
from self_speculation.decoding.verification import most_probable
from self_speculation.ending import one_sentence_errors
from self_speculation.exit_adapter import exit_adapter
from self_speculation.generator_base import GenerationConfig, GenerationRequest, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, advice_for
from self_speculation.measuring.passes import Timing
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import plain_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.settings import Settings, by_flag, setting

# The gain in speed that is worth what trees of drafts would add to the code.
BAR = 0.08
DRAFT_LENGTHS = (1, 2, 4, 8)


@dataclass
class CaterpillarArguments(Settings):
    """Leaves, and what they cost."""

    leaves: int = setting(2, help="Leaves at each drafted place: the exit's second choice, its third …", at_least=1)
    row_cost: float = setting(0.0, help="What a leaf adds to a step, as a share of the step's time.", at_least=0)
    measure_passes: bool = setting(False, help="Time the passes, with leaves and without, in place of that.")
    rounds: int = setting(9, help="Rounds of that; figures are medians over them.", at_least=1)


@dataclass
class CaterpillarConfig(CorrectnessConfig):
    """Greedy decoding, and a grid of exit layers and draft lengths."""

    max_new_tokens: int = setting(128, help="Most new tokens.", at_least=1, flag="max_steps")
    sample: bool = setting(False, help="Must be False: which token overrules a draft is told for greedy decoding.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample:
            raise ValueError("--sample must be False: which token overrules a draft is told for greedy decoding.")
        if 0 in self.draft_lengths:
            raise ValueError("--num_speculations must be at least 1 here: leaves stand beside drafts.")


@dataclass(frozen=True)
class RankedAnswer:
    """The full model's answer: the rank of each token at each exit, where 0 is its choice; how long it might be."""

    ranks: dict[int, list[int]]
    limit: int


@dataclass
class Counts:
    """What one (E, d) met in all answers: tokens and steps, drafts accepted and overruled, and by leaves how often."""

    tokens: int = 0
    steps: int = 0
    steps_with_leaves: int = 0
    accepted: int = 0
    overruled: int = 0
    by_leaves: int = 0

    def add(self, answer: RankedAnswer, cell: Cell, leaves: int) -> None:
        """One more answer."""
        ranks, drafts = answer.ranks[cell.exit_layer], cell.num_speculations
        plain = list(walk(ranks, drafts, answer.limit))
        overruling = [rank for _, rank in plain if rank is not None]
        self.tokens += len(ranks)
        self.steps += len(plain)
        self.steps_with_leaves += len(list(walk(ranks, drafts, answer.limit, leaves)))
        self.accepted += sum(accepted for accepted, _ in plain)
        self.overruled += len(overruling)
        self.by_leaves += sum(rank <= leaves for rank in overruling)

    @property
    def alpha(self) -> float:
        """α: how likely a draft is accepted, if those before it were."""
        return self.accepted / max(self.accepted + self.overruled, 1)

    @property
    def leaf_chance(self) -> float:
        """s: how likely the token that overrules a draft is a leaf."""
        return self.by_leaves / max(self.overruled, 1)

    @property
    def gain_in_tokens(self) -> float:
        """τ'/τ − 1: tokens a step with leaves over those without."""
        return self.steps / self.steps_with_leaves - 1

    def as_json(self, drafts: int) -> dict[str, Any]:
        """The counts, τ and τ' by them, and by the formula."""
        tau = sum(self.alpha**power for power in range(drafts + 1))
        return vars(self) | {
            "alpha": self.alpha,
            "leaf_chance": self.leaf_chance,
            "tokens_per_step": self.tokens / self.steps,
            "tokens_per_step_with_leaves": self.tokens / self.steps_with_leaves,
            "gain_in_tokens": self.gain_in_tokens,
            "tokens_per_step_by_formula": tau,
            "tokens_per_step_with_leaves_by_formula": tau + (1 - self.alpha**drafts) * self.leaf_chance,
        }


def walk(ranks: Sequence[int], drafts: int, limit: int, leaves: int = 0) -> Iterator[tuple[int, int | None]]:
    """The steps of an answer: how many drafts were accepted, and the rank of the token that overruled one, if any did.

    Where that is a leaf the step commits it and the token after it.
    """
    first = 0
    while first < len(ranks):
        drafted = ranks[first : first + min(drafts, limit - first - 1)]
        accepted = next((place for place, rank in enumerate(drafted) if rank), len(drafted))
        overruling = drafted[accepted] if accepted < len(drafted) else None
        yield accepted, overruling
        first += accepted + 1 + (overruling is not None and overruling <= leaves)


# Reading the answers


@torch.inference_mode()
def exit_ranks(model: LlamaForCausalLM, request: GenerationRequest, answer: list[int], exit_layer: int) -> list[int]:
    """The rank of each token of an answer among the exit's choices, of which equal ones come in the vocabulary's order.

    The exit drafts as in decoding: behind its adapter, if there is one, with the tokens of `draft_vocab`.
    """
    [prompt], processors = request.prompts, request.all_processors()
    tokens_1T = torch.tensor([prompt + answer], device=model.device)
    positions_1T = torch.arange(tokens_1T.shape[1], device=model.device)[None]
    normed_1TD = read_by_head(model, tokens_1T, exit_layer)
    drafting = slice(len(prompt) - 1, -1)
    logits_1NV = _draft_logits(model, request.config, normed_1TD[:, drafting])
    if processors:
        logits_1NV = process_logits(logits_1NV, processors, tokens_1T, positions_1T[:, drafting])
    return ranks_of(logits_1NV, tokens_1T[:, len(prompt) :])[0].tolist()


def read_by_head(model: LlamaForCausalLM, tokens_1T: Tensor, exit_layer: int) -> Tensor:
    """What the LM head reads of an exit (1, T, D): behind its adapter, if there is one, or behind the final norm."""
    [states_1TD] = forward_exits(model, tokens_1T, [exit_layer])
    adapter = exit_adapter(model, exit_layer)
    if adapter is None:
        return model.model.norm(states_1TD)
    positions_1T = torch.arange(tokens_1T.shape[1], device=tokens_1T.device)[None]
    return forward_adapter(model, adapter, states_1TD, positions_1T, Uncached())


def _draft_logits(model: LlamaForCausalLM, config: GenerationConfig, normed_1ND: Tensor) -> Tensor:
    if config.draft_vocab is None:
        return head_logits(model, normed_1ND)
    return DraftHead.of(model, config.draft_vocab).logits(normed_1ND)


def ranks_of(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """How many tokens (B, T) are chosen before these: those of greater logits, and of equal ones the earlier tokens."""
    own_BT1 = logits_BTV.gather(-1, tokens_BT[..., None])
    is_earlier_BTV = torch.arange(logits_BTV.shape[-1], device=tokens_BT.device) < tokens_BT[..., None]
    return ((logits_BTV > own_BT1) | ((logits_BTV == own_BT1) & is_earlier_BTV)).sum(-1)


def ranked_answers(
    generator: HuggingfaceLlamaGenerator, prompts: list[list[int]], config: CaterpillarConfig, exit_layers: list[int]
) -> Iterator[RankedAnswer]:
    """The full model's answers, as every exit reads them."""
    generation, context = config.generation(), generator.model.config.max_position_embeddings
    for first in tqdm(range(0, len(prompts), config.batch_size), desc="Answering", unit="batch"):
        batch = prompts[first : first + config.batch_size]
        for prompt, answer in zip(batch, generator.generate(batch, generation), strict=True):
            request = generator.request([prompt], generation)
            ranks = {depth: exit_ranks(generator.model, request, answer.tokens, depth) for depth in exit_layers}
            yield RankedAnswer(ranks, min(config.max_new_tokens, context - len(prompt)))


# Timing


@dataclass(frozen=True)
class Width:
    """The rows of a verification: those that layers [0, E) read first, and those that layers [E, L) read."""

    exit_layer: int
    early: int
    late: int

    @classmethod
    def of(cls, cell: Cell, leaves: int = 0) -> "Width":
        """Of a draft: its last token and all leaves; and the pending token, the draft and all leaves."""
        drafts = cell.num_speculations
        return cls(cell.exit_layer, 1 + leaves * drafts, 1 + (1 + leaves) * drafts)


@dataclass(frozen=True)
class StepSeconds:
    """What passes take: a token's draft by E, a verification by its rows, and a step of autoregressive decoding.

    `row_cost` is added for each leaf, as a share of the step, where verifications do not tell it.
    """

    draft: dict[int, float]
    verification: dict[Width, float]
    autoregressive: float
    row_cost: float = 0.0

    @classmethod
    def by_layers(cls, cells: list[Cell], num_layers: int, arguments: CaterpillarArguments) -> "StepSeconds":
        """What they take at best: as long as their layers are read, whatever the rows, and nothing for the LM head."""
        widths = [Width.of(cell, leaves) for cell, leaves in product(cells, (0, arguments.leaves))]
        draft = {cell.exit_layer: cell.exit_layer / num_layers for cell in cells}
        return cls(draft, dict.fromkeys(widths, 1.0), 1.0, arguments.row_cost)

    def step(self, cell: Cell, leaves: int = 0) -> float:
        """A step with or without leaves."""
        drafts = cell.num_speculations
        seconds = drafts * self.draft[cell.exit_layer] + self.verification[Width.of(cell, leaves)]
        return seconds * (1 + leaves * drafts * self.row_cost)


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM, request: GenerationRequest, cells: list[Cell], arguments: CaterpillarArguments
) -> StepSeconds:
    """Time the passes of every (E, d), with and without leaves, interleaved, after the request's prompt."""
    num_layers = model.config.num_hidden_layers
    alone = Width(num_layers, 1, 1)
    widths = {alone} | {Width.of(cell, leaves) for cell, leaves in product(cells, (0, arguments.leaves))}
    passes, rows = _waiting(model, request, max(width.late for width in widths))
    runs: dict[int | Width, Callable[[], object]] = {
        width: partial(verification, _cut(passes, width.exit_layer, request.config), rows, width) for width in widths
    }
    for exit_layer in {cell.exit_layer for cell in cells}:
        runs[exit_layer] = partial(_cut(passes, exit_layer, request.config).draft, rows, 0)
    seconds: dict[int | Width, list[float]] = {key: [] for key in runs}
    timing = Timing()
    for _ in tqdm(range(arguments.rounds), desc="Timing passes", unit="round"):
        for key, run in runs.items():
            seconds[key].append(timing.seconds(run))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return StepSeconds(
        draft={key: value for key, value in median.items() if isinstance(key, int)},
        verification={key: value for key, value in median.items() if isinstance(key, Width)},
        autoregressive=median[alone],
    )


def _waiting(model: LlamaForCausalLM, request: GenerationRequest, width: int) -> tuple[EagerPasses, Rows]:
    """The prefilled prompt, with room for a verification of so many rows; it does not advance."""
    strategy, num_layers = SelfSpeculativeStrategy(model), model.config.num_hidden_layers
    config = dataclasses.replace(request.config, exit_layer=num_layers, num_speculations=width, compile="none")
    session = strategy.begin(dataclasses.replace(request, config=config))
    session.step.rows.active_B.zero_()
    session.look_ahead(width)
    return dataclasses.replace(session.step.passes, kernels=strategy.kernels(request.config)), session.step.rows


def _cut(passes: EagerPasses, exit_layer: int, config: GenerationConfig) -> EagerPasses:
    """The passes of a model that is cut at another layer."""
    at_exit = dataclasses.replace(config, exit_layer=exit_layer, num_speculations=1)
    return dataclasses.replace(passes, plan=SelfSpeculativeStrategy(passes.model).plan(at_exit))


def verification(passes: EagerPasses, rows: Rows, width: Width) -> Tensor:
    """The tokens (1, T) of a verification of so many rows; which they are, and who sees whom, takes no time."""
    kernels, early_1T, late_1T = passes.kernels, rows.positions(width.early), rows.positions(width.late)
    states_1TD = forward_early(kernels, rows.read(early_1T), width.exit_layer, early_1T, rows.cache)
    if passes.plan.adapter is not None:
        kernels.run_adapter(passes.plan.adapter, states_1TD, early_1T, rows.cache)
    drafted_1TD = states_1TD[:, :1].expand(-1, width.late - width.early, -1)
    layers = range(width.exit_layer, passes.plan.num_layers)
    hidden_1TD = torch.cat([states_1TD, drafted_1TD], dim=1)
    hidden_1TD = forward_remainder(kernels, hidden_1TD, layers, late_1T, rows.cache)
    return most_probable(kernels.logits(hidden_1TD, passes.model.model.norm))


# Results


@dataclass(frozen=True)
class Outcome:
    """One (E, d): what it counted, how many times as long a step with leaves takes, and the speeds without and with.

    Speeds are tokens a second over autoregressive decoding's.
    """

    cell: Cell
    counts: Counts
    step_factor: float
    plain: float
    leafy: float

    @classmethod
    def of(cls, cell: Cell, counts: Counts, seconds: StepSeconds, leaves: int) -> "Outcome":
        """By what passes take."""
        without, with_leaves = seconds.step(cell), seconds.step(cell, leaves)
        plain = counts.tokens / counts.steps / without * seconds.autoregressive
        leafy = counts.tokens / counts.steps_with_leaves / with_leaves * seconds.autoregressive
        return cls(cell, counts, with_leaves / without, plain, leafy)

    @property
    def gain(self) -> float:
        """The gain in tokens a second over the same (E, d) without leaves."""
        return self.leafy / self.plain - 1

    def as_json(self) -> dict[str, Any]:
        """Everything, for the record."""
        own = self.cell._asdict() | self.counts.as_json(self.cell.num_speculations)
        speeds = {"speed": self.plain, "speed_with_leaves": self.leafy}
        return own | {"step_factor": self.step_factor, "gain": self.gain} | speeds

    def as_text(self) -> tuple[str, ...]:
        """A row of the table."""
        found = self.counts
        return (
            *map(str, self.cell),
            f"{found.alpha:.1%}",
            f"{found.leaf_chance:.1%}",
            f"{found.tokens / found.steps:.2f}",
            f"{found.tokens / found.steps_with_leaves:.2f}",
            f"{found.gain_in_tokens:+.1%}",
            f"{self.step_factor:.3f}",
            f"{self.gain:+.1%}",
            f"{self.plain:.2f}",
            f"{self.leafy:.2f}",
        )


HEADS = ("E", "d", "α", "s", "τ", "τ'", "gain in\ntokens", "step\ntakes", "gain", "over AR", "with\nleaves")


def verdict(outcomes: list[Outcome], is_measured: bool) -> str:
    """Whether to build it: by the best decoding with leaves, and the best without them, drafting or not."""
    best = max(outcomes, key=lambda one: one.leafy)
    without = max(1.0, *(one.plain for one in outcomes))
    gain = best.leafy / without - 1
    yes, at_best = ("Build it", "") if is_measured else ("Measure the passes", " at best, by the layers of passes,")
    found = f"with leaves decoding is{at_best} {best.leafy:.2f} times as fast as autoregressive, at {best.cell.name}"
    sentence = f"{found}, and without them {without:.2f} times: {gain:+.1%}; the bar is {BAR:.0%}."
    return f"{yes if gain >= BAR else 'Do not build it'}: {sentence}"


def encoded_prompts(
    generator: HuggingfaceLlamaGenerator, dataset: DatasetArguments, config: GenerationConfig
) -> list[list[int]]:
    """The prompts that the flags name, cut to the model's context."""
    examples = as_chats(read_examples(dataset, config.seed), generator.tokenizer, dataset.chat_template)
    limit = prompt_limit(dataset, generator.model.config.max_position_embeddings, config.max_new_tokens)
    return [generator.encode(one.prompt) for one in shorten(examples, generator.count_tokens, limit)]


@one_sentence_errors()
def main() -> None:
    arguments, model_arguments, dataset, config, output = groups = parse(
        CaterpillarArguments, ModelArguments, DatasetArguments, CaterpillarConfig, OutputArguments, description=__doc__
    )
    settings = by_flag(*groups)
    model, tokenizer = load_to_decode(model_arguments, config)
    advice = advice_for(model, dataset.dataset)
    if config.draft_vocab is None:
        config.draft_vocab = advice.draft_vocab
    exit_layers = [check_exit_layer(depth, model) for depth in config.exit_layers or [advice.exit_layer]]
    cells = [Cell(*one) for one in product(exit_layers, config.draft_lengths or DRAFT_LENGTHS)]
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    prompts = encoded_prompts(generator, dataset, config)
    log = RunLog(Path(output.output_dir), "caterpillar")
    log.begin(settings, resume=False)
    counts = {cell: Counts() for cell in cells}
    for answer in ranked_answers(generator, prompts, config, exit_layers):
        for cell, own in counts.items():
            own.add(answer, cell, arguments.leaves)
    seconds = StepSeconds.by_layers(cells, model.config.num_hidden_layers, arguments)
    if arguments.measure_passes:
        seconds = measure(model, generator.request(prompts[:1], config.generation()), cells, arguments)
    outcomes = [Outcome.of(cell, own, seconds, arguments.leaves) for cell, own in counts.items()]
    Console(highlight=False).print(plain_table(HEADS, [one.as_text() for one in outcomes], num_names=0))
    print(verdict(outcomes, arguments.measure_passes))
    cells_found = {"cells": [one.as_json() for one in outcomes]}
    document = {"arguments": settings, "surroundings": surroundings(model.device)} | cells_found
    log.write(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
