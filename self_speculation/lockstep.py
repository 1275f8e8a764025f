"""Rows in lockstep, as in transformers' `generate`: one token for each row of a batch, then the question which end.

A step of ours gives each row another number of tokens. Here they are handed on one by one, so that stopping criteria
and streamers see what `generate` shows them.

Shapes: B batch, T tokens so far, the prompts and their padding included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from self_speculation.generator_base import GenerationStep


@dataclass
class RowSource:
    """The steps of some rows, and which rows of the batch those are."""

    rows: Sequence[int]
    steps: Iterator[GenerationStep]


@dataclass
class Lockstep:
    """A batch that grows by one token a row.

    A row that has ended gets `pad_token` from then on, if the batch `pads`; else its own next tokens, until all rows
    have ended, as in `generate` where no end-of-sequence id is known.
    """

    input_ids: Tensor
    sources: list[RowSource]
    pad_token: int
    pads: bool
    answers: list[list[int]] = field(init=False)
    exhausted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.answers = [[] for _ in self.input_ids]

    def run(self, criteria: StoppingCriteriaList, show: Callable[[Tensor], None]) -> Tensor:
        """The prompts and all that follows (B, T); `show` gets each of the rows' next tokens (B)."""
        tokens_BT, is_ended_B = self.input_ids, torch.zeros(len(self.input_ids), dtype=torch.bool)
        while not is_ended_B.all():
            next_B = self._next(tokens_BT.shape[1] - self.input_ids.shape[1], is_ended_B.tolist())
            if next_B is None:
                break
            tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
            show(next_B.cpu())
            # As `generate` does where it keeps no scores.
            is_ended_B |= criteria(tokens_BT, None).cpu()
        return tokens_BT

    def _next(self, number: int, is_ended: list[bool]) -> Tensor | None:
        """Each row's token of this number; None where no row has one that has not ended."""
        needed = [row for row, ended in enumerate(is_ended) if not ended or not self.pads]
        self._advance(needed, number)
        there = {row for row in needed if len(self.answers[row]) > number}
        if all(is_ended[row] for row in there):
            return None
        chosen = [answer[number] if row in there else self.pad_token for row, answer in enumerate(self.answers)]
        return torch.tensor(chosen, device=self.input_ids.device)

    def _advance(self, needed: list[int], number: int) -> None:
        """Take steps until each of the rows has a token of this number, or has ended for good."""
        for source in self.sources:
            while any(row in needed and self._waits(row, number) for row in source.rows):
                self._take(next(source.steps), source.rows)

    def _take(self, step: GenerationStep, rows: Sequence[int]) -> None:
        """What a step gave the rows, and which of them it ended."""
        for row, taken in zip(rows, step.rows, strict=True):
            if taken is not None:
                self.answers[row] += taken.tokens
                if taken.stop_reason is not None:
                    self.exhausted.add(row)

    def _waits(self, row: int, number: int) -> bool:
        return row not in self.exhausted and len(self.answers[row]) <= number
