"""What a model is pretrained on: texts packed into blocks, all at once or as they are streamed.

Texts lie end to end, each closed by the end token, and are cut into blocks. Where a text begins, positions begin anew
at 0; transformers sees by them that tokens of one text do not attend to those of another, and the last token of a text
is not asked for the first one of the next.

Shapes: T positions of a block, N tokens of all texts.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from self_speculation.training.labels import IGNORED_LABEL
from self_speculation.training.tokenizer import end_token, tokenizer_text

# Texts that are tokenised in one call.
TEXTS_AT_ONCE = 256
# Part of the cache's key: to be raised when blocks are made in another way.
CACHE_VERSION = 1


@dataclass(frozen=True)
class Packing:
    """How texts become blocks."""

    separate: bool = True
    # Folder for blocks made before, named by a hash of texts, tokenizer and block size.
    cache: Path | None = None


def tokenised(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's tokens with the end token."""
    end, rest = end_token(tokenizer), iter(texts)
    while group := list(islice(rest, TEXTS_AT_ONCE)):
        yield from ([*ids, end] for ids in tokenizer(group)["input_ids"])


def block_item(block_T: Tensor, is_first_T: Tensor, separate: bool) -> dict[str, Tensor]:
    """A block as the model takes it; `is_first_T` marks the first token of each text."""
    if not separate:
        return {"input_ids": block_T, "labels": block_T}
    index_T = torch.arange(len(block_T))
    position_ids_T = index_T - torch.where(is_first_T, index_T, 0).cummax(0).values
    labels_T = torch.where(is_first_T, IGNORED_LABEL, block_T)
    return {"input_ids": block_T, "labels": labels_T, "position_ids": position_ids_T}


class PackedTexts(Dataset):
    """Texts as tokens, each closed by the end token, laid end to end and cut into blocks of `block_size` tokens."""

    def __init__(
        self,
        texts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        max_blocks: int | None = None,
        packing: Packing = Packing(),
    ) -> None:
        self.separate = packing.separate
        path = packing.cache / f"{_key(texts, tokenizer, block_size)}.pt" if packing.cache else None
        if path and path.is_file():
            packed = _read(path, block_size)
        else:
            packed = _packed(tqdm(texts, desc="Tokenising", unit="text", leave=False), tokenizer, block_size)
            if path:
                _write(packed, path)
        self.blocks, self.is_first = (packed[name][:max_blocks] for name in ("blocks", "is_first"))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return block_item(self.blocks[index].long(), self.is_first[index], self.separate)

    def __str__(self) -> str:
        return f"{self.blocks.numel():,} tokens"

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token (V) occurs."""
        return self.blocks.flatten().bincount(minlength=vocab_size)

    def prompts(self, count: int) -> list[list[int]]:
        """The first halves of the first blocks, to be gone on from."""
        return self.blocks[:count, : self.blocks.shape[1] // 2].tolist()


def _packed(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, Tensor]:
    # A tensor for each text takes a tenth of the memory that Python's lists of integers take.
    rows = [torch.tensor(ids, dtype=torch.int32) for ids in tokenised(texts, tokenizer)]
    ids_N = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32)
    num_blocks = len(ids_N) // block_size
    if not num_blocks:
        raise ValueError(f"The text has {len(ids_N)} tokens, fewer than one block of {block_size} (--block_size).")
    is_first_N = torch.zeros(len(ids_N), dtype=torch.bool)
    is_first_N[torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)] = True
    cut = num_blocks * block_size
    return {"blocks": ids_N[:cut].view(-1, block_size), "is_first": is_first_N[:cut].view(-1, block_size)}


def _key(texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> str:
    digest = hashlib.sha256(f"{CACHE_VERSION} {block_size} {end_token(tokenizer)} {tokenizer_text(tokenizer)}".encode())
    for text in texts:
        digest.update(len(text).to_bytes(8))
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _read(path: Path, block_size: int) -> dict[str, Tensor]:
    """What `_write` wrote."""
    try:
        packed: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
        blocks, is_first = packed["blocks"], packed["is_first"]
        is_whole = blocks.shape == is_first.shape == (len(blocks), block_size)
    except Exception as error:  # Whatever torch's reader finds in bytes that it did not write.
        raise _damaged(path) from error
    if not is_whole:
        raise _damaged(path)
    return packed


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path}, of --token_cache, is damaged; delete it, and it is made anew.")


def _write(packed: dict[str, Tensor], path: Path) -> None:
    """Write beside and rename, so that a kill leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.incomplete")
    torch.save(packed, beside)
    os.replace(beside, path)


class StreamedTexts(IterableDataset):
    """Texts that are read while training goes on, packed as `PackedTexts` packs them; one block is held at a time."""

    def __init__(
        self, texts: Callable[[], Iterable[str]], tokenizer: PreTrainedTokenizerBase, block_size: int, separate: bool
    ) -> None:
        end_token(tokenizer)
        self.texts = texts
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.separate = separate
        self.counts: Counter[int] = Counter()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        marked = chain.from_iterable(
            zip(ids, [True, *[False] * (len(ids) - 1)], strict=True) for ids in tokenised(self.texts(), self.tokenizer)
        )
        while len(block := list(islice(marked, self.block_size))) == self.block_size:
            ids, is_first = zip(*block, strict=True)
            self.counts.update(ids)
            yield block_item(torch.tensor(ids), torch.tensor(is_first), self.separate)

    def __str__(self) -> str:
        return "a stream"

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token (V) occurred in what this process has read."""
        return torch.tensor([self.counts[token] for token in range(vocab_size)])
