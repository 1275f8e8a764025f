"""How likely given continuations are at each exit layer (section 4.2 of the paper), from one pass over their texts.

The norm and the LM head run on the scored positions only, one exit at a time and in chunks.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, N scored positions, S continuations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.early_exit import exit_logits, forward_exits, token_device
from self_speculation.decoding.finiteness import overflown
from self_speculation.decoding.fused_layers import fuse
from self_speculation.families import check_supported

# The most logits alive at once.
CHUNK_LOGITS = 2**22


class Score(NamedTuple):
    """A continuation's log-likelihood, and whether greedy decoding would have written it."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class ScoredText:
    """Tokens that the model reads, and the continuations that it is asked about.

    Each continuation's last token follows the last token read; those before it are the end of what is read.
    """

    tokens: tuple[int, ...]
    continuations: list[tuple[int, ...]]


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel,
    texts: Sequence[ScoredText],
    exit_layers: Sequence[int],
    dtype: torch.dtype | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> list[list[Score]]:
    """Scores of all continuations of a batch, text by text, for each of the exit layers (which ascend).

    `dtype` is what the softmax is computed in; the model's own by default. `chunk_logits` is how many logits are alive
    at once.

    Raises:
        ValueError: the model cannot be cut at a layer, or logits are not finite.
    """
    check_supported(model)
    fuse(model)
    device = token_device(model)
    tokens_BT = torch.zeros(len(texts), max(len(text.tokens) for text in texts), dtype=torch.long)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text.tokens)] = torch.tensor(text.tokens)
    places_4N = torch.tensor(_places(texts)).T.contiguous()
    owner_N = places_4N[3]
    num_continuations = int(owner_N[-1]) + 1
    chunk = max(1, chunk_logits // model.config.vocab_size)
    scores = []
    for hidden_BTD in forward_exits(model, tokens_BT.to(device), exit_layers):
        row_N, position_N, target_N, _ = places_4N.to(hidden_BTD.device)
        chunks = zip(hidden_BTD[row_N, position_N].split(chunk), target_N.split(chunk), strict=True)
        token_scores_2N = torch.cat([_token_scores(model, *own, dtype) for own in chunks], dim=1)
        sums_2S = torch.zeros(2, num_continuations, dtype=torch.double).index_add_(1, owner_N, token_scores_2N)
        if sums_2S.isnan().any():
            raise overflown(model)
        scores.append([Score(total, misses == 0) for total, misses in sums_2S.T.tolist()])
    return scores


def _places(texts: Sequence[ScoredText]) -> list[tuple[int, int, int, int]]:
    """Row, position, the token asked about and the number of its continuation, for every scored position."""
    places = []
    owner = 0
    for row, text in enumerate(texts):
        for continuation in text.continuations:
            first = len(text.tokens) - len(continuation)
            places += [(row, first + offset, token, owner) for offset, token in enumerate(continuation)]
            owner += 1
    return places


def _token_scores(model: PreTrainedModel, hidden_ND: Tensor, target_N: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Each target's log-probability, and 1 where it is not the most probable token: (2, N), on the CPU in float64."""
    log_p_NV = exit_logits(model, hidden_ND).log_softmax(-1, dtype=dtype)
    target_N = target_N.to(log_p_NV.device)
    log_p_N = log_p_NV.gather(1, target_N[:, None]).squeeze(1)
    return torch.stack([log_p_N.double(), (log_p_NV.argmax(-1) != target_N).double()]).cpu()
