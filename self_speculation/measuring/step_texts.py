"""An answer's text as its steps wrote it, for its line in a log: what each token added, and the drafts it did not take.

Reading such a line needs no tokenizer. A character of several tokens belongs to the one that completes it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from self_speculation.generator_base import GenerationResult

Decode = Callable[[list[int]], str]

# What stands for a character that is not complete.
INCOMPLETE = "\ufffd"
# The tokens before a draft that are read with it, as some tokenizers write a first token differently.
BEFORE = 4


@dataclass(frozen=True)
class StepTexts:
    """What each token of a step added to the answer, and the text of the drafts that were rejected."""

    texts: list[str]
    rejected: str


def step_texts(result: GenerationResult, decode: Decode) -> list[StepTexts]:
    """Of every step of an answer; together its text, which ends before a stop."""
    added, num_before, found = token_texts(result, decode), 0, []
    for step in result.steps:
        end = num_before + step.accepted
        rejected = _behind(result.tokens[max(0, end - BEFORE) : end], step.drafted[step.accepted :], decode)
        found.append(StepTexts([next(added) for _ in step.tokens], rejected))
        num_before += len(step.tokens)
    return found


def token_texts(result: GenerationResult, decode: Decode) -> Iterator[str]:
    """What each token added: together the answer's text."""
    tokens, left = result.tokens, result.text
    # The text up to `known` is complete; it is decoded from `start` on, so that its cost does not grow.
    start, known = 0, 0
    for end in range(1, len(tokens) + 1):
        before, text = decode(tokens[start:known]), decode(tokens[start:end])
        is_whole = end == len(tokens) or not text.endswith(INCOMPLETE)
        added = text[len(before) :][: len(left)] if is_whole else ""
        if is_whole:
            start, known = known, end
        left = left[len(added) :]
        yield added


def _behind(before: list[int], tokens: list[int], decode: Decode) -> str:
    """The text of tokens behind others."""
    return decode(before + tokens)[len(decode(before)) :] if tokens else ""
