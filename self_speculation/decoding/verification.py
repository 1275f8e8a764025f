"""Verification of a draft: one rule for greedy decoding and for sampling (section 4.3; Leviathan et al. 2023, alg. 1).

With p the target's distribution at the d+1 positions and q the draft's at the d drafted ones, padded with a row of
zeros: accept while u < p/q, then draw from norm(max(0, p − q)) at the first position not accepted. After d
acceptances q = 0 there, and the same draw gives the *bonus* token; before, it gives the *recovered* token. Coupled
sampling is a rule of its own.

Shapes: B batch, T = d+1 verified positions, d drafted tokens, V vocabulary, S noise streams.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList

from self_speculation.decoding.sampling import (
    ACCEPT_STREAM,
    COUPLED_STREAM,
    DRAFT_STREAM,
    RECOVER_STREAM,
    draw,
    filtered,
    gumbel,
    probabilities,
)


@dataclass(frozen=True)
class Draft:
    """Drafted tokens (B, d), and for each the distribution q (B, 1, V) that it was drawn from; None if greedy.

    A row's own draft is its first `lengths_B` tokens; the rest is not accepted.
    """

    tokens_Bd: Tensor
    q_B1V: list[Tensor | None]
    lengths_B: Tensor


@dataclass(frozen=True)
class Verdict:
    """What a step decided: `tokens_BT[b, :accepted_B[b] + 1]` are row b's accepted tokens and one of the target's.

    `is_finite_BT` says which positions' logits have a most probable token at all: not where numbers have overflown.
    """

    tokens_BT: Tensor
    accepted_B: Tensor
    is_finite_BT: Tensor


class VerificationRule(Protocol):
    """How tokens are chosen from logits."""

    def propose(self, logits_B1V: Tensor, noise_B1S: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A drafted token (B, 1) and the distribution q (B, 1, V) that it was drawn from."""

    def certain(self, token_B1: Tensor, vocab_size: int) -> Tensor | None:
        """The q (B, 1, V) of a token that was not drawn, but is certain."""

    def judge(self, draft: Draft, logits_BTV: Tensor, noise_BTS: Tensor | None) -> Verdict:
        """Accept a prefix of the draft and choose the token after it."""


class GreedyRule:
    """The most probable token: p and q one-hot."""

    def propose(self, logits_B1V: Tensor, noise_B1S: Tensor | None) -> tuple[Tensor, None]:
        """The draft's argmax."""
        return most_probable(logits_B1V), None

    def certain(self, token_B1: Tensor, vocab_size: int) -> None:
        """Nothing is drawn."""

    def judge(self, draft: Draft, logits_BTV: Tensor, noise_BTS: Tensor | None) -> Verdict:
        """Accept while the draft is the target's argmax; the argmax after that is the recovered or bonus token."""
        target_BT = most_probable(logits_BTV)
        accepted_B = accepted_prefix(draft.tokens_Bd == target_BT[:, :-1], draft.lengths_B)
        # The most probable logit is NaN where any is.
        return Verdict(target_BT, accepted_B, _at_tokens(logits_BTV, target_BT).isfinite())


class SamplingRule:
    """Draws from the filtered distribution, exact in distribution whatever the draft."""

    def __init__(self, filters: LogitsProcessorList) -> None:
        self.filters = filters

    def propose(self, logits_B1V: Tensor, noise_B1S: Tensor | None) -> tuple[Tensor, Tensor]:
        """A draw from q, with the draft's own noise."""
        q_B1V = probabilities(logits_B1V, self.filters)
        return draw(q_B1V, _sampled(noise_B1S)[..., DRAFT_STREAM]), q_B1V

    def certain(self, token_B1: Tensor, vocab_size: int) -> Tensor:
        """One-hot."""
        return F.one_hot(token_B1, vocab_size).float()

    def judge(self, draft: Draft, logits_BTV: Tensor, noise_BTS: Tensor | None) -> Verdict:
        """Accept while u < p/q, then draw from norm(max(0, p − q)); q is zero past each row's draft."""
        noise_BTS, p_BTV = _sampled(noise_BTS), probabilities(logits_BTV, self.filters)
        q_BTV = torch.cat([*map(_sampled, draft.q_B1V), torch.zeros_like(p_BTV[:, :1])], dim=1)
        q_BTV = q_BTV * _is_drafted(draft.lengths_B, q_BTV.shape[1])[..., None]
        p_Bd, q_Bd = (_at_tokens(x_BTV[:, :-1], draft.tokens_Bd) for x_BTV in (p_BTV, q_BTV))
        accepted_B = accepted_prefix(noise_BTS[:, :-1, ACCEPT_STREAM] * q_Bd < p_Bd, draft.lengths_B)
        last_B1 = accepted_B[:, None]
        recovered_B1V = recovered_distribution(_at_position(p_BTV, last_B1), _at_position(q_BTV, last_B1))
        recovered_B1 = draw(recovered_B1V, noise_BTS[..., RECOVER_STREAM].gather(1, last_B1))
        tokens_BT = F.pad(draft.tokens_Bd, (0, 1)).scatter(1, last_B1, recovered_B1)
        # A softmax is NaN throughout where any logit is NaN or infinite.
        return Verdict(tokens_BT, accepted_B, p_BTV[..., 0].isfinite())


class CoupledRule:
    """Sampling that is the same token for token, whatever drafts: draft and target share their noise.

    With one Gumbel number g a token, argmax(log p + g) is a draw from p (the Gumbel-max trick). The draft takes
    argmax(log q + g), and is accepted while that is the target's own draw. So every token is what autoregressive
    decoding draws with the same seed. A draft is accepted with a probability from (1 − TV)/(1 + TV) to 1 − TV, where
    TV is the distance ½ Σ|p − q|; by Leviathan's rule it is 1 − TV.
    """

    def __init__(self, filters: LogitsProcessorList) -> None:
        self.filters = filters

    def propose(self, logits_B1V: Tensor, noise_B1S: Tensor | None) -> tuple[Tensor, None]:
        """The draft's draw."""
        return most_probable(self._perturbed(logits_B1V, noise_B1S)), None

    def certain(self, token_B1: Tensor, vocab_size: int) -> None:
        """It is held against the target's own draw."""

    def judge(self, draft: Draft, logits_BTV: Tensor, noise_BTS: Tensor | None) -> Verdict:
        """Greedy decoding of the perturbed logits."""
        return GreedyRule().judge(draft, self._perturbed(logits_BTV, noise_BTS), None)

    def _perturbed(self, logits_BTV: Tensor, noise_BTS: Tensor | None) -> Tensor:
        """log p + g, but for a constant, (B, T, V) in float64."""
        g_BTV = gumbel(_sampled(noise_BTS)[..., COUPLED_STREAM], logits_BTV.shape[-1])
        return filtered(logits_BTV, self.filters) + g_BTV


def most_probable(logits_BTV: Tensor) -> Tensor:
    """The argmax (B, T), the first of several: torch's own takes four times as long in bfloat16."""
    return logits_BTV.max(-1).indices


def accepted_prefix(accepts_Bd: Tensor, lengths_B: Tensor) -> Tensor:
    """The number (B) of accepted tokens before the first that is not, within each row's draft."""
    return (accepts_Bd & _is_drafted(lengths_B, accepts_Bd.shape[1])).long().cumprod(-1).sum(-1)


def recovered_distribution(p_BTV: Tensor, q_BTV: Tensor) -> Tensor:
    """norm(max(0, p − q)); p itself where rounding leaves nothing."""
    residual_BTV = (p_BTV - q_BTV).clamp(min=0)
    total_BT1 = residual_BTV.sum(-1, keepdim=True)
    return torch.where(total_BT1 > 0, residual_BTV / total_BT1, p_BTV)


def _sampled(tensor: Tensor | None) -> Tensor:
    """Noise, or a draft's q: what rows and drafts have when they are sampled."""
    assert tensor is not None
    return tensor


def _is_drafted(lengths_B: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=lengths_B.device) < lengths_B[:, None]


def _at_tokens(p_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return p_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1)


def _at_position(p_BTV: Tensor, index_B1: Tensor) -> Tensor:
    return p_BTV.gather(1, index_B1[..., None].expand(-1, -1, p_BTV.shape[-1]))
