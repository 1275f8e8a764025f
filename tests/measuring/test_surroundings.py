"""What a measurement depends on besides the code."""

import gc
import json
import subprocess
from pathlib import Path

import pytest
import torch

from self_speculation.measuring.surroundings import (
    OWN_FILE,
    commit,
    last_level_cache_bytes,
    live_tensor_bytes,
    memory_bandwidth,
    surroundings,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"index0": "48K", "index2": "2048K", "index3": "32768K"}, 32768 * 1024),
        ({"index0": "32K", "index3": "96M\n", "index1": "512K"}, 96 * 1024 * 1024),
        ({}, None),
    ],
)
def test_the_last_level_cache_is_the_greatest(sizes: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(size)
        (tmp_path / name / "level").write_text("9\n")
    assert last_level_cache_bytes(CPU, tmp_path) == expected
    assert last_level_cache_bytes(CPU, tmp_path / "nowhere") is None


def test_memory_bandwidth_is_the_best_pass_s() -> None:
    assert memory_bandwidth(CPU, num_bytes=2**16) > 0
    times = iter([0, 4, 10, 12, 20, 28, 30, 33, 40, 49])
    assert memory_bandwidth(CPU, 2**16, clock=lambda: next(times)) == 2**16 / 2


def test_live_tensors_are_counted_once() -> None:
    gc.collect()
    before = live_tensor_bytes()
    tensor = torch.zeros(1000, dtype=torch.float64)
    views = [tensor[10:], tensor.view(10, 100), torch.nn.Parameter(tensor)]
    assert live_tensor_bytes() - before == 8000
    del tensor, views
    assert live_tensor_bytes() == before


def test_surroundings_are_json_and_say_on_what_and_with_what() -> None:
    found = surroundings(CPU)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    keys = {"date", "device", "cores", "threads", "system", "python", "versions", "commit"}
    assert found.keys() == keys
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["threads"] == torch.get_num_threads()
    assert all(found[key] for key in keys - {"commit"})


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
    command = ["git", *settings, *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the package's file, in no repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "top" / "environment"
    (folder / OWN_FILE).parent.mkdir(parents=True)
    (folder / OWN_FILE).write_text("1")
    return folder


def committed(folder: Path) -> str:
    """Everything in a new repository; its commit."""
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "--message", "One")
    return git(folder, "rev-parse", "--short=12", "HEAD")


def test_the_commit_is_the_project_s_and_says_what_has_changed(project: Path) -> None:
    assert commit(project) is None
    number = committed(project)
    assert commit(project) == number
    (project / OWN_FILE).write_text("2")
    assert commit(project) == f"{number}-dirty"
    assert surroundings(CPU)["commit"] == commit()


@pytest.mark.parametrize("is_ignored", [True, False])
def test_an_installed_copy_has_no_commit(project: Path, is_ignored: bool) -> None:
    """Its environment lies in another project's repository, which ignores it, or even has it."""
    (project.parent / ".gitignore").write_text("environment\n" if is_ignored else "")
    (project.parent / "other.py").write_text("1")
    committed(project.parent)
    assert commit(project) is None


def test_a_copy_at_the_top_of_another_repository_has_no_commit(project: Path) -> None:
    (project / ".gitignore").write_text("self_speculation\n")
    committed(project)
    assert commit(project) is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert surroundings(CPU)["commit"] is None
