"""The one way of making a prompt shorter: shots go first, then words of the body; instruction and question stay."""

import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.words import word_spans

Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class PromptLimit:
    """Most tokens of a prompt; and of one that has nothing to leave out, whose answer may have to end early."""

    most: int
    most_whole: int


def prompt_limit(arguments: DatasetArguments, context: int, max_new_tokens: int) -> PromptLimit:
    """`--max_prompt_tokens`, or what the answer leaves of the model's context: half of it if that is nothing."""
    most = arguments.max_prompt_tokens
    if most is None:
        room = context - max(max_new_tokens, 1) if max_new_tokens < context else max(1, context // 2)
        return PromptLimit(room, context - 1)
    if most >= context:
        raise ValueError(f"--max_prompt_tokens must be less than the model's context of {context}, not {most}.")
    return PromptLimit(most, most)


def longest_that_fits(
    num_shots: int, num_words: int, version: Callable[[int, int], Prompt], fits: Callable[[Prompt], bool]
) -> Prompt:
    """The longest version of a prompt that fits, or the shortest that there is.

    `version(num_shots, num_words)` has that many shots and words of its body: all shots go before the first word.
    """
    for count in range(num_shots, -1, -1):
        found = version(count, num_words)
        if fits(found):
            return found
    if not num_words:
        return found
    # Token counts grow with the words, so that the first count too many can be searched for.
    kept = bisect_left(range(1, num_words), True, key=lambda count: not fits(version(0, count)))
    return version(0, max(kept, 1))


def fit_example(example: Example, fits: Callable[[str], bool]) -> Example:
    """The example with the longest prompt that fits, or with the shortest that there is."""
    num_words = len(word_spans(example.body))
    return longest_that_fits(len(example.shots), num_words, example.shortened, lambda shorter: fits(shorter.prompt))


def fit(examples: list[Example], count_tokens: Callable[[str], int], limit: PromptLimit) -> tuple[list[Example], int]:
    """The examples with prompts within the limit, and how many were made shorter for it.

    Raises:
        ValueError: what must stay has too many tokens.
    """
    fitted = []
    for number, example in enumerate(examples):
        shorter = fit_example(example, lambda text: count_tokens(text) <= limit.most)
        if count_tokens(shorter.prompt) > limit.most_whole:
            raise ValueError(
                f"Sample {number} ({example.place}) is too long: its prompt, without shots and article, has more than "
                f"the {limit.most_whole} tokens that --max_prompt_tokens or the model's context allows."
            )
        fitted.append(shorter)
    return fitted, sum(new != old for new, old in zip(fitted, examples, strict=True))


def response_pairs(
    examples: list[Example], count_tokens: Callable[[list[str]], list[int]], block_size: int
) -> list[tuple[str, str]]:
    """Prompts and responses; where both have more than `block_size` tokens, the prompt is cut to make room.

    `count_tokens` counts the tokens of many texts at once, with the special one in front of each: a prompt's stands
    at its beginning, a response's for the end token behind it.
    """
    prompt_lengths = count_tokens([example.prompt for example in examples])
    response_lengths = count_tokens([example.response for example in examples])
    pairs = []
    for example, prompt_length, response_length in zip(examples, prompt_lengths, response_lengths, strict=True):
        room = block_size - response_length
        if prompt_length > room:
            example = fit_example(example, _within(room, count_tokens))
        pairs.append((example.prompt, example.response))
    return pairs


def _within(room: int, count_tokens: Callable[[list[str]], list[int]]) -> Callable[[str], bool]:
    """Whether a text has at most `room` tokens."""
    return lambda text: count_tokens([text])[0] <= room


def shorten(examples: list[Example], count_tokens: Callable[[str], int], limit: PromptLimit) -> list[Example]:
    """Likewise; says on standard error how many were shortened."""
    fitted, num_shortened = fit(examples, count_tokens, limit)
    if num_shortened:
        print(f"{num_shortened} of {len(examples)} prompts were shortened to {limit.most} tokens.", file=sys.stderr)
    return fitted
