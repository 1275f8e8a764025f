"""Distributions, draws and noise.

Noise is drawn before decoding, per (seed, row, position), so that a row samples the same tokens alone and in a batch,
and so that a step stays a pure function of tensors. At each position three disjoint streams serve the draft's draw,
the acceptance test, and the draw of the recovered or bonus token: sharing one would bias the output.

Shapes: B batch, T positions of this call, C capacity, V vocabulary, S noise streams.
"""

import hashlib
from collections import Counter

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DRAFT_STREAM, ACCEPT_STREAM, RECOVER_STREAM = range(3)


def warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """transformers' temperature, top-k and top-p filters, in its order; top_k 0 and top_p 1 mean off."""
    chosen = LogitsProcessorList()
    if temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen


def probabilities(logits_BTV: Tensor, filters: LogitsProcessorList) -> Tensor:
    """The filtered distribution (B, T, V), in float32."""
    logits_NV = logits_BTV.float().flatten(0, 1)
    # The filters look at logits alone, though the annotation of a list of processors asks for tokens.
    return filters(None, logits_NV).softmax(-1).view_as(logits_BTV)  # type: ignore[arg-type]


def draw(p_BTV: Tensor, uniform_BT: Tensor) -> Tensor:
    """Tokens (B, T) from distributions: the first token whose cumulative probability exceeds the uniform number."""
    cumulative_BTV = p_BTV.double().cumsum(-1)
    threshold_BT1 = uniform_BT[..., None] * cumulative_BTV[..., -1:]
    return torch.searchsorted(cumulative_BTV, threshold_BT1, right=True).squeeze(-1).clamp(max=p_BTV.shape[-1] - 1)


def noise(seed: int, prompts: list[list[int]], capacity: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, C, S) in float64, that depend on the seed, the row and the position only.

    A row is told by its prompt and by how many copies of it stand before, whatever else is in the batch.
    """
    copies: Counter[str] = Counter()
    uniforms = []
    for prompt in map(repr, prompts):
        row = hashlib.sha256(f"{copies[prompt]}{prompt}".encode()).digest()[:8]
        copies[prompt] += 1
        bits = np.random.Philox(key=[seed, int.from_bytes(row)])
        uniforms.append(np.random.Generator(bits).random((capacity, 3)))
    return torch.from_numpy(np.stack(uniforms))


def process_logits(
    logits_BTV: Tensor, processors: LogitsProcessorList, tokens_BC: Tensor, positions_BT: Tensor
) -> Tensor:
    """Logits processors at every row and position, each on exactly the row's tokens up to that position."""
    rows = []
    for logits_TV, tokens_C, positions_T in zip(logits_BTV, tokens_BC, positions_BT.tolist(), strict=True):
        rows += [
            processors(tokens_C[None, : position + 1], logits_V[None].float())[0]
            for logits_V, position in zip(logits_TV, positions_T, strict=True)
        ]
    return torch.stack(rows).view_as(logits_BTV)
