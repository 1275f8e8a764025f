"""What to decode, and what to train on: examples and texts, as the flags name them. Strings only: no tokens yet."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from self_speculation.prompts.arguments import DatasetArguments, DatasetName, TextArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.formats import DATASETS
from self_speculation.prompts.splits import Rows, prompt_rows, shot_rows, training_rows
from self_speculation.prompts.texts import hub_rows, read_texts, row_texts, split_held_out

# Texts of a stream that the next one is drawn from.
SHUFFLE_BUFFER = 10_000


def read_examples(arguments: DatasetArguments, seed: int) -> list[Example]:
    """The examples to decode, in an order that depends on the seed alone, with shots and template around each.

    Rows are checked when they are taken, and no shot is the prompt itself.
    """
    rows, rows_of_shots = prompt_rows(arguments), shot_rows(arguments) if arguments.n_shot else None
    examples = _examples(rows, arguments, seed if arguments.random_shuffle else None)
    if rows_of_shots:
        # One to spare, for the prompt that is among them.
        shots = _distinct(_examples(rows_of_shots, arguments, seed), arguments.n_shot + 1)
    else:
        shots = _distinct(examples, arguments.n_shot)
    prompts = list(islice(examples, arguments.num_samples))
    if not prompts:
        limits = f"--n_shot {arguments.n_shot} and --prompt_words {arguments.prompt_words}"
        raise ValueError(
            f"--dataset {arguments.dataset}: no prompts are left of {len(rows.places)} rows with {limits}."
        )
    if len(shots) < arguments.n_shot:
        raise ValueError(f"--n_shot {arguments.n_shot}: there are only {len(shots)} rows to take shots from.")
    return [_with_shots(prompt, shots, arguments) for prompt in prompts]


@dataclass(frozen=True)
class Texts:
    """Texts to train on and held-out ones."""

    training: list[str]
    held_out: list[str]

    def for_tokenizer(self) -> list[str]:
        """What a new tokenizer learns from."""
        return self.training


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


@dataclass(frozen=True)
class Examples:
    """Prompts with responses to train on and held-out ones."""

    training: list[Example]
    held_out: list[Example]

    def for_tokenizer(self) -> list[str]:
        """What a new tokenizer learns from."""
        return [example.prompt + example.response for example in self.training]


def read_source(arguments: TextArguments, seed: int) -> Texts | Stream | Examples:
    """What the flags name, split into training and held-out; shuffled by `seed` where it is prompts or a stream."""
    if arguments.dataset:
        return _read_task(arguments, arguments.dataset, seed)
    if not arguments.hub_dataset:
        return Texts(*split_held_out(read_texts(arguments), arguments.held_out, arguments.split_seed))
    rows = hub_rows(arguments)
    if not arguments.streaming:
        texts = {f"{number:09}": text for number, text in enumerate(row_texts(rows, arguments)) if text.strip()}
        return Texts(*split_held_out(texts, arguments.held_out, arguments.split_seed))
    held_out = list(row_texts(rows.take(arguments.stream_held_out), arguments))
    training = rows.skip(arguments.stream_held_out).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Stream(lambda: row_texts(training, arguments), held_out)


def _read_task(arguments: TextArguments, dataset: DatasetName, seed: int) -> Examples:
    """All examples of the training split, in a seed's order; held out are those of a split for it, or the first."""
    own = DatasetArguments(
        dataset=dataset,
        data_path=next(iter(arguments.data_path), None),
        prompt_field=arguments.prompt_field,
        response_field=arguments.response_field,
    )
    training, held_out = (list(_examples(rows, own, seed)) for rows in training_rows(own))
    if not held_out:
        count = max(1, round(arguments.held_out * len(training)))
        training, held_out = training[count:], training[:count]
    if not training:
        raise ValueError(f"--dataset {dataset}: there are too few rows to train on and to hold some out.")
    return Examples(training, held_out)


def _examples(rows: Rows, arguments: DatasetArguments, seed: int | None) -> Iterator[Example]:
    """The rows' examples, in their own order or in a seed's; rows with nothing to write are left out."""
    order = list(range(len(rows.places)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for index in order:
        row, place = rows.rows[index], rows.places[index]
        example = DATASETS[arguments.dataset].example(row, place, arguments)
        if example:
            yield replace(example, row=row, place=place)


def _distinct(examples: Iterator[Example], count: int) -> list[Example]:
    """The next `count` examples that differ, or as many as there are; takes no more from the iterator."""
    found: dict[str, Example] = {}
    while len(found) < count and (example := next(examples, None)):
        found.setdefault(example.message, example)
    return list(found.values())


def _with_shots(example: Example, shots: list[Example], arguments: DatasetArguments) -> Example:
    texts = [shot.solved for shot in shots if shot.message != example.message]
    between = "\n" if arguments.prompt_style == "reference" else Example.between
    template = arguments.template or Example.template
    return replace(example, shots=tuple(texts[: arguments.n_shot]), between=between, template=template)
