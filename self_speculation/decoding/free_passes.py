"""Passes of a step whose drafts cost nothing: tokens that are given, read by all layers at once.

Shapes: B batch, which is one row here, T positions of this call, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from self_speculation.decoding.kernels import forward_remainder
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import DraftedToken, EagerPasses
from self_speculation.decoding.verification import VerificationRule
from self_speculation.families import embed


@dataclass(frozen=True)
class FreePasses:
    """Passes whose drafts cost nothing: tokens (of the only row) that are given. All layers read them at once."""

    own: EagerPasses
    tokens: list[int]

    @property
    def rule(self) -> VerificationRule:
        """How tokens are chosen and drafts judged."""
        return self.own.rule

    def draft(self, rows: Rows, ahead: int) -> DraftedToken:
        """The given token; what it leaves behind is the embedding of the one before it."""
        position_B1 = rows.positions(1) + ahead
        token_B1 = torch.full_like(position_B1, self.tokens[ahead])
        state_B1D = embed(self.own.model, rows.read(position_B1))
        rows.write(position_B1 + 1, token_B1)
        return DraftedToken(state_B1D, self.rule.certain(token_B1, self.own.model.config.vocab_size))

    def verify(self, rows: Rows, positions_BT: Tensor, exit_states: list[Tensor]) -> Tensor:
        """The full model's logits (B, T, V); the exit adapter's cache, too, must hold these tokens."""
        plan, kernels = self.own.plan, self.own.kernels
        last_B1D = embed(self.own.model, rows.read(positions_BT[:, -1:]))
        hidden_BTD = torch.cat([*exit_states, last_B1D], dim=1)
        hidden_BTD = kernels.run_layers(hidden_BTD, range(plan.exit_layer), positions_BT, rows.cache)
        if plan.adapter is not None:
            kernels.run_adapter(plan.adapter, hidden_BTD, positions_BT, rows.cache)
        remainder = range(plan.exit_layer, plan.num_layers)
        hidden_BTD = forward_remainder(kernels, hidden_BTD, remainder, positions_BT, rows.cache)
        return self.own.processed(rows, kernels.logits(hidden_BTD, self.own.model.model.norm), positions_BT)


def takes_free_drafts(rows: Rows) -> bool:
    """Whether the tokens are one row's."""
    return len(rows.lengths_B) == 1
