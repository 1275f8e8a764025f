"""Command-line flags: one parser for all scripts, and the dataclasses that several of them share."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import Field, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from self_speculation.settings import flag_of


class _Parser(HfArgumentParser):
    """transformers' dataclass parser: one sentence for each mistake, and flags that are not named like their fields."""

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: Field[Any]) -> None:
        own = copy(field)
        own.metadata = {name: value for name, value in field.metadata.items() if name != "limits"}
        own.name = flag_of(field)
        if own.name != field.name:
            own.metadata |= {"dest": field.name, "aliases": [f"--{field.name}"]}
        HfArgumentParser._parse_dataclass_field(parser, own)

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


def parse(*dataclasses: type, description: str | None = None, args: list[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass from the command line; an unknown flag or a bad value is refused."""
    parser = _Parser(
        dataclasses,
        description=description,
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


def with_recipe(folder: Path, args: list[str]) -> list[str]:
    """The flags of the recipe that `--recipe` names, if it names one, and then those given, which so win.

    A recipe is a YAML file of flags and their values in `folder`, or a path to one.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    name = parser.parse_known_args(args)[0].recipe
    if name is None:
        return args
    path = next((path for path in (folder / f"{name}.yaml", Path(name)) if path.is_file()), None)
    if path is None:
        fail(f"--recipe must be one of {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}, not {name}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe: {path} is not valid YAML.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--recipe: {path} is not a mapping of flags to values.")
    flags = [[f"--{flag}", *map(str, value if isinstance(value, list) else [value])] for flag, value in values.items()]
    return [*chain.from_iterable(flags), *args]
