"""Imports go strictly downward between houses, decoding loads little, and functions stay short, typed and narrow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "self_speculation"
# Houses from the ground up; those of one rank know nothing of each other. A house is a folder, or a file named here.
RANKS = (
    f"{PACKAGE}.adapter_config {PACKAGE}.families {PACKAGE}.log_levels {PACKAGE}.masking {PACKAGE}.settings",
    f"{PACKAGE}.exit_adapter {PACKAGE}.pretrained",
    f"{PACKAGE}.checkpoint_kinds",
    f"{PACKAGE}.decoding {PACKAGE}.training {PACKAGE}.prompts",
    PACKAGE,
    f"{PACKAGE}.measuring",
    f"{PACKAGE}.harness",
    f"{PACKAGE}.commands",
    f"{PACKAGE}.__main__ benchmarks scripts",
)
RANK = {house: rank for rank, houses in enumerate(RANKS) for house in houses.split()}
FOLDERS = (PACKAGE, "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
# What decoding does without.
HEAVY = {"datasets", "gguf", "lm_eval", "matplotlib", "pandas", "peft"}
# Files of the package that import one another; the doors at the top stand on them.
MAX_CHAIN = 10
MAX_LINES = 60
MAX_PARAMETERS = 5

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))


def module_name(source: Path) -> str:
    """A file's name in imports: `self_speculation.decoding.cache`; a folder's `__init__` is the folder."""
    return ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(source): source for source in SOURCES}


def house(module: str) -> str:
    """The nearest folder (or file) that has a rank; scripts at the top are one house."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), "scripts")


@cache
def parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from executed(child)


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of what is imported anywhere in a file: `from a import b` gives `a.b`."""
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(tree: ast.Module) -> set[str]:
    """The project's own modules that a file imports; `from a import b` is of `a`, unless `a.b` is a module."""
    names = ((name, name.rpartition(".")[0]) for name in imported(tree))
    return {next(name for name in pair if name in MODULES) for pair in names if MODULES.keys() & set(pair)}


def longest_chain() -> list[str]:
    """Of the package's modules that import one another.

    Raises:
        CycleError: some do so in a circle.
    """
    imports = {name: project_imports(parsed(source)) for name, source in MODULES.items()}
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(imports).static_order():
        chains[module] = [module, *max((chains[name] for name in imports[module]), key=len, default=[])]
    return max((chain for name, chain in chains.items() if name.startswith(PACKAGE)), key=len)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def named_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """What a caller names or places, without `self`, `*` and `**`."""
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]


@each_source
def test_imports_go_downward(source: Path) -> None:
    own = house(module_name(source))
    others = {name for name in project_imports(parsed(source)) if house(name) != own}
    assert not {name for name in others if RANK[house(name)] >= RANK[own]}


def test_no_cycles_and_no_long_chains() -> None:
    chain = longest_chain()
    assert len(chain) <= MAX_CHAIN, " imports ".join(chain)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from self_speculation.decoding.cache import round_up", {"self_speculation.decoding.cache"}),
        ("from self_speculation import loading, __version__", {"self_speculation.loading", "self_speculation"}),
        ("import self_speculation.decoding.cache as c", {"self_speculation.decoding.cache"}),
        ("from benchmarks.synthetic import Shape", {"benchmarks.synthetic"}),
        ("def f():\n    from arguments import parse", {"arguments"}),
        ("if TYPE_CHECKING:\n    import arguments", set()),
        ("import torch, datasets\nfrom transformers import Cache", set()),
    ],
)
def test_imports_are_found(code: str, names: set[str]) -> None:
    assert project_imports(ast.parse(code)) == names


def test_every_module_has_a_house() -> None:
    assert house("self_speculation.decoding.cache") == "self_speculation.decoding"
    assert house("self_speculation.loading") == "self_speculation"
    assert house("generate") == "scripts"
    assert {house(module) for module in MODULES} == RANK.keys()


def test_decoding_loads_no_package_that_it_does_without() -> None:
    """In a fresh interpreter; and the package's name alone loads not even torch."""
    code = f"""
import sys
import self_speculation
print("torch" in sys.modules)
from self_speculation import generate, load
model, tokenizer = load()
print(len(generate(model, tokenizer, "def add(a, b):", max_new_tokens=2, sample=False).tokens))
import self_speculation.commands.generate
print(sorted({HEAVY} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "2", "[]"]


@each_source
def test_functions_are_short(source: Path) -> None:
    lines = [(function.end_lineno - function.lineno + 1, function.name) for function in functions(parsed(source))]
    assert not [(count, name) for count, name in lines if count > MAX_LINES]


@each_source
def test_functions_are_narrow(source: Path) -> None:
    counts = {function.name: len(named_parameters(function)) for function in functions(parsed(source))}
    assert not {name: count for name, count in counts.items() if count > MAX_PARAMETERS}


@each_source
def test_functions_are_typed(source: Path) -> None:
    untyped = []
    for function in functions(parsed(source)):
        parameters = [*named_parameters(function), function.args.vararg, function.args.kwarg]
        untyped += [f"{function.name}({one.arg})" for one in parameters if one and one.annotation is None]
        untyped += [function.name] if function.returns is None else []
    assert not untyped
