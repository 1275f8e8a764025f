"""The rows of a dataset's splits: from files that are named for them, or from the hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from self_speculation.prompts.arguments import DatasetArguments, DatasetName
from self_speculation.prompts.formats import DATASETS, Dataset
from self_speculation.prompts.readers import READERS, Row, table_rows, text_windows
from self_speculation.settings import regular_file

EXAMPLE_PROMPTS = Path(__file__).parent / "examples.jsonl"
# How the files of a split are called, best first: for the prompts, for the shots, and to evaluate a training on.
PROMPT_SPLITS = ("test", "validation|valid|eval|dev", "train")
SHOT_SPLITS = ("train", "validation|valid|eval|dev")
HELD_OUT_SPLITS = ("validation|valid|eval|dev", "test")


@dataclass(frozen=True)
class Rows:
    """Source rows, read when they are asked for, and how an error names each: by file and line."""

    places: Sequence[str]
    rows: Sequence[Row]


def prompt_rows(arguments: DatasetArguments) -> Rows:
    """The rows of the prompts to decode."""
    dataset = DATASETS[arguments.dataset]
    if arguments.data_path is not None:
        files = _files("data_path", arguments.data_path, dataset)
        return _file_rows(_of_split(files, PROMPT_SPLITS) or files, dataset)
    return _hub_rows(arguments.dataset, "test") if dataset.hub else _file_rows([EXAMPLE_PROMPTS], dataset)


def shot_rows(arguments: DatasetArguments) -> Rows | None:
    """Rows of the shots; None if they must be set aside from the prompts' own."""
    dataset = DATASETS[arguments.dataset]
    if arguments.shots_path is not None:
        files = _files("shots_path", arguments.shots_path, dataset)
        return _file_rows(_of_split(files, SHOT_SPLITS) or files, dataset)
    if arguments.data_path is not None:
        files = _files("data_path", arguments.data_path, dataset)
        shots = _of_split(files, SHOT_SPLITS)
        return None if not shots or shots == _of_split(files, PROMPT_SPLITS) else _file_rows(shots, dataset)
    return _hub_rows(arguments.dataset, "train") if dataset.has_train else None


def training_rows(arguments: DatasetArguments) -> tuple[Rows, Rows]:
    """The rows to train on, and those to evaluate on, which may be none.

    Of a file, or of a folder whose files are not named for splits, all rows are for training.
    """
    dataset = DATASETS[arguments.dataset]
    if arguments.data_path is not None:
        files = _files("data_path", arguments.data_path, dataset)
        training = _of_split(files, SHOT_SPLITS[:1]) or files
        held_out = _of_split([file for file in files if file not in training], HELD_OUT_SPLITS)
        return _file_rows(training, dataset), _file_rows(held_out, dataset) if held_out else Rows([], [])
    if not dataset.has_train:
        raise ValueError(f"--dataset {arguments.dataset} needs --data_path: the hub has no training split of it.")
    return _hub_rows(arguments.dataset, "train"), _hub_rows(arguments.dataset, "test")


def _hub_rows(name: DatasetName, split: str) -> Rows:
    dataset = DATASETS[name]
    try:
        # Only this needs the package: local files are read without it.
        from datasets import load_dataset

        rows = load_dataset(dataset.hub, dataset.config, split=split)
    # The hub's clients raise errors of many kinds, and the advice is the same for all.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--dataset {name}: {dataset.hub} cannot be loaded from the hub; --data_path takes a local copy ({reason})."
        ) from error
    return Rows([f"{dataset.hub} {split}: row {number}" for number in range(1, len(rows) + 1)], rows)


def _files(flag: str, path: str, dataset: Dataset) -> list[Path]:
    """The file, or a folder's files of the kinds that the dataset may have, by name."""
    root = Path(path)
    if not root.exists():
        raise ValueError(f"--{flag}: {root} does not exist.")
    if not root.is_dir():
        return [regular_file(flag, root)]
    suffixes = [".txt"] if dataset.is_text else list(READERS)
    found = (regular_file(flag, file) for file in root.iterdir() if file.suffix.lower() in suffixes)
    files = sorted(found, key=lambda file: file.name)
    if not files:
        raise ValueError(f"--{flag}: {root} has no file of {', '.join(suffixes)}.")
    return files


def _of_split(files: list[Path], splits: tuple[str, ...]) -> list[Path]:
    """The files of the first split that is there, of a folder in which files are named for splits."""
    for names in splits:
        found = [file for file in files if re.match(rf"({names})(?![a-z])", file.name.lower())]
        if found:
            return found
    return []


def _file_rows(files: list[Path], dataset: Dataset) -> Rows:
    read = text_windows if dataset.is_text else table_rows
    found = [row for file in files for row in read(file)]
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: there are no rows.")
    return Rows([place for place, _ in found], [row for _, row in found])
