"""An LM head for drafting that reads the rows of the most frequent tokens only.

A draft may be wrong, so it may also not know rare tokens; verification reads the whole head, and the output stays the
full model's. It pays where the head is large beside the layers that draft.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary, N tokens that can be drafted.
"""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.adapter_config import file_beside
from self_speculation.decoding.fused_layers import linear, weight_version
from self_speculation.families import LogitsFunction, logits_function

COUNTS_FILE = "token_counts.npy"
MOST_COUNTED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class DraftHead:
    """The rows (N, D) of the LM head that belong to the tokens (N), which ascend; `source` is the whole head.

    `function` is what the model's family does to the head's product.
    """

    rows_ND: Tensor
    tokens_N: Tensor
    source: Tensor
    version: int
    function: LogitsFunction

    @classmethod
    def of(cls, model: PreTrainedModel, num_tokens: int) -> "DraftHead":
        """The head for the `num_tokens` most frequent tokens, by the counts beside the checkpoint.

        Raises:
            ValueError: more tokens than the vocabulary has, or an LM head that is no plain matrix.
        """
        head, vocabulary = model.lm_head, model.config.vocab_size
        if num_tokens > vocabulary:
            raise ValueError(f"--draft_vocab must be at most {vocabulary}, the model's vocabulary, not {num_tokens}.")
        is_plain = type(head) is nn.Linear and head.bias is None
        if not is_plain:
            raise ValueError(f"--draft_vocab needs a plain LM head, and this model's is a {type(head).__name__}.")
        tokens_N = token_order(model.name_or_path or "", vocabulary)[:num_tokens].sort().values
        tokens_N = tokens_N.to(head.weight.device)
        rows_ND = head.weight.data[tokens_N]
        return cls(rows_ND, tokens_N, head.weight, weight_version(head.weight), logits_function(model))

    def is_of(self, model: PreTrainedModel, num_tokens: int) -> bool:
        """Whether the model's head still is what the rows were read from."""
        weight = model.lm_head.weight
        return len(self.tokens_N) == num_tokens and weight is self.source and weight_version(weight) == self.version

    def logits(self, normed_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of an exit's hidden states behind their norm."""
        return self.spread(self.function(linear(normed_BTD, self.rows_ND)))

    def spread(self, logits_BTN: Tensor) -> Tensor:
        """The logits of these tokens among those (B, T, V) of all others, which are −∞."""
        impossible = logits_BTN.new_full((*logits_BTN.shape[:2], len(self.source)), float("-inf"))
        return impossible.index_copy(-1, self.tokens_N, logits_BTN)


class DraftHeads:
    """A model's draft heads: the last one asked for is kept, and made anew when the model's head has changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.last: DraftHead | None = None

    def get(self, num_tokens: int) -> DraftHead:
        """The head for the `num_tokens` most frequent tokens."""
        if self.last is None or not self.last.is_of(self.model, num_tokens):
            self.last = DraftHead.of(self.model, num_tokens)
        return self.last


def token_order(name: str | Path, vocab_size: int) -> Tensor:
    """Tokens (V), the most frequent first, by the counts beside a checkpoint; without any, the vocabulary's order.

    Raises:
        ValueError: the counts are not a whole number for each token.
    """
    path = file_beside(name, COUNTS_FILE)
    if path is None:
        return torch.arange(vocab_size)
    return torch.from_numpy(np.argsort(-read_counts(path, vocab_size), kind="stable"))


def read_counts(path: Path, vocab_size: int) -> NDArray[np.int64]:
    """How often each token (V) occurs.

    Raises:
        ValueError: the file is not a vector of the vocabulary's size of whole numbers that are not negative.
    """
    try:
        # Mapped, so that a shape which the file does not hold takes no memory; objects are never unpickled.
        counts_V = np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is not a NumPy array.") from error
    if not isinstance(counts_V, np.ndarray):
        raise ValueError(f"{path} is not a NumPy array.")
    if counts_V.shape != (vocab_size,):
        raise ValueError(f"{path} has counts of shape {counts_V.shape}, not one for each of {vocab_size} tokens.")
    if counts_V.dtype.kind not in "iu":
        raise ValueError(f"{path} has counts of type {counts_V.dtype}, not whole numbers.")
    if counts_V.min() < 0 or counts_V.max() > MOST_COUNTED:
        raise ValueError(f"{path} has counts from {counts_V.min()} to {counts_V.max()}, not from 0 to {MOST_COUNTED}.")
    return counts_V.astype(np.int64)


def save_counts(counts_V: Tensor, folder: Path) -> None:
    """Keep beside a checkpoint how often each token (V) occurs in its training text."""
    np.save(folder / COUNTS_FILE, counts_V.numpy())
