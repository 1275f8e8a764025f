"""A step whose exit layer and draft length a policy chooses.

Between steps every layer has cached exactly `tokens[:-1]` of each row, so each step may take another E and another d;
d = 0 is autoregressive decoding.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, N numbers of an outcome.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.confidence import ConfidentRule
from self_speculation.decoding.free_passes import FreePasses, takes_free_drafts
from self_speculation.decoding.late_adapter import LateAdapterKernels
from self_speculation.decoding.lookup import NOTHING, FreeDraft, Lookup
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.request import RowStep
from self_speculation.decoding.session import EagerStep, Step
from self_speculation.decoding.step import DraftedToken, DraftGiven, EagerPasses, StepOutcome, speculative_step


class AdaptiveStep:
    """A step that asks its policy for E and d, and tells it what came of them. It has a step for every exit.

    These share their rows; one that is fixed is so for all. `resting` is the step without drafts, the same for every
    exit, in which an exit adapter may wait. A single row may also take drafts that cost nothing. Where the exits' rule
    tells how sure a draft is, the policy may stop it.
    """

    def __init__(self, exits: dict[int, Step], resting: Step, policy: Policy) -> None:
        self.exits = exits
        self.resting = resting
        self.policy = policy
        self.passes, self.rows, self.is_fixed = resting.passes, resting.rows, resting.is_fixed
        self.lookup = Lookup() if takes_free_drafts(self.rows) else None
        self.free, self.cell = NOTHING, Cell(policy.first, 0)
        self.confidences: list[float] = []

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft, verify, commit: at most d tokens."""
        self.free = self._free_draft(num_speculations)
        self.cell = self.policy.choose(num_speculations, self.free)
        self.confidences = []
        outcome = self._step(self.cell.num_speculations, num_speculations)
        if self.confidences:
            self.cell = self.cell._replace(num_speculations=len(self.confidences))
        return outcome._replace(cell=self.cell)

    def _step(self, num_drafts: int, most: int) -> StepOutcome:
        """The step of the cell that was chosen; an adapter that is to draft reads first what it has missed."""
        if self.cell.exit_layer == FREE:
            return speculative_step(FreePasses(self.passes, self.free.tokens), self.rows, num_drafts)
        if not num_drafts:
            return self.resting(0)
        adapter, kernels = self.passes.plan.adapter, self.passes.kernels
        if adapter is not None and isinstance(kernels, LateAdapterKernels):
            kernels.catch_up(adapter, self.rows.cache)
        step = self.exits[self.cell.exit_layer]
        if not isinstance(step.passes.rule, ConfidentRule) or not self.policy.asks(self.cell.exit_layer):
            return step(num_drafts)
        drafted = list(self._draft(step.passes, step.passes.rule, most))
        return speculative_step(DraftGiven(step.passes, drafted), self.rows, len(drafted))

    def _draft(self, passes: EagerPasses, rule: ConfidentRule, most: int) -> Iterator[DraftedToken]:
        """Token by token, while one more pays."""
        for ahead in range(most):
            yield passes.draft(self.rows, ahead)
            self.confidences.append(rule.confidence())
            if not self.policy.goes_on(self.cell.exit_layer, self.confidences):
                return

    def observe(self, steps: Sequence[RowStep]) -> None:
        """Tell the policy what came of the last step, and the lookup what the row's tokens are now."""
        drafted, accepted = [len(step.drafted) for step in steps], [step.accepted for step in steps]
        if self.confidences:
            self.policy.observe_confidences(self.cell.exit_layer, self.confidences[: drafted[0]], accepted[0])
        self.policy.observe(self.cell, drafted, accepted, self.free)
        if self.lookup is not None:
            self.lookup.extend(steps[0].tokens)
        kernels = self.passes.kernels
        if isinstance(kernels, LateAdapterKernels) and self.cell.exit_layer == FREE:
            kernels.keep(accepted[0] + 1)

    def _free_draft(self, most: int) -> FreeDraft:
        if self.lookup is None:
            return NOTHING
        if not self.lookup.tokens:
            self.lookup.extend(self.rows.tokens_BC[0, : int(self.rows.lengths_B[0])].tolist())
        return self.lookup.draft(most)


def letting_adapter_wait(step: EagerStep) -> EagerStep:
    """The step, for use without drafts: an exit adapter that it has waits."""
    if step.passes.plan.adapter is None:
        return step
    return replace(step, passes=replace(step.passes, kernels=LateAdapterKernels(step.passes.kernels)))
