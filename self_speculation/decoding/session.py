"""One run over a batch of prompts: the rows on the device, the host's record of them, and the loop of steps.

The host sees counts and tokens once a step, cuts answers at their stops, and says how far the next step looks.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.finiteness import overflown
from self_speculation.decoding.prefill import prefill
from self_speculation.decoding.request import GenerationRequest, GenerationStep, RowStep
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, RowOutcome, StepOutcome, speculative_step


class Step(Protocol):
    """A step over its rows, however it is run. A fixed one takes neither fewer rows nor shorter drafts."""

    @property
    def passes(self) -> EagerPasses:
        """What it is made of."""

    @property
    def rows(self) -> Rows:
        """What it reads, and goes on with."""

    @property
    def is_fixed(self) -> bool:
        """Whether it was made for one number of rows and one draft length."""

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft d tokens, verify, commit."""

    def observe(self, steps: Sequence[RowStep]) -> None:
        """What came of it, for each row that was at work."""


@dataclass(frozen=True)
class EagerStep:
    """The step as it is written."""

    passes: EagerPasses
    rows: Rows
    is_fixed: bool = False

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft d tokens, verify, commit."""
        return speculative_step(self.passes, self.rows, num_speculations)

    def observe(self, steps: Sequence[RowStep]) -> None:
        """Nothing depends on it."""


class Session:
    """One run over a request's prompts, of which the first have been prefilled; each step drafts at most d tokens.

    A row that has ended takes in the next prompt that waits. When none waits any more, and half of the rows have ended,
    it goes on without them, unless the step is fixed. `context` is the model's.
    """

    def __init__(self, request: GenerationRequest, step: Step, num_speculations: int, context: int) -> None:
        self.request = request
        self.step = step
        self.num_speculations = num_speculations
        self.context = context
        self.limits = request.limits(context)
        self.generated: list[list[int]] = [[] for _ in request.prompts]
        # The prompt of each row, and those that have none yet.
        self.prompt_of_row = list(range(request.num_rows))
        self.waiting = deque(range(request.num_rows, len(request.prompts)))
        self.ended = [len(prompt) >= limit for prompt, limit in zip(request.prompts, self.limits, strict=True)]

    @torch.inference_mode()
    def steps(self) -> Iterator[GenerationStep]:
        """The prefill, a step without tokens, then step by step until every prompt has its answer.

        Raises:
            ValueError: a token would be chosen from logits that are not finite.
        """
        yield self._prefilled()
        while not all(self.ended):
            if self.waiting and any(self._has_ended()):
                yield self._take_in()
            num_speculations = self._draft_length()
            self.look_ahead(num_speculations)
            yield self._record(self.step(num_speculations))

    def look_ahead(self, num_speculations: int) -> None:
        """Let the next step see the rows' tokens and d drafted ones."""
        self.step.rows.cache.see(max(map(self._length, self.prompt_of_row)) + num_speculations)

    def _prefilled(self) -> GenerationStep:
        """Rows that may not generate at all end with the prefill."""
        if all(self.ended):
            reasons = [self.request.limit_reason(prompt, self.context) for prompt in range(len(self.ended))]
            return GenerationStep([RowStep(stop_reason=reason) for reason in reasons])
        return GenerationStep(self._row_steps())

    def _take_in(self) -> GenerationStep:
        """The prompts that have waited longest take the places of rows that have ended, each read by itself."""
        rows = self.step.rows
        for row, has_ended in enumerate(self._has_ended()):
            if has_ended and self.waiting:
                prompt = self.prompt_of_row[row] = self.waiting.popleft()
                own, config = rows.row(row), self.request.config
                keys = [self.request.row_keys[prompt]] if config.sample else []
                own.begin([self.request.prompts[prompt]], [self.limits[prompt]], config.seed, keys)
                prefill(self.step.passes, own, config.prefill_chunk)
        return GenerationStep(self._row_steps())

    def _has_ended(self) -> list[bool]:
        """Row by row."""
        return [self.ended[prompt] for prompt in self.prompt_of_row]

    def _row_steps(self) -> list[RowStep | None]:
        """A step in which nothing was decided, for the prompts that are being answered."""
        steps: list[RowStep | None] = [None] * len(self.ended)
        for prompt in self.prompt_of_row:
            steps[prompt] = None if self.ended[prompt] else RowStep()
        return steps

    def _draft_length(self) -> int:
        """d; not more than any row can use, where that can be chosen."""
        if self.step.is_fixed:
            return self.num_speculations
        remaining = (self._room(prompt) for prompt in self.prompt_of_row if not self.ended[prompt])
        return min(self.num_speculations, max(remaining) - 1)

    def _record(self, outcome: StepOutcome) -> GenerationStep:
        """What a step decided, on the host; rows are cut at their stops."""
        pairs = zip(self.prompt_of_row, outcome.unpack(), strict=True)
        own = {prompt: self._row_step(prompt, row, outcome.cell) for prompt, row in pairs if not self.ended[prompt]}
        at_work = list(own.values())
        self.step.observe(at_work)
        if any(step.stop_reason for step in at_work):
            self._let_ended_rows_rest()
        return GenerationStep([own.get(prompt) for prompt in range(len(self.ended))])

    def _row_step(self, prompt: int, row: RowOutcome, cell: Cell | None) -> RowStep:
        room = self._room(prompt)
        drafted = row.drafted[: room - 1]
        new, reason = self.request.stop_rule.cut(self.generated[prompt], row.decided[: row.accepted + 1])
        if reason:
            drafted = drafted[: len(new)]
        if 0 in row.is_finite[: len(new)]:
            raise overflown(self.step.passes.model)
        self.generated[prompt] += new
        if self.request.continues:
            self.step.rows.known += new
        if reason is None and len(new) == room:
            reason = self.request.limit_reason(prompt, self.context)
        self.ended[prompt] = reason is not None
        return RowStep(drafted, min(row.accepted, len(new)), new, reason, cell)

    def _let_ended_rows_rest(self) -> None:
        """Rows that have ended do not advance; when they are half of the last batch, it is made smaller."""
        active = [row for row, has_ended in enumerate(self._has_ended()) if not has_ended]
        is_last = not self.waiting
        if is_last and not self.step.is_fixed and active and 2 * len(active) <= len(self.prompt_of_row):
            self.step.rows.keep(active)
            self.prompt_of_row = [self.prompt_of_row[row] for row in active]
        self.step.rows.active_B.copy_(~torch.tensor(self._has_ended()))

    def _length(self, prompt: int) -> int:
        return len(self.request.prompts[prompt]) + len(self.generated[prompt])

    def _room(self, prompt: int) -> int:
        """How many tokens a row may still get."""
        return self.limits[prompt] - self._length(prompt)
