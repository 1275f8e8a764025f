"""Drafts that cost nothing: what followed the last tokens when they occurred before (prompt lookup).

The longest suffix of a row's tokens that occurred earlier, in the prompt or in the answer, tells what may come next.
"""

from dataclasses import dataclass, field

# The shortest suffix that says anything.
LEAST_MATCH = 3
# How many of the latest places with that suffix are looked at for a longer one, and how long a match is looked for.
PLACES, MOST_MATCH = 8, 32


@dataclass(frozen=True)
class FreeDraft:
    """Tokens that followed a match, and how many tokens matched."""

    tokens: list[int] = field(default_factory=list)
    match: int = 0


NOTHING = FreeDraft()


class Lookup:
    """A row's tokens, and where each few of them occurred."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: list[int]) -> None:
        """The row has these tokens more."""
        for token in tokens:
            # The place of a suffix is known once something follows it.
            if len(self.tokens) >= LEAST_MATCH:
                self.ends.setdefault(tuple(self.tokens[-LEAST_MATCH:]), []).append(len(self.tokens))
            self.tokens.append(token)

    def draft(self, most: int) -> FreeDraft:
        """So many tokens, after the longest match; of equals, the latest. What is known goes on in a circle."""
        places = self.ends.get(tuple(self.tokens[-LEAST_MATCH:]), [])[-PLACES:]
        if not places or not most:
            return NOTHING
        match, end = 0, 0
        for place in reversed(places):
            length = self._match(place)
            if length > match:
                match, end = length, place
            if match == MOST_MATCH:
                break
        known = self.tokens[end : end + most]
        return FreeDraft((known * -(-most // len(known)))[:most], match)

    def _match(self, end: int) -> int:
        """How many tokens before a place are the row's last ones."""
        length, last, most = LEAST_MATCH, len(self.tokens), min(end, MOST_MATCH)
        if self.tokens[end - most : end] == self.tokens[-most:]:
            return most
        while length < most and self.tokens[end - length - 1] == self.tokens[last - length - 1]:
            length += 1
        return length
