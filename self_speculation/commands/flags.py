"""Command-line flags: one parser for all programs, and the dataclasses that several of them share."""

import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
)
from copy import copy
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser

from self_speculation import __version__
from self_speculation.commands.flag_files import flags_in
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.ending import fail
from self_speculation.settings import AUTO, Settings, flag_of, limits_of, setting

HELP_WIDTH = 100
HELP_COLUMN = 32
PLACEHOLDERS = {"int": "INT", "int_or_auto": "INT|auto", "float": "FLOAT", "string_to_bool": "BOOL"}
# What the reference implementation's -1 means for these.
NOT_GIVEN = dict.fromkeys(("exit_layer", "num_speculations"), (-1, "-1"))


@dataclass
class OutputArguments(Settings):
    """Where results go."""

    output_dir: str = setting("./logs", help="Folder for results.")
    log: bool = setting(True, help="Write them there; --no_log writes nothing.", is_rare=True)
    quiet: bool = setting(False, help="Results alone: no progress, and no notes beside them.", is_rare=True)
    json: bool = setting(
        False,
        help="End standard output with the totals as a line of JSON, as it does where that is no terminal.",
        is_rare=True,
    )
    config: str | None = setting(
        None,
        help="File of flags (YAML or JSON, such as the settings beside a result); those given beside it win.",
        is_rare=True,
    )


@dataclass
class DraftArguments(Settings):
    """What drafts."""

    exit_layer: int | None = setting(
        None, help="E: layers that draft (1 to L). Default: auto.", at_least=1, or_auto=True
    )
    num_speculations: int | None = setting(
        None, help="d: tokens drafted a step. Default: auto.", at_least=0, at_most=MOST_SPECULATIONS, or_auto=True
    )


def parse(
    *dataclasses: type,
    rare: tuple[type, ...] = (),
    description: str | None = None,
    args: list[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass from the command line, those of `rare` last.

    `--help` shows a group of flags for each dataclass; those of `rare`, and settings that are rare themselves, only
    `--help_all` does. An unknown flag or a bad value is refused. `defaults` are those in place of a dataclass's own.
    """
    given = sys.argv[1:] if args is None else args
    _check_characters(given)
    if OutputArguments in dataclasses:
        given = with_config(given)
    parser = _Parser(dataclasses, rare, shows_rare="--help_all" in given, description=description)
    parser.set_defaults(**(defaults or {}))
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(args=given, return_remaining_strings=True)
    except ValueError as error:
        fail(_naming_flags(str(error), given, rare))
    # transformers' dataclasses raise errors of many kinds: of packages that are missing, of files, of types.
    except Exception as error:
        if not rare:
            raise
        fail(_naming_flags(str(error) or type(error).__name__, given, rare))
    if unknown:
        fail(parser.sentence_about(unknown[0]))
    return tuple(groups)


def _naming_flags(sentence: str, given: list[str], rare: tuple[type, ...]) -> str:
    """A sentence of transformers' that names no flag, behind the flags that it may be about."""
    names = {f"--{field.name}" for group in rare for field in fields(group)}
    own = [word for word in dict.fromkeys(word.partition("=")[0] for word in given) if word in names]
    about = [flag for flag in own if flag.removeprefix("--") in sentence] or own
    return sentence if "--" in sentence or not own else f"{', '.join(about)}: {sentence}"


def _check_characters(given: list[str]) -> None:
    """Refuse what is not text in the terminal's encoding: tokenizers and files of results would not take it."""
    flag = "the command line"
    for word in given:
        flag = word if word.startswith("--") else flag
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            fail(f"{ascii(flag)[1:-1]}: {word!a} is not {sys.getfilesystemencoding()} text.")


class _Parser(HfArgumentParser):
    """transformers' dataclass parser: a titled group of flags for each dataclass, one sentence for each mistake."""

    def __init__(
        self, shown: tuple[type, ...], rare: tuple[type, ...], shows_rare: bool, description: str | None
    ) -> None:
        self.hidden, self.shows_rare = () if shows_rare else rare, shows_rare
        groups: list[Any] = [*shown, *rare]
        super().__init__(
            groups,
            usage="%(prog)s [--FLAG VALUE ...]",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        general = self.add_argument_group("Help")
        general.add_argument("-h", "--help", action="help", help="Show this and exit.")
        names = "".join(f", and those of transformers' {one.__name__}" for one in rare)
        general.add_argument("--help_all", action="help", help=f"Show also flags that are rarely needed{names}.")
        version = f"layerskip {__version__}"
        general.add_argument("--version", action="version", version=version, help="Show the version and exit.")

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        group, types = self.add_argument_group(group_title(dtype)), get_type_hints(dtype)
        for field in fields(dtype):
            if field.init:
                is_hidden = dtype in self.hidden or (limits_of(field).is_rare and not self.shows_rare)
                flags: Any = _Flags(group, is_hidden, limits_of(field).or_auto)
                self._parse_dataclass_field(flags, _as_flag(field, types[field.name]))

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Flags by name, and the words that are none; what stands for a value that is not given is taken as such."""
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        for name, placeholders in NOT_GIVEN.items():
            if isinstance(namespace, Namespace) and getattr(namespace, name, None) in placeholders:
                setattr(namespace, name, None)
        return namespace, unknown

    def sentence_about(self, word: str) -> str:
        """What is wrong with a word that is no flag, and the flag that looks most like it."""
        if not word.startswith("--"):
            return f"{word!r} is neither a flag nor a flag's value; --help shows all flags."
        name = word.partition("=")[0]
        known = [flag for flag in self._option_string_actions if "-" not in flag.removeprefix("--")]
        nearest = get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
        return f"{name} is unknown; " + (f"did you mean {nearest[0]}?" if nearest else "--help_all shows all flags.")

    def error(self, message: str) -> NoReturn:
        fail(message)


class _Flags:
    """A group of the help that shows each flag in one spelling.

    transformers adds `--exit-layer` to `--exit_layer`, and `--no_sample` to `--sample False`: accepted, not shown.
    """

    def __init__(self, group: _ArgumentGroup, is_hidden: bool, is_or_auto: bool) -> None:
        self.group = group
        self.is_hidden = is_hidden
        self.is_or_auto = is_or_auto

    def add_argument(self, *spellings: str, **options: Any) -> None:
        """What transformers' parser calls for each flag."""
        if self.is_hidden or options.get("action") == "store_false":
            options["help"] = SUPPRESS
        if self.is_or_auto and options.get("type") is int:
            options["type"] = int_or_auto
        action = self.group.add_argument(*spellings, **options)
        action.option_strings = action.option_strings[:1]
        if action.choices is None:
            action.metavar = PLACEHOLDERS.get(getattr(action.type, "__name__", ""), "TEXT")


def int_or_auto(text: str) -> int | str:
    """A whole number, or `auto`, which settings read as None."""
    try:
        return text if text == AUTO else int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"must be a whole number or {AUTO}, not {text!r}") from error


class _HelpFormatter(RawDescriptionHelpFormatter):
    """The program's docstring as it is written, and the defaults of flags that have one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=min(HELP_WIDTH, get_terminal_size().columns))

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, [], SUPPRESS):
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{action.help} (default: {shown})"


def group_title(group: type) -> str:
    """What a group of flags is called: the first line of its dataclass's docstring, if that is ours."""
    if not group.__module__.startswith("transformers."):
        return (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")
    return f"transformers' {group.__name__}"


def _as_flag(field: Field[Any], kind: Any) -> Field[Any]:
    """A field as transformers' parser reads it: named like its flag, its type resolved."""
    own: Any = copy(field)
    own.name, own.type = flag_of(field), kind
    own.metadata = {name: value for name, value in field.metadata.items() if name != "limits"}
    if own.name != field.name:
        own.metadata |= {"dest": field.name, "aliases": [f"--{field.name}"]}
    return own


def with_config(args: list[str]) -> list[str]:
    """The flags of the file that `--config` names, if it names one, and then those given, which so win."""
    name = named_file("config", args)
    return args if name is None else [*flags_in("config", Path(name)), *args]


def with_recipe(folder: Path, args: list[str]) -> list[str]:
    """The flags of the recipe that `--recipe` names, if it names one, and then those given, which so win.

    A recipe is a YAML file of flags and their values in `folder`, or a path to one.
    """
    name = named_file("recipe", args)
    if name is None:
        return args
    path = next((path for path in (folder / f"{name}.yaml", Path(name)) if path.is_file()), None)
    if path is None:
        fail(f"--recipe must be one of {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}, not {name}.")
    return [*flags_in("recipe", path), *args]


def named_file(flag: str, args: list[str]) -> str | None:
    """What a flag names, before all flags are read; without a value it is the program's own parser that says so."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{flag}", nargs="?")
    name: str | None = getattr(parser.parse_known_args(args)[0], flag)
    return name
