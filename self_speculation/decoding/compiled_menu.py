"""Compiled steps of many draft lengths that share their graphs, for a policy to choose from.

A graph drafts a token, and one verifies drafts of every length, which is a symbol in it: these hold the layers. What
follows, the verdict and the commit, is a small graph for each length. A step without drafts is a graph of its own.

Shapes: B batch, T = d+1 verified positions, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from self_speculation.decoding.cell import DRAFTS
from self_speculation.decoding.compilation import BACKEND, CompiledStep, Function
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import (
    DraftedToken,
    EagerPasses,
    LogitsGiven,
    StepOutcome,
    speculative_step,
)


class CompiledMenu(CompiledStep):
    """Steps of one exit, of every draft length to choose from.

    Raises (when it is warmed up):
        ValueError: the steps cannot be compiled here.
    """

    def __init__(self, passes: EagerPasses, rows: Rows, mode: str, backend: str | Function = BACKEND) -> None:
        super().__init__(passes, rows, mode, backend)
        # The longest first: compilers take a length of one or two, where they first see it, for a special case.
        self.lengths = sorted(DRAFTS, reverse=True)

    def run(self, passes: EagerPasses, drafted: list[DraftedToken]) -> StepOutcome:
        """The step once its draft is made, by the exit or by who else hands passes over."""
        states = [token.exit_state_B1D for token in drafted]
        # With a place in front, which is dropped for one at the end: so all sizes are two at least.
        states_BTD = torch.cat([states[0], *states], dim=1)
        torch._dynamo.mark_dynamic(states_BTD, 1, min=2, max=len(self.ahead) + 1)
        logits_BTV = self._graph(verified)(passes, self.rows, states_BTD)
        verdict = self._kept(speculative_step, f"after {len(drafted)} drafts")
        return verdict(LogitsGiven(passes, drafted, logits_BTV), self.rows, len(drafted))

    def _run(self, num_speculations: int) -> StepOutcome:
        """The step, by its graphs."""
        if not num_speculations:
            return super()._run(0)
        draft = self._graph(EagerPasses.draft)
        return self.run(self.passes, [draft(self.passes, self.rows, one) for one in self.ahead[:num_speculations]])


def verified(passes: EagerPasses, rows: Rows, states_BTD: Tensor) -> Tensor:
    """The full model's logits (B, T, V), from a place that is empty and the exit states of the draft."""
    positions_BT = rows.positions(states_BTD.shape[1])
    last_state_B1D = passes.last_state(rows, positions_BT[:, -1:])
    return passes.catch_up(rows, positions_BT, torch.cat([states_BTD, last_state_B1D], dim=1)[:, 1:])
