"""One step of self-speculative decoding (section 4.3 of the paper): draft, verify, commit.

A step is a pure function of tensors: nothing in it asks the host. So one function serves greedy decoding and sampling,
one row and a ragged batch, and runs as it is written, compiled, and captured. With d = 0 nothing is drafted, and it is
a step of autoregressive decoding.

Shapes: B batch, d drafted tokens, T = d+1 verified positions, D hidden size, V vocabulary, N numbers of an outcome.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.kernels import Kernels, forward_early, forward_remainder
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import process_logits
from self_speculation.decoding.verification import Draft, Verdict, VerificationRule
from self_speculation.exit_adapter import ExitAdapter


def speculative_step(passes: "Passes", rows: Rows, num_speculations: int) -> "StepOutcome":
    """Draft d tokens with layers [0, E), verify them with layers [E, L), commit what agrees and one token more."""
    positions_BT = rows.positions(num_speculations + 1)
    # Draft: layers [0, E) run ahead, one token at a time, and leave their hidden states at the exit.
    drafted = [passes.draft(rows, ahead) for ahead in range(num_speculations)]
    # Verify: layers [E, L) catch up on those states in one pass; tokens are accepted while u < p/q.
    p_logits_BTV = passes.verify(rows, positions_BT, [token.exit_state_B1D for token in drafted])
    draft = Draft(rows.read(positions_BT[:, 1:]), [token.q_B1V for token in drafted], rows.room(num_speculations))
    verdict = passes.rule.judge(draft, p_logits_BTV, rows.noise(positions_BT + 1))
    # Commit: the accepted tokens, then one drawn from norm(max(0, p − q)); what lies beyond is stale.
    rows.write(positions_BT + 1, verdict.tokens_BT)
    rows.advance(verdict.accepted_B + 1)
    return StepOutcome.pack(draft, verdict)


class DraftedToken(NamedTuple):
    """What a draft leaves behind: the exit state (B, 1, D) before it, and the q (B, 1, V) it was drawn from, if any."""

    exit_state_B1D: Tensor
    q_B1V: Tensor | None


class Passes(Protocol):
    """The passes of a model that a step is made of; who hands them over decides how they are run."""

    @property
    def rule(self) -> VerificationRule:
        """How tokens are chosen and drafts judged."""

    def draft(self, rows: Rows, ahead: int) -> DraftedToken:
        """Read the token that stands `ahead` places after the pending one, and draft the next."""

    def verify(self, rows: Rows, positions_BT: Tensor, exit_states: list[Tensor]) -> Tensor:
        """The full model's logits (B, T, V) after the tokens at the positions: the pending one and the drafted ones."""


@dataclass(frozen=True)
class StepPlan:
    """How a model is cut for a step: layers [0, E) draft d tokens, layers [E, `num_layers`) verify.

    `num_layers` is L, but for early exit without verification (section 4.2), where it is E. `draft_head` is the LM head
    that drafts; the model's own by default. `adapter` stands between the exit and that head, if there is one.
    """

    exit_layer: int
    num_speculations: int
    num_layers: int
    draft_head: DraftHead | None = None
    adapter: ExitAdapter | None = None


@dataclass(frozen=True)
class EagerPasses:
    """The passes as they are written, over a model that is cut by a plan."""

    model: PreTrainedModel
    plan: StepPlan
    rule: VerificationRule
    processors: LogitsProcessorList
    kernels: Kernels

    def draft(self, rows: Rows, ahead: int | Tensor) -> DraftedToken:
        """Layers [0, E) read the token that stands `ahead` (a scalar) places after the pending one; draft the next."""
        position_B1 = rows.positions(1) + ahead
        exit_state_B1D = self._exit_states(rows, position_B1)
        q_logits_B1V = self._draft_logits(rows, exit_state_B1D, position_B1)
        next_B1 = position_B1 + 1
        token_B1, q_B1V = self.rule.propose(q_logits_B1V, rows.noise(next_B1))
        rows.write(next_B1, token_B1)
        return DraftedToken(exit_state_B1D, q_B1V)

    def verify(self, rows: Rows, positions_BT: Tensor, exit_states: list[Tensor]) -> Tensor:
        """Layers [E, L) catch up on the exit states (each (B, 1, D)) in one pass; logits (B, T, V) of the full model.

        The last token, drafted or pending, has no exit state yet: layers [0, E) read it first.
        """
        last_state_B1D = self.last_state(rows, positions_BT[:, -1:])
        return self.catch_up(rows, positions_BT, torch.cat([*exit_states, last_state_B1D], dim=1))

    def last_state(self, rows: Rows, position_B1: Tensor) -> Tensor:
        """The last token's exit state (B, 1, D)."""
        exit_state_B1D = self._exit_states(rows, position_B1)
        if self.plan.adapter is not None:
            # Its cache, too, must hold the last token, should all drafts be accepted.
            self.kernels.run_adapter(self.plan.adapter, exit_state_B1D, position_B1, rows.cache)
        return exit_state_B1D

    def catch_up(self, rows: Rows, positions_BT: Tensor, exit_states_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of the full model, whose layers [E, L) go on from the exit states."""
        layers = range(self.plan.exit_layer, self.plan.num_layers)
        hidden_BTD = forward_remainder(self.kernels, exit_states_BTD, layers, positions_BT, rows.cache)
        return self.processed(rows, self.kernels.logits(hidden_BTD, self.model.model.norm), positions_BT)

    def _exit_states(self, rows: Rows, positions_BT: Tensor) -> Tensor:
        return forward_early(self.kernels, rows.read(positions_BT), self.plan.exit_layer, positions_BT, rows.cache)

    def _draft_logits(self, rows: Rows, exit_states_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the head that drafts, behind the final norm, or behind the adapter and its own."""
        plan, hidden_BTD, norm = self.plan, exit_states_BTD, self.model.model.norm
        if plan.adapter is not None:
            hidden_BTD = self.kernels.run_adapter(plan.adapter, exit_states_BTD, positions_BT, rows.cache)
            norm = plan.adapter.norm
        return self.processed(rows, self.kernels.logits(hidden_BTD, norm, plan.draft_head), positions_BT)

    def processed(self, rows: Rows, logits_BTV: Tensor, positions_BT: Tensor) -> Tensor:
        """Logits (B, T, V) for the tokens that follow the positions."""
        logits_BTV = logits_BTV.to(rows.tokens_BC.device)
        # By its length: torch 2.11's compiler takes an empty list of this kind for a true one.
        if len(self.processors) == 0:
            return logits_BTV
        return process_logits(logits_BTV, self.processors, rows.tokens_BC, positions_BT)


@dataclass(frozen=True)
class DraftGiven:
    """Passes whose drafting is done, so that the step begins with verification."""

    passes: Passes
    drafted: list[DraftedToken]

    @property
    def rule(self) -> VerificationRule:
        """How tokens are chosen and drafts judged."""
        return self.passes.rule

    def draft(self, rows: Rows, ahead: int) -> DraftedToken:
        """What was drafted there."""
        return self.drafted[ahead]

    def verify(self, rows: Rows, positions_BT: Tensor, exit_states: list[Tensor]) -> Tensor:
        """The full model's logits (B, T, V)."""
        return self.passes.verify(rows, positions_BT, exit_states)


@dataclass(frozen=True)
class LogitsGiven(DraftGiven):
    """Passes that are over, so that the step begins with the verdict."""

    logits_BTV: Tensor

    def verify(self, rows: Rows, positions_BT: Tensor, exit_states: list[Tensor]) -> Tensor:
        """What was found there."""
        return self.logits_BTV


class RowOutcome(NamedTuple):
    """What a step decided for one row: `decided[: accepted + 1]` are its next tokens.

    `is_finite` has 1 for each token that was decided from finite logits, and 0 for the others.
    """

    accepted: int
    decided: list[int]
    drafted: list[int]
    is_finite: list[int]


class StepOutcome(NamedTuple):
    """What a step decided for all rows, packed for the host into one integer tensor (B, N): one copy, one wait.

    `cell` is what a policy chose for it, where there is one.
    """

    packed_BN: Tensor
    cell: Cell | None = None

    @classmethod
    def pack(cls, draft: Draft, verdict: Verdict) -> "StepOutcome":
        """Accepted count, the d+1 decided tokens, whether their logits are finite, and the d drafted ones."""
        numbers = [verdict.accepted_B[:, None], verdict.tokens_BT, verdict.is_finite_BT, draft.tokens_Bd]
        return cls(torch.cat(numbers, dim=1))

    def unpack(self) -> list[RowOutcome]:
        """The same on the host, row by row."""
        count = self.packed_BN.shape[1] // 3
        return [
            RowOutcome(accepted, numbers[:count], numbers[2 * count :], numbers[count : 2 * count])
            for accepted, *numbers in self.packed_BN.tolist()
        ]
