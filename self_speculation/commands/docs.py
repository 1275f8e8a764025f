"""Refresh what README.md and docs/*.md take from the source: functions that they show, and the programs' flags.

python -m self_speculation.commands.docs
python -m self_speculation.commands.docs --check

A page marks what it takes by a comment. `source: PATH NAME` stands above a block of Python, which becomes that function
or class. `flags: PROGRAM` and `end` enclose a program's docstring and flags; `flags: shared` those of several programs.
With --check nothing is written, and the exit code is 1 if a page is stale.
"""

import ast
import dataclasses
import re
from dataclasses import MISSING, Field, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from huggingface_hub.constants import HF_HOME

from self_speculation.commands.flags import group_title, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.settings import Settings, flag_of, limits_of, setting

ROOT = Path(__file__).parents[2]
PROGRAMS = ("generate", "correctness", "benchmark", "sweep", "eval", "train", "export", "serve", "report")
SHARED = "shared"
SOURCE = re.compile(r"^(<!-- source: (\S+) (\S+) -->\n+)```python\n.*?^```$", re.MULTILINE | re.DOTALL)
FLAGS = re.compile(r"^(<!-- flags: (\S+) -->\n).*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
# Defaults that differ from machine to machine, by how they begin.
PLACES = {f"{ROOT}/": "", HF_HOME: "$HF_HOME"}


@dataclass
class DocsArguments(Settings):
    """Which pages, and whether to write them."""

    check: bool = setting(False, help="Write nothing; exit with code 1 if a page is stale.")
    root: str = setting(str(ROOT), help="The repository, with its README.md and docs.")


def refreshed(page: str, root: Path = ROOT) -> str:
    """The page's text with everything that it takes from the source as the source has it now.

    Raises:
        ValueError: the page names a function or a program that there is not.
        OSError: it names a file that there is not.
    """
    page = SOURCE.sub(lambda found: f"{found[1]}```python\n{source_of(root / found[2], found[3])}\n```", page)
    return FLAGS.sub(lambda found: f"{found[1]}\n{flags_of(found[2])}\n\n<!-- end -->", page)


def source_of(path: Path, name: str) -> str:
    """A module's function or class, as it is written."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.get_source_segment(text, node) or ""
    raise ValueError(f"{path} has no function or class {name}.")


def flags_of(program: str) -> str:
    """A program's docstring and groups of flags; those that it shares are named, and listed under `shared` alone."""
    if program == SHARED:
        return "\n\n".join(f"### {group_title(group)}\n\n{listed(group)}" for group in shared_groups())
    shared, groups = shared_groups(), groups_of(program)
    parts = [as_markdown(module_of(program).__doc__ or "")]
    parts += [f"**{group_title(group)}**\n\n{listed(group)}" for group in groups if group not in shared]
    links = [f"[{group_title(group)}](#{anchor(group)})" for group in groups if group in shared]
    return "\n\n".join([*parts, f"Shared with other programs: {' · '.join(links)}."] if links else parts)


def module_of(program: str) -> ModuleType:
    """The program's module."""
    if program not in PROGRAMS:
        raise ValueError(f"A page lists the flags of {program}, but the programs are {', '.join(PROGRAMS)}.")
    return import_module(f"self_speculation.commands.{program}")


def groups_of(program: str) -> tuple[type, ...]:
    """The dataclasses of a program's flags, those that only `--help_all` shows last."""
    module = module_of(program)
    return (*module.GROUPS, *getattr(module, "rare_groups", tuple)())


@cache
def shared_groups() -> tuple[type, ...]:
    """The groups of flags that several programs have, as they are or with changes."""
    counted = [group for program in PROGRAMS for group in groups_of(program)]
    bases = {base_group(group) for group in counted}
    return tuple(dict.fromkeys(base_group(group) or group for group in counted if is_shared(group, counted, bases)))


def is_shared(group: type, counted: list[type], bases: set[type | None]) -> bool:
    """Whether a group occurs twice, or is the base of another, or has such a base."""
    return counted.count(group) > 1 or group in bases or base_group(group) is not None


def base_group(group: type) -> type | None:
    """The group whose flags this one changes, if there is one; TrainingArguments is no group of ours."""
    bases = [base for base in group.__mro__[1:] if dataclasses.is_dataclass(base) and dataclasses.fields(base)]
    return bases[0] if bases and is_ours(group) else None


def is_ours(group: type) -> bool:
    """Whether the group is this package's, and not transformers'."""
    return group.__module__.startswith("self_speculation.")


def anchor(group: type) -> str:
    """The group's heading in a link."""
    return re.sub(r"[^\w -]", "", group_title(group).lower()).replace(" ", "-")


def listed(group: type) -> str:
    """A line for each flag of a group, but not for those that it has from another group."""
    if not is_ours(group):
        name = group.__name__
        address = f"https://huggingface.co/docs/transformers/main_classes/trainer#transformers.{name}"
        return f"Every argument of transformers' [`{name}`]({address}) is a flag too; `--help_all` shows them."
    base = base_group(group)
    own = [field for field in dataclasses.fields(group) if base is None or field.name in group.__annotations__]
    lines = "\n".join(line(field) for field in own if field.init)
    return f"{lines}\n- and those of [{group_title(base)}](#{anchor(base)})." if base else lines


def line(field: Field[Any]) -> str:
    """One flag: its name, what it may be, what it does, and its default."""
    # Alone, or beside None.
    kinds = (field.type, *get_args(field.type))
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    name = f"--{flag_of(field)} {{{','.join(choices)}}}" if choices else f"--{flag_of(field)}"
    default, least = default_of(field), limits_of(field).at_least
    facts = [f"default `{default}`"] if default else []
    facts += [f"at least {least}"] if least is not None else []
    return f"- `{name}`: {field.metadata['help']}" + (f" ({', '.join(facts)})" if facts else "")


def default_of(field: Field[Any]) -> str:
    """The default as it is typed; nothing for None, for an empty list, or where the environment decides."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is MISSING or value is None or field.default_factory is not MISSING:
        return ""
    text = str(value)
    place = next((place for place in PLACES if text.startswith(place)), "")
    return PLACES.get(place, "") + text.removeprefix(place)


def as_markdown(docstring: str) -> str:
    """A docstring whose commands are blocks."""
    paragraphs = docstring.strip().split("\n\n")
    return "\n\n".join(f"```sh\n{text}\n```" if is_command(text) else text for text in paragraphs)


def is_command(paragraph: str) -> bool:
    """Whether a paragraph of a docstring is commands."""
    return paragraph.startswith(("python ", "torchrun ", "layerskip "))


@one_sentence_errors()
def main() -> None:
    """Write the pages that are stale, or name them."""
    [arguments] = parse(DocsArguments, description=__doc__)
    root = Path(arguments.root)
    pages = {path: path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted(root.glob("docs/*.md")))}
    stale = {path: new for path, text in pages.items() if (new := refreshed(text, root)) != text}
    for path, new in stale.items():
        print(f"{path.relative_to(root)} {'is stale' if arguments.check else 'is refreshed'}.")
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
    if arguments.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
