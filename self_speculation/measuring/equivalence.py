"""Is self-speculative output the full model's? Every (E, d) is judged token by token, beside the noise of rounding.

One of the two, or both, may be chosen at every step.

One pass over d+1 tokens rounds differently from d+1 passes over one, so two nearly equal logits may change places.
The judge says of each token whether that explains it; the *noise floor* says how often it happens without any draft:
the tokens of autoregressive decoding that the same model, in the same dtype, would choose differently d+1 at a time.

Shapes: B batch, T = d+1 positions of a pass.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.advice import Recommendation, advice_for
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.early_exit import num_caches, token_device
from self_speculation.decoding.kernels import Kernels, forward_early
from self_speculation.decoding.prefill import prefill
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, StepPlan
from self_speculation.decoding.verification import GreedyRule, most_probable
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
)
from self_speculation.measuring.judge import Difference, Judge, Judgement
from self_speculation.settings import AUTO
from self_speculation.strategies import fill_in, make_strategy, strategy_type

# The most samples whose answers may differ by ties. In 16 bits a real vocabulary has many, and they prove nothing.
MOST_TIES = {torch.float64: 0.0, torch.float32: 0.01}


@dataclass
class CellReport:
    """What one exit layer and draft length gave over all samples; None is what was chosen at every step.

    `num_samples` answers were compared with the ones expected; `num_ties` of them differ, though none of their tokens
    is wrong, and `num_failures` have a wrong token or end. `most_ties` is the share of ties that may be. `differences`
    are the samples' tokens that are not exact.
    """

    exit_layer: int | None
    num_speculations: int | None
    most_ties: float = 1.0
    num_samples: int = 0
    drafted: int = 0
    accepted: int = 0
    num_ties: int = 0
    num_failures: int = 0
    num_tokens: int = 0
    differences: list[tuple[int, Difference]] = field(default_factory=list)

    @property
    def drafting(self) -> dict[str, int | str]:
        """E and d as results tell them."""
        told = {"exit_layer": self.exit_layer, "num_speculations": self.num_speculations}
        return {name: AUTO if value is None else value for name, value in told.items()}

    def add(self, sample: int, judgement: Judgement, is_as_expected: bool) -> None:
        """One more answer: what the judge says of it, and whether it is the one expected."""
        self.num_samples += 1
        self.num_tokens += judgement.num_tokens
        self.differences += [(sample, difference) for difference in judgement.differences]
        if judgement.failures:
            self.num_failures += 1
        elif not is_as_expected:
            self.num_ties += 1

    @property
    def ties(self) -> list[Difference]:
        """Tokens within rounding."""
        return [difference for _, difference in self.differences if difference.is_tie]

    @property
    def num_wrong(self) -> int:
        """Wrong tokens and ends."""
        return len(self.differences) - len(self.ties)

    @property
    def num_exact(self) -> int:
        """Tokens that are the full model's."""
        return self.num_tokens - sum(difference.margin is not None for _, difference in self.differences)

    @property
    def largest_tie(self) -> Difference | None:
        """The token within rounding that is nearest to its bound."""
        return max(self.ties, key=lambda tie: tie.share_of_tolerance, default=None)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 without drafts."""
        return self.accepted / max(self.drafted, 1)

    @property
    def is_correct(self) -> bool:
        """Nothing wrong, and no more ties than may be."""
        return not self.num_failures and self.num_ties <= self.most_ties * self.num_samples

    def as_json(self) -> dict[str, Any]:
        """Everything, for the record."""
        largest = self.largest_tie
        return self.drafting | {
            "num_samples": self.num_samples,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "ties": self.num_ties,
            "failures": self.num_failures,
            "tokens": self.num_tokens,
            "tokens_exact": self.num_exact,
            "tokens_within_rounding": len(self.ties),
            "wrong": self.num_wrong,
            "largest_margin": largest and largest.margin,
            "largest_share_of_tolerance": largest and largest.share_of_tolerance,
            "differences": [{"sample": sample} | difference.as_json() for sample, difference in self.differences],
        }


@dataclass
class NoiseFloor:
    """How much of autoregressive decoding changes when the same tokens are read d+1 at a time."""

    num_speculations: int
    answers: int = 0
    changed_answers: int = 0
    tokens: int = 0
    changed_tokens: int = 0

    def add(self, tokens: list[int], at_width: list[int]) -> None:
        """One more answer, and what would have been chosen at each of its places."""
        changed = sum(one != other for one, other in zip(tokens, at_width, strict=True))
        self.answers += 1
        self.tokens += len(tokens)
        self.changed_answers += changed > 0
        self.changed_tokens += changed

    def sentence(self) -> str:
        """The shares, in words."""
        tokens, answers = (self.changed_tokens, self.tokens), (self.changed_answers, self.answers)
        shares = [f"{count} of {total} ({count / max(total, 1):.2%})" for count, total in (tokens, answers)]
        return (
            f"Noise floor: autoregressive decoding itself, read {self.num_speculations + 1} tokens at a time, "
            f"would change {shares[0]} tokens, in {shares[1]} answers."
        )


class EquivalenceCheck:
    """Runs a grid of (E, d) against one autoregressive baseline per batch of prompts.

    A cell decodes as `generate.py` would: with what is recommended, where something is left open. Where d is chosen at
    every step, the noise floor is that of the recommended draft length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        cells: list[CellReport],
        advice: Recommendation | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.cells = cells
        # It is of greedy decoding.
        self.advice = advice or advice_for(model)
        recommended = self.advice.num_speculations
        lengths = {recommended if cell.num_speculations is None else cell.num_speculations for cell in cells}
        widths = set() if config.sample else lengths - {0}
        self.noise_floors = [NoiseFloor(num_speculations) for num_speculations in sorted(widths)]
        self.baseline_strategy = AutoregressiveStrategy(model)
        self.baseline = HuggingfaceLlamaGenerator(tokenizer, self.baseline_strategy)
        self.candidates: dict[type[GenerationStrategy], HuggingfaceLlamaGenerator] = {}
        self.judge = Judge(model, self.baseline.request([], config))
        self.num_samples = 0

    def run(self, prompts: list[str]) -> Iterator[CellReport]:
        """Decode a batch of prompts by the baseline and in every cell; yields each cell when it is done."""
        encoded = [self.baseline.encode(prompt) for prompt in prompts]
        eager = dataclasses.replace(self.config, compile="none")
        # In exact mode each answer is what it is alone.
        batches = [[tokens] for tokens in encoded] if self.config.exact else [encoded]
        expected = [answer.tokens for batch in batches for answer in self.baseline.generate(batch, eager)]
        for cell in self.cells:
            config = self._config(cell)
            for row, actual in enumerate(self._candidate(config).generate(encoded, config)):
                cell.drafted += actual.num_drafted
                cell.accepted += actual.num_accepted
                copy = encoded[:row].count(encoded[row])
                judgement = self.judge.judge(encoded[row], actual.tokens, copy)
                cell.add(self.num_samples + row, judgement, actual.tokens == expected[row])
            yield cell
        self._measure_noise(self.baseline.request(encoded, eager), expected)
        self.num_samples += len(prompts)

    def _config(self, cell: CellReport) -> GenerationConfig:
        """A cell's config."""
        own: dict[str, Any] = {"exit_layer": cell.exit_layer, "num_speculations": cell.num_speculations}
        return fill_in(dataclasses.replace(self.config, generation_strategy="self_speculative", **own), self.advice)

    def _candidate(self, config: GenerationConfig) -> HuggingfaceLlamaGenerator:
        """Who decodes like this; cells have it in common, with what was compiled or measured."""
        kind = strategy_type(config)
        if kind not in self.candidates:
            strategy = make_strategy(self.model, config, advice=self.advice)
            self.candidates[kind] = HuggingfaceLlamaGenerator(self.baseline.tokenizer, strategy)
        return self.candidates[kind]

    def _measure_noise(self, request: GenerationRequest, answers: list[list[int]]) -> None:
        for floor in self.noise_floors:
            kernels = self.baseline_strategy.kernels(request.config)
            chosen = read_again(kernels, request, answers, floor.num_speculations + 1)
            for answer, at_width in zip(answers, chosen, strict=True):
                floor.add(answer, at_width)


@torch.inference_mode()
def read_again(kernels: Kernels, request: GenerationRequest, answers: list[list[int]], width: int) -> list[list[int]]:
    """The token that greedy decoding chooses at each place of the answers, when it reads `width` of them in a pass."""
    model, processors = kernels.model, request.all_processors()
    num_layers = model.config.num_hidden_layers
    lengths = torch.tensor([len(prompt) for prompt in request.prompts])
    most_new = max(map(len, answers))
    cache = PositionAddressedCache(num_caches(model), int(lengths.max()) + most_new + width, token_device(model))
    rows = Rows.empty(cache, len(answers), sample=False)
    whole = [prompt + answer for prompt, answer in zip(request.prompts, answers, strict=True)]
    rows.begin(whole, limits=[len(tokens) for tokens in whole])
    rows.lengths_B.copy_(lengths)
    passes = EagerPasses(model, StepPlan(num_layers, 0, num_layers), GreedyRule(), processors, kernels)
    prefill(passes, rows, request.config.prefill_chunk)
    chosen: list[list[int]] = [[] for _ in answers]
    for first in range(0, most_new, width):
        cache.see(int(lengths.max()) + first + width - 1)
        positions_BT = rows.positions(width)
        hidden_BTD = forward_early(kernels, rows.read(positions_BT), num_layers, positions_BT, cache)
        logits_BTV = passes.processed(rows, kernels.logits(hidden_BTD, model.model.norm), positions_BT)
        for tokens, new in zip(chosen, most_probable(logits_BTV).tolist(), strict=True):
            tokens += new
        rows.lengths_B += width
    return [tokens[: len(answer)] for tokens, answer in zip(chosen, answers, strict=True)]
