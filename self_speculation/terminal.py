"""What a terminal is shown of a text that a model or a file wrote: its characters, and none of its commands."""

import re
import sys
from typing import TextIO

# What a terminal or XML would not take as text: control characters, exotic line breaks, noncharacters, halves of
# characters; and marks that turn the direction of writing, by which a line can read other than it is.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def harmless(text: str) -> str:
    """`text` with the replacement character for everything that would not be shown as text."""
    return UNPRINTABLE.sub("\ufffd", text)


def shown_on(stream: TextIO, text: str) -> str:
    """`text` as it may be written to the stream: harmless on a terminal; files and pipes get all of it."""
    return harmless(text) if stream.isatty() else text


def say(text: str) -> None:
    """Print a text that quotes a model or a file."""
    print(shown_on(sys.stdout, text))
