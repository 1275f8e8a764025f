# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""Command-line flags: one parser for all scripts, and the dataclasses that several of them share."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser


class _Parser(HfArgumentParser):
    """transformers' dataclass parser, with one sentence for each mistake."""

    def error(self, message: str) -> NoReturn:
        fail(message)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and every flag's default."""


@dataclass
class OutputArguments:
    """Where results go."""

    output_dir: str = field(default="./logs", metadata={"help": "Folder for results."})


def fail(message: str) -> NoReturn:
    """Say in one sentence what is wrong with the input, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(*dataclasses: type, args: list[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass from the command line; an unknown flag or a bad value is refused."""
    parser = _Parser(
        dataclasses,
        description=sys.modules["__main__"].__doc__,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    try:
        return parser.parse_args_into_dataclasses(args=args)
    except ValueError as error:
        fail(str(error))


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn what a user can cause (bad values, unreadable files) into one sentence and exit code 2."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except ValueError as error:
        fail(str(error))
