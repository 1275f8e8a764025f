"""What the documents say is so: their commands parse, their code runs, their links lead somewhere."""

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from documents import BLOCK, PAGES, README, ROOT, Command, commands, own_python

from self_speculation.commands import export, train
from self_speculation.commands.docs import PROGRAMS, SOURCE, groups_of, refreshed
from self_speculation.commands.flags import parse, with_recipe
from self_speculation.loading import BUNDLED_CHECKPOINT
from self_speculation.settings import flag_of

MAX_TABLE = 100
# What belongs to other programs, or to every program.
OTHER_FLAGS = {"help", "help_all", "version", "check", "gpus", "no_log"}
ON_CPU = ["--bf16", "False", "--use_cpu", "True"]
PAPER_INDEX = ROOT / "docs" / "paper_index.md"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def module_of(program: str) -> ModuleType:
    if program in PROGRAMS:
        return import_module(f"self_speculation.commands.{program}")
    return import_module(program.replace("/", "."))


def flags_of(module: ModuleType) -> set[str]:
    """The flags that a program can have: its groups', and those of every dataclass that a benchmark knows."""
    own = filter(dataclasses.is_dataclass, vars(module).values())
    groups = [*own, *getattr(module, "rare_groups", tuple)()]
    fields = [field for group in groups for field in dataclasses.fields(group)]
    return {name for field in fields for name in (field.name, flag_of(field))}


@each_page
def test_what_is_taken_from_the_source_is_fresh(page: Path) -> None:
    """If not: `python -m self_speculation.commands.docs`."""
    text = page.read_text(encoding="utf-8")
    assert refreshed(text) == text


@pytest.mark.parametrize("command", commands(*PROGRAMS), ids=str)
def test_the_programs_understand_the_commands(command: Command) -> None:
    flags = list(command.flags)
    if command.program == "train":
        flags = with_recipe(train.RECIPES, [*flags, *ON_CPU])
    if command.program == "export":
        flags = export.with_folder(flags)
    parse(*groups_of(command.program), args=flags)


@pytest.mark.parametrize("command", [each for each in commands() if each.program not in PROGRAMS], ids=str)
def test_the_benchmarks_have_the_flags_of_the_commands(command: Command) -> None:
    named = {flag.removeprefix("--") for flag in command.flags if flag.startswith("--")}
    assert named <= flags_of(module_of(command.program))


@each_page
def test_flags_that_are_named_exist(page: Path) -> None:
    benchmarks = [f"benchmarks/{path.stem}" for path in ROOT.glob("benchmarks/*.py")]
    known = OTHER_FLAGS.union(*(flags_of(module_of(program)) for program in (*PROGRAMS, *benchmarks)))
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert set(re.findall(r"(?<![\w-])--([a-z]\w*)", text)) - {"nproc_per_node"} <= known


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@each_page
def test_python_runs(page: Path) -> None:
    names: dict[str, object] = {}
    for block in own_python(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


def test_the_readme_has_python_and_the_step() -> None:
    text = README.read_text(encoding="utf-8")
    assert own_python(text)
    assert SOURCE.search(text)


@each_page
def test_links_and_pictures_are_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in targets:
        path, _, part = target.partition("#")
        if path.startswith("https://"):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not part or part in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """A page's headings, as links name them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_tables_are_narrow(page: Path) -> None:
    lines = BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines()
    rows = [re.sub(r"\[([^\]]*)\]\([^)]*\)|\*\*", r"\1", line) for line in lines if line.startswith("|")]
    assert [row for row in rows if len(row) > MAX_TABLE] == []


def test_the_paper_index_names_what_there_is() -> None:
    rows = re.findall(
        r"^\| .* \| `([\w/]+\.py)` \|(.*)\|$", PAPER_INDEX.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(rows) > 15
    for path, names in rows:
        source = (ROOT / "self_speculation" / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), f"{name} in {path}"
