# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""What train.py trains on: texts of files or of the hub, a stream of them, or prompts with responses."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data import (
    DatasetArguments,
    Example,
    PromptLimit,
    TextArguments,
    fit,
    read_texts,
    split_held_out,
    text_field,
    training_examples,
)
from self_speculation.training_data import PackedTexts, Packing, Responses, StreamedTexts

# Texts of a stream that the next one is drawn from.
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Sizes:
    """Tokens in a training sequence, held-out sequences, and how texts become sequences."""

    block_size: int
    eval_blocks: int
    packing: Packing


@dataclass(frozen=True)
class Texts:
    """Texts to train on and held-out ones."""

    training: list[str]
    held_out: list[str]

    def for_tokenizer(self) -> list[str]:
        """What a new tokenizer learns from."""
        return self.training

    def datasets(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> tuple[PackedTexts, PackedTexts]:
        """Blocks to train on, and to evaluate on."""
        return (
            PackedTexts(self.training, tokenizer, sizes.block_size, packing=sizes.packing),
            PackedTexts(self.held_out, tokenizer, sizes.block_size, sizes.eval_blocks, sizes.packing),
        )


@dataclass(frozen=True)
class Stream:
    """Texts that are read while training; the held-out ones are its first."""

    training: Callable[[], Iterable[str]]
    held_out: list[str]

    def for_tokenizer(self) -> list[str]:
        """Nothing: that would be to read the stream to its end."""
        raise ValueError(
            "--streaming needs --tokenizer or --model: a new tokenizer would have to read all texts first."
        )

    def datasets(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> tuple[StreamedTexts, PackedTexts]:
        """Blocks to train on, and to evaluate on."""
        held_out = PackedTexts(self.held_out, tokenizer, sizes.block_size, sizes.eval_blocks, sizes.packing)
        return StreamedTexts(self.training, tokenizer, sizes.block_size, sizes.packing.separate), held_out


@dataclass(frozen=True)
class Examples:
    """Prompts with responses to train on and held-out ones."""

    training: list[Example]
    held_out: list[Example]

    def for_tokenizer(self) -> list[str]:
        """What a new tokenizer learns from."""
        return [example.prompt + example.response for example in self.training]

    def datasets(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> tuple[Responses, Responses]:
        """Sequences to train on, and to evaluate on."""
        training, held_out = (
            Responses(_pairs(own, tokenizer, sizes.block_size), tokenizer, sizes.block_size)
            for own in (self.training, self.held_out[: sizes.eval_blocks])
        )
        return training, held_out


def _pairs(examples: list[Example], tokenizer: PreTrainedTokenizerBase, block_size: int) -> list[tuple[str, str]]:
    """Prompts and responses; where both have more than `block_size` tokens, the prompt's body is cut to make room."""
    # All at once is much faster than one by one. A response's `<s>` or the like stands for its end token.
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    responses = tokenizer([example.response for example in examples])["input_ids"]

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    pairs = []
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        room = block_size - len(response)
        if len(prompt) > room:
            [example], _ = fit([example], count_tokens, PromptLimit(room, len(prompt)))
        pairs.append((example.prompt, example.response))
    return pairs


def read_source(arguments: TextArguments, seed: int) -> Texts | Stream | Examples:
    """What the flags name, split into training and held-out; shuffled by `seed` where it is prompts or a stream."""
    if arguments.dataset:
        return _examples(arguments, seed)
    if not arguments.hub_dataset:
        return Texts(*split_held_out(read_texts(arguments), arguments.held_out, arguments.split_seed))
    rows = _hub(arguments)
    if not arguments.streaming:
        texts = {f"{number:09}": text for number, text in enumerate(_row_texts(rows, arguments)) if text.strip()}
        return Texts(*split_held_out(texts, arguments.held_out, arguments.split_seed))
    held_out = list(_row_texts(rows.take(arguments.stream_held_out), arguments))
    training = rows.skip(arguments.stream_held_out).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Stream(lambda: _row_texts(training, arguments), held_out)


def _examples(arguments: TextArguments, seed: int) -> Examples:
    own = DatasetArguments(
        dataset=arguments.dataset,
        data_path=next(iter(arguments.data_path), None),
        prompt_field=arguments.prompt_field,
        response_field=arguments.response_field,
    )
    training, held_out = training_examples(own, seed)
    if not held_out:
        count = max(1, round(arguments.held_out * len(training)))
        training, held_out = training[count:], training[:count]
    if not training:
        raise ValueError(f"--dataset {arguments.dataset}: there are too few rows to train on and to hold some out.")
    return Examples(training, held_out)


def _hub(arguments: TextArguments) -> Any:
    """The rows of `--hub_dataset`: a Dataset, or with `--streaming` an IterableDataset."""
    try:
        # Only this needs the package: local files are read without it.
        from datasets import load_dataset

        return load_dataset(
            arguments.hub_dataset, arguments.hub_config, split=arguments.hub_split, streaming=arguments.streaming
        )
    # The hub's clients raise errors of many kinds, and the advice is the same for all.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--hub_dataset: {arguments.hub_dataset} cannot be loaded ({reason}).") from error


def _row_texts(rows: Iterable[dict[str, Any]], arguments: TextArguments) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        yield text_field(row, arguments.text_field, f"--hub_dataset {arguments.hub_dataset}, row {number},")
