"""Errors for those who call from Python: sentences name arguments where the programs' name flags."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from self_speculation.decoding.config import GenerationConfig
from self_speculation.settings import flag_of

FLAG = re.compile(r"(?<![\w-])--(\w+)")
# Flags that are not named like the argument.
ARGUMENTS = {flag_of(field): field.name for field in fields(GenerationConfig)} | {"chat": "chat()"}


@contextmanager
def python_errors() -> Iterator[None]:
    """A `ValueError` of what is done in here speaks of arguments."""
    try:
        yield
    except ValueError as error:
        error.args = tuple(_in_python(part) if isinstance(part, str) else part for part in error.args)
        raise


def _in_python(sentence: str) -> str:
    return FLAG.sub(lambda flag: ARGUMENTS.get(flag[1], flag[1]), sentence)
