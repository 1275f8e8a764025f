"""Compiled steps of many draft lengths that share their graphs, for a policy to choose from.

A graph drafts a token, and one verifies drafts of every length, which is a symbol in it: these hold the layers. What
follows, the verdict and the commit, is a small graph for each length. A step without drafts is a graph of its own.
Where torch finds that the second graph would not be right for every length, there is one for each.

Shapes: B batch, T = d+1 verified positions, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from self_speculation.decoding.cell import DRAFTS
from self_speculation.decoding.compilation import CompiledStep, Function
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, LogitsGiven, StepOutcome, speculative_step


class CompiledMenu(CompiledStep):
    """Steps of one exit, of every draft length to choose from.

    Raises (when it is warmed up):
        ValueError: the steps cannot be compiled here.
    """

    def __init__(self, passes: EagerPasses, rows: Rows, mode: str, backend: str | Function) -> None:
        super().__init__(passes, rows, mode, backend)
        # The longest first: compilers take a length of one or two, where they first see it, for a special case.
        longest = passes.plan.num_speculations
        self.lengths = sorted({*(length for length in DRAFTS if length < longest), longest}, reverse=True)
        # Whether a draft's length is a symbol in the graph that verifies.
        self.is_symbol = True

    def _run(self, num_speculations: int) -> StepOutcome:
        """The step, by one graph for each draft, one for verification, and one from there on."""
        if not num_speculations:
            return super()._run(0)
        draft = self._graph(EagerPasses.draft)
        drafted = [draft(self.passes, self.rows, ahead) for ahead in self.ahead[:num_speculations]]
        states = [token.exit_state_B1D for token in drafted]
        # With a place in front, which is dropped for one at the end: so that no size is ever one.
        logits_BTV = self._verify(torch.cat([states[0], *states], dim=1))
        rest = self._kept(speculative_step, f"after {num_speculations} drafts")
        return rest(LogitsGiven(self.passes, drafted, logits_BTV), self.rows, num_speculations)

    def _verify(self, states_BTD: Tensor) -> Tensor:
        """The full model's logits (B, T, V)."""
        if self.is_symbol:
            torch._dynamo.mark_dynamic(states_BTD, 1, min=2, max=max(self.lengths) + 1)
            try:
                return self._graph(verified)(self.passes, self.rows, states_BTD)
            except ConstraintViolationError:
                # The graph would not be right for every length: there is one for each.
                self.is_symbol, states_BTD = False, states_BTD.clone()
        return self._kept(verified, (self._prefix, states_BTD.shape[1]))(self.passes, self.rows, states_BTD)


def verified(passes: EagerPasses, rows: Rows, states_BTD: Tensor) -> Tensor:
    """The full model's logits (B, T, V), from a place that is empty and the exit states of the draft."""
    positions_BT = rows.positions(states_BTD.shape[1])
    last_state_B1D = passes.last_state(rows, positions_BT[:, -1:])
    return passes.catch_up(rows, positions_BT, torch.cat([states_BTD, last_state_B1D], dim=1)[:, 1:])
