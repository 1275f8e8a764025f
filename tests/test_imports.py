"""Imports go strictly downward, the package needs no evaluation package, and functions stay short and typed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "self_speculation"
RANKS = (
    "sampling stopping layer_dropout early_exit_loss interactive hardware run_log acceptance grid_pictures metrics "
    "code_execution tensor_memory muon",
    "cache verification exit_evaluation training_data",
    "fused_layers",
    "early_exit draft_head",
    "decoding_state continuation_scores",
    "generator_base compilation",
    "decoding",
    "autoregressive_generator self_speculation_generator rivals speculative_streamer",
    "loading training equivalence prediction",
    "benchmarking recommendation",
    "lm_eval_adapter",
    "evaluation",
    "evaluation_report",
    "arguments data",
    "synthetic small_models",
    "generate correctness train benchmark eval sweep exit_scores batch_sizes hardware_limit training_cost ablation "
    "topv2",
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}
FOLDERS = (PACKAGE, "benchmarks")
SOURCES = sorted(path for folder in (".", *FOLDERS) for path in ROOT.glob(f"{folder}/*.py") if path.stem != "__init__")
# What only reading data and evaluating need.
OPTIONAL = {"datasets", "lm_eval"}
BARE_BENCHMARKS = {"synthetic", "hardware_limit", "exit_scores"}
EVALUATING = {"lm_eval_adapter", "evaluation", "evaluation_report"}
MAX_LINES = 60

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of what is imported anywhere in a file: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(tree: ast.Module) -> set[str]:
    """The project's own modules that a file imports."""
    names = set()
    for name in imported(tree):
        first, *rest = name.split(".")
        if first in FOLDERS:
            names.add(rest[0])
        elif first in RANK or (ROOT / f"{first}.py").exists():
            names.add(first)
    return names


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imported(parsed(ROOT / PACKAGE / "__init__.py")))


@each_source
def test_imports_go_downward(source: Path) -> None:
    assert source.stem in RANK, f"{source.name} has no rank"
    upward = {name for name in project_imports(parsed(source)) if RANK[name] >= RANK[source.stem]}
    assert not upward


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from self_speculation.decoding.cache import round_up", {"cache"}),
        ("from self_speculation import cache, sampling", {"cache", "sampling"}),
        ("import self_speculation.decoding.cache as c", {"cache"}),
        ("from benchmarks.synthetic import Shape", {"synthetic"}),
        ("def f():\n    from arguments import parse", {"arguments"}),
        ("import torch, datasets\nfrom transformers import Cache", set()),
    ],
)
def test_imports_are_found(code: str, names: set[str]) -> None:
    assert project_imports(ast.parse(code)) == names


@pytest.mark.parametrize(
    "source",
    [path for path in SOURCES if path.parent.name == PACKAGE or path.stem in BARE_BENCHMARKS],
    ids=lambda path: path.stem,
)
def test_the_package_needs_no_evaluation_package(source: Path) -> None:
    """Only data, eval and what eval is made of may import `datasets` and `lm_eval`; some benchmarks do without."""
    names = {name.split(".")[0] for name in imported(parsed(source))}
    assert not names & ({"data", "eval"} | (set() if source.stem in EVALUATING else OPTIONAL))
    assert source.stem in EVALUATING or not project_imports(parsed(source)) & EVALUATING


@each_source
def test_functions_are_short(source: Path) -> None:
    lines = [(function.end_lineno - function.lineno + 1, function.name) for function in functions(parsed(source))]
    assert not [(count, name) for count, name in lines if count > MAX_LINES]


@each_source
def test_functions_are_typed(source: Path) -> None:
    untyped = []
    for function in functions(parsed(source)):
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        untyped += [
            f"{function.name}({parameter.arg})"
            for parameter in parameters
            if parameter and parameter.annotation is None and parameter.arg not in ("self", "cls")
        ]
        untyped += [function.name] if function.returns is None else []
    assert not untyped
