"""What `pip install` takes along and asks for; `.ci/run` installs it and runs it from another folder."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where a package's files lie in the repository."""
    return ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))


def test_every_package_is_listed() -> None:
    folders = {path.parent for path in (ROOT / "self_speculation").rglob("__init__.py")}
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == {*folders, ROOT / "checkpoints"}


def test_every_file_comes_along() -> None:
    taken = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    modules = {path for package in SETUPTOOLS["packages"] for path in folder_of(package).glob("*.py")}
    files = {path for folder in ("self_speculation", "checkpoints") for path in (ROOT / folder).rglob("*.*")}
    assert {path for path in files if path.is_file() and path.suffix != ".pyc"} <= taken | modules


def test_the_pinned_releases_lie_in_the_ranges() -> None:
    pinned = map(Requirement, (ROOT / "requirements.txt").read_text().splitlines())
    pins = {own.name: str(own.specifier).removeprefix("==") for own in pinned}
    extras = PROJECT["project"]["optional-dependencies"]
    ranges = [*PROJECT["project"]["dependencies"], *extras["bench"], *extras["eval"], *extras["gguf"], *extras["train"]]
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
