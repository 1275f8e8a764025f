"""What a model is trained on: a tokenizer, texts packed into blocks, prompts with responses.

Texts lie end to end, each closed by the end token, and are cut into blocks. Where a text begins, positions begin anew
at 0; transformers sees by them that tokens of one text do not attend to those of another, and the last token of a text
is not asked for the first one of the next.

Shapes: T positions of a block, B batch.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from self_speculation.training.early_exit_loss import IGNORED_LABEL

BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
# A line break with the indentation after it is one piece, as is a word with the space before it.
CODE_PIECES = r"[\r\n]+[ \t]*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+"
# Texts that are tokenised in one call.
TEXTS_AT_ONCE = 256
# Part of the cache's key: to be raised when blocks are made in another way.
CACHE_VERSION = 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens that puts `<s>` in front, as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CODE_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class Packing:
    """How texts become blocks."""

    separate: bool = True
    # Folder for blocks made before, named by a hash of texts, tokenizer and block size.
    cache: Path | None = None


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes a text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("--tokenizer has no end-of-sequence token to close the texts with.")
    return tokenizer.eos_token_id


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
            packed = torch.load(path, mmap=True, weights_only=True)
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
    own = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(f"{CACHE_VERSION} {block_size} {end_token(tokenizer)} {own}".encode())
    for text in texts:
        digest.update(len(text).to_bytes(8))
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


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


class Responses(Dataset):
    """Prompts with their responses; the labels are the responses, with the end token, alone."""

    def __init__(self, pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        end = end_token(tokenizer)
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        responses = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
        examples = [(prompt, [*response, end]) for prompt, response in zip(prompts, responses, strict=True)]
        self.examples = [one for one in examples if len(one[0]) + len(one[1]) <= block_size]
        self.num_too_long = len(examples) - len(self.examples)
        if not self.examples:
            raise ValueError(f"No prompt with its response has at most {block_size} tokens (--block_size).")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, response = self.examples[index]
        labels = [IGNORED_LABEL] * len(prompt) + response
        return {"input_ids": torch.tensor(prompt + response), "labels": torch.tensor(labels)}

    def __str__(self) -> str:
        left_out = f" ({self.num_too_long:,} more are too long)" if self.num_too_long else ""
        return f"{len(self):,} responses{left_out}"

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token (V) occurs in the responses: those are what is drafted."""
        ids_N = torch.tensor([token for _, response in self.examples for token in response])
        return ids_N.bincount(minlength=vocab_size)

    def prompts(self, count: int) -> list[list[int]]:
        """The first prompts."""
        return [prompt for prompt, _ in self.examples[:count]]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch; shorter rows end in padding without labels, which no token before it can see."""
    return {
        name: pad_sequence(
            [item[name] for item in items],
            batch_first=True,
            padding_value=IGNORED_LABEL if name == "labels" else 0,
        )
        for name in items[0]
    }
