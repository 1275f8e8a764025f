"""Texts to train on: whole files, rows of files, or rows of a dataset of the hub."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.readers import Row, parquet_rows, read_json_lines, text_field
from self_speculation.settings import regular_file


def read_texts(arguments: TextArguments) -> dict[str, str]:
    """Name → text of every file (or JSON line) under `--data_path`; files that are not UTF-8 are left out."""
    texts: dict[str, str] = {}
    names: set[str] = set()
    for root in map(Path, arguments.data_path):
        if not root.exists():
            raise ValueError(f"--data_path: {root} does not exist.")
        is_folder = root.is_dir()
        for path in sorted(root.rglob(arguments.file_pattern)) if is_folder else [regular_file("data_path", root)]:
            if (path.is_file() or not is_folder) and not set(path.relative_to(root).parts) & set(arguments.exclude):
                name = str(path.relative_to(root.parent))
                texts |= _file_texts(path, str(path) if name in names else name, arguments.text_field)
                names.add(name)
    if not texts:
        raise ValueError(f"--data_path: no text found in {', '.join(arguments.data_path)}.")
    return texts


def split_held_out(texts: dict[str, str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Training texts, in a seeded random order, and the `share` of them that is held out (at least one)."""
    names = sorted(texts)
    random.Random(seed).shuffle(names)
    num_held_out = max(1, round(share * len(names)))
    if num_held_out == len(names):
        raise ValueError(f"--data_path holds {len(names)} text(s): too few to hold some out.")
    return [texts[name] for name in names[num_held_out:]], [texts[name] for name in names[:num_held_out]]


def hub_rows(arguments: TextArguments) -> Any:
    """The rows of `--hub_dataset`: a Dataset, or with `--streaming` an IterableDataset."""
    try:
        # Only this needs the package: local files are read without it.
        from datasets import load_dataset

        return load_dataset(
            arguments.hub_dataset, arguments.hub_config, split=arguments.hub_split, streaming=arguments.streaming
        )
    # The hub's clients raise errors of many kinds, and the advice is the same for all.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--hub_dataset: {arguments.hub_dataset} cannot be loaded ({reason}).") from error


def row_texts(rows: Iterable[Row], arguments: TextArguments) -> Iterator[str]:
    """The texts of a hub dataset's rows."""
    for number, row in enumerate(rows, 1):
        yield text_field(row, arguments.text_field, f"--hub_dataset {arguments.hub_dataset}, row {number},")


def _file_texts(path: Path, name: str, field_name: str) -> dict[str, str]:
    if path.suffix == ".jsonl":
        return {
            f"{name}:{number}": text_field(row, field_name, f"{path}:{number}") for number, row in read_json_lines(path)
        }
    if path.suffix == ".parquet":
        return {place: text_field(row, field_name, place) for place, row in parquet_rows(path)}
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return {}
    return {name: text} if text.strip() else {}
