"""Files that take their places together: after a kill, a model that can be loaded is the old or the new one."""

import os
from pathlib import Path

import pytest

from self_speculation.training.whole_files import INCOMPLETE_FILES, whole_files

MODELS = (
    ("config.json", "model.safetensors"),
    ("config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"),
)


class KillError(Exception):
    """The process is gone."""


def write(folder: Path, names: tuple[str, ...], content: str) -> None:
    with whole_files(folder) as beside:
        for name in names:
            (beside / name).write_text(f"{content} {name}")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("names", MODELS)
@pytest.mark.parametrize("moment", range(4))
def test_a_kill_leaves_no_mix_that_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], moment: int
) -> None:
    write(tmp_path, names, "old")
    replace, left = os.replace, iter(range(moment))

    def killed(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise KillError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        if moment < len(names):
            with pytest.raises(KillError):
                write(tmp_path, names, "new")
    found = contents(tmp_path)
    assert names[-1] not in found or found in ({name: f"{age} {name}" for name in names} for age in ("old", "new"))
    write(tmp_path, names, "new")
    assert contents(tmp_path) == {name: f"new {name}" for name in names}
    assert not (tmp_path / INCOMPLETE_FILES).exists()


@pytest.mark.parametrize("names", MODELS)
def test_one_file_that_differs_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    write(tmp_path, names, "old")
    monkeypatch.setattr(Path, "unlink", None)  # Nothing is taken away before the new one is there.
    with whole_files(tmp_path) as beside:
        for name in names[:-1]:
            (beside / name).write_text(f"old {name}")
        (beside / names[-1]).write_text("new")
    assert contents(tmp_path) == {name: f"old {name}" for name in names[:-1]} | {names[-1]: "new"}


def test_what_fails_changes_nothing_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path, ("mine",), "\udcff")
    assert contents(tmp_path) == {"mine": "mine"}
    write(tmp_path / "folder", ("a",), "new")
    assert contents(tmp_path / "folder") == {"a": "new a"}
