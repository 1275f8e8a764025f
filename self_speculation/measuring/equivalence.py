"""Is self-speculative output the full model's? Every (E, d) against autoregressive decoding, token for token.

One pass over d+1 tokens rounds differently from d+1 passes over one. A difference is a *tie* if the margin between
the two tokens' logits, recomputed in float32, is at most 4 · eps(dtype) · max|logit|; else it is a failure.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MOST_TIES = 0.01


@dataclass(frozen=True)
class Difference:
    """The first token at which two answers to a sample differ; None is the end of an answer."""

    sample: int
    position: int
    expected_token: int | None
    actual_token: int | None
    margin: float | None
    tolerance: float | None

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin is not None and self.tolerance is not None and self.margin <= self.tolerance

    def sentence(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Where two answers differ, in what, and whether rounding explains it."""
        expected, actual = (
            "the end" if token is None else repr(tokenizer.decode([token]))
            for token in (self.expected_token, self.actual_token)
        )
        kind = "tie" if self.is_tie else "FAILURE"
        margin = "" if self.margin is None else f", margin {self.margin:.2e} (tie up to {self.tolerance:.2e})"
        return f"sample {self.sample}, token {self.position}: {expected} expected, {actual} found: {kind}{margin}"


@dataclass
class CellReport:
    """What one exit layer and draft length gave over all samples."""

    exit_layer: int
    num_speculations: int
    num_samples: int = 0
    drafted: int = 0
    accepted: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, difference: Difference | None) -> None:
        """One more sample, and where it differs."""
        self.num_samples += 1
        self.differences += [difference] if difference else []

    @property
    def num_ties(self) -> int:
        """Samples that differ by a tie."""
        return sum(difference.is_tie for difference in self.differences)

    @property
    def num_failures(self) -> int:
        """Samples that differ by more than a tie."""
        return len(self.differences) - self.num_ties

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 without drafts."""
        return self.accepted / max(self.drafted, 1)

    @property
    def is_correct(self) -> bool:
        """No failure, and ties in at most 1 % of the samples."""
        return not self.num_failures and self.num_ties <= MOST_TIES * self.num_samples

    def as_json(self) -> dict[str, Any]:
        """Everything, for the record."""
        rates = {"acceptance_rate": self.acceptance_rate, "ties": self.num_ties, "failures": self.num_failures}
        differences = [asdict(difference) | {"is_tie": difference.is_tie} for difference in self.differences]
        return asdict(self) | rates | {"differences": differences}


class EquivalenceCheck:
    """Runs a grid of (E, d) against one autoregressive baseline per batch of prompts."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        cells: list[CellReport],
    ) -> None:
        self.model = model
        self.config = config
        self.cells = cells
        self.baseline = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
        self.candidate = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
        self.num_samples = 0

    def run(self, prompts: list[str]) -> Iterator[CellReport]:
        """Decode a batch of prompts by the baseline and in every cell; yields each cell when it is done."""
        encoded = [self.baseline.encode(prompt) for prompt in prompts]
        expected = self.baseline.generate(encoded, dataclasses.replace(self.config, compile="none"))
        for cell in self.cells:
            config = dataclasses.replace(
                self.config, exit_layer=cell.exit_layer, num_speculations=cell.num_speculations
            )
            for row, actual in enumerate(self.candidate.generate(encoded, config)):
                cell.drafted += actual.num_drafted
                cell.accepted += actual.num_accepted
                sample = self.num_samples + row
                cell.add(compare(self.model, sample, encoded[row], expected[row].tokens, actual.tokens))
            yield cell
        self.num_samples += len(prompts)


def compare(
    model: LlamaForCausalLM, sample: int, prompt: list[int], expected: list[int], actual: list[int]
) -> Difference | None:
    """Where a greedy answer to a sample's prompt first differs from the one expected; None if it does not."""
    position = first_difference(expected, actual)
    if position is None:
        return None
    tokens = [answer[position] if position < len(answer) else None for answer in (expected, actual)]
    return Difference(sample, position, *tokens, *logit_margin(model, prompt + expected[:position], tokens))


@torch.inference_mode()
def logit_margin(
    model: LlamaForCausalLM, tokens: list[int], pair: list[int | None]
) -> tuple[float, float] | tuple[None, None]:
    """|difference of the two tokens' logits| after `tokens`, in float32, and what counts as a tie."""
    if None in pair:
        return None, None
    exact = model if model.dtype in (torch.float32, torch.float64) else copy.deepcopy(model).float()
    logits_V = exact(torch.tensor([tokens], device=model.device)).logits[0, -1]
    margin = (logits_V[pair[0]] - logits_V[pair[1]]).abs()
    return margin.item(), (4 * torch.finfo(model.dtype).eps * logits_V.abs().max()).item()


def first_difference(expected: list[int], actual: list[int]) -> int | None:
    """The first position at which two lists of tokens differ; None if they are the same."""
    for position, (one, other) in enumerate(zip(expected, actual, strict=False)):
        if one != other:
            return position
    return None if len(expected) == len(actual) else min(len(expected), len(actual))
