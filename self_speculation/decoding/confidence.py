"""How sure an exit is of what it drafts, by which a draft may stop: a draft that will be refused costs its passes.

Shapes: B batch, which is one row here, V vocabulary, S noise streams.
"""

import time

import torch
from torch import Tensor

from self_speculation.decoding.verification import Draft, Verdict, VerificationRule

# Looking pays where it takes no more than this share of what a token's draft takes.
MOST_LOOKING = 0.05
# How often a look is timed for its cost.
TIMED = 10


class ConfidentRule:
    """Another rule, which remembers how sure the last draft was."""

    def __init__(self, rule: VerificationRule) -> None:
        self.rule = rule
        self.last: tuple[Tensor, Tensor] | None = None

    def propose(self, logits_B1V: Tensor, noise_B1S: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A drafted token (B, 1) and the distribution q (B, 1, V) that it was drawn from."""
        token_B1, q_B1V = self.rule.propose(logits_B1V, noise_B1S)
        self.last = logits_B1V, token_B1
        return token_B1, q_B1V

    def certain(self, token_B1: Tensor, vocab_size: int) -> Tensor | None:
        """The q (B, 1, V) of a token that is certain."""
        return self.rule.certain(token_B1, vocab_size)

    def judge(self, draft: Draft, logits_BTV: Tensor, noise_BTS: Tensor | None) -> Verdict:
        """Accept a prefix of the draft and choose the token after it."""
        return self.rule.judge(draft, logits_BTV, noise_BTS)

    def confidence(self) -> float:
        """The probability of the only row's last drafted token, before any filter."""
        if self.last is None:
            raise RuntimeError("Nothing was drafted.")
        logits_B1V, token_B1 = self.last
        return float(logits_B1V.float().log_softmax(-1).gather(-1, token_B1[..., None]).exp())


def look_seconds(rule: VerificationRule, vocab_size: int, dtype: torch.dtype) -> float:
    """What it takes to ask how sure a draft was."""
    looking = ConfidentRule(rule)
    looking.last = torch.zeros(1, 1, vocab_size, dtype=dtype), torch.zeros(1, 1, dtype=torch.long)
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        looking.confidence()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
