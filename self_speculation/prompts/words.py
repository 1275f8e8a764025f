"""Words: runs of characters that are not white space. Texts are shortened, and prompts begun, by whole words."""

import re


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends."""
    return [match.span() for match in re.finditer(r"\S+", text)]
