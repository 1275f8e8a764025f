"""Distributions, draws and noise.

Noise is drawn before decoding, per (seed, row, position), so that a row samples the same tokens alone and in a batch,
and so that a step stays a pure function of tensors. At each position three disjoint streams serve the draft's draw,
the acceptance test, and the draw of the recovered or bonus token: sharing one would bias the output. A fourth is the
key of coupled sampling, which draws one number for each token of the vocabulary.

Shapes: B batch, T positions of this call, C capacity, V vocabulary, S noise streams.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DRAFT_STREAM, ACCEPT_STREAM, RECOVER_STREAM, COUPLED_STREAM = range(4)
NUM_STREAMS = 4
MASK_32 = 2**32 - 1


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


def filtered(logits_BTV: Tensor, filters: LogitsProcessorList) -> Tensor:
    """Logits behind the filters (B, T, V), in float32 at least; −∞ for tokens that they leave out."""
    logits_NV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1)
    # The filters look at logits alone, though the annotation of a list of processors asks for tokens.
    return filters(None, logits_NV).view_as(logits_BTV)  # type: ignore[arg-type]


def probabilities(logits_BTV: Tensor, filters: LogitsProcessorList) -> Tensor:
    """The filtered distribution (B, T, V), in float32."""
    return filtered(logits_BTV.float(), filters).softmax(-1)


def draw(p_BTV: Tensor, uniform_BT: Tensor) -> Tensor:
    """Tokens (B, T) from distributions: the first token whose cumulative probability exceeds the uniform number."""
    cumulative_BTV = p_BTV.double().cumsum(-1)
    threshold_BT1 = uniform_BT[..., None] * cumulative_BTV[..., -1:]
    return torch.searchsorted(cumulative_BTV, threshold_BT1, right=True).squeeze(-1).clamp(max=p_BTV.shape[-1] - 1)


def row_keys(prompts: list[list[int]]) -> list[int]:
    """A number of 64 bits for each row: of its prompt and of how many copies of it stand before, and nothing else."""
    copies: Counter[str] = Counter()
    keys = []
    for prompt in map(repr, prompts):
        keys.append(int.from_bytes(hashlib.sha256(f"{copies[prompt]}{prompt}".encode()).digest()[:8]))
        copies[prompt] += 1
    return keys


def noise(seed: int, keys: Sequence[int], capacity: int) -> Tensor:
    """Uniform numbers in [0, 1) of 53 bits, (B, C, S), that depend on the seed, the row's key and the position only."""
    uniforms = []
    for key in keys:
        # As unsigned numbers: a list of Python's would become floats, of which many are equal.
        bits = np.random.Philox(key=np.array([seed, key], dtype=np.uint64))
        # Jumped over all that the other streams could draw: before they do, so that the capacity plays no part.
        coupled = np.random.Generator(bits.jumped()).random((capacity, 1))
        leviathan = np.random.Generator(bits).random((capacity, COUPLED_STREAM))
        uniforms.append(np.concatenate([leviathan, coupled], axis=1))
    return torch.from_numpy(np.stack(uniforms))


def gumbel(key_BT: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise −log(−log u), (B, T, V) in float64, that depends on the key and the token only.

    u is a hash with 52 bits, never 0 nor 1: with fewer, the greatest of a large vocabulary's would be cut off.
    """
    bits_BT1 = (key_BT[..., None] * 2**53).long()
    low_BT1, high_BT1 = bits_BT1 & MASK_32, bits_BT1 >> 32
    tokens_V = torch.arange(vocab_size, device=key_BT.device)
    first_BTV = _mixed(_mixed(tokens_V ^ low_BT1) ^ high_BT1)
    second_BTV = _mixed(_mixed(first_BTV ^ _mixed(high_BT1 ^ MASK_32)) ^ low_BT1)
    hashed_BTV = first_BTV << 20 | second_BTV >> 12
    return -torch.log(-torch.log((hashed_BTV.double() + 0.5) * 2**-52))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which each bit depends on all (the hash function lowbias32)."""
    x = _times(x ^ x >> 16, 0x7FEB352D)
    x = _times(x ^ x >> 15, 0x846CA68B)
    return x ^ x >> 16


def _times(x: Tensor, factor: int) -> Tensor:
    """The product's lower 32 bits, by halves, so that 64 bits never overflow: compilers may count on that."""
    return ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & MASK_32


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
