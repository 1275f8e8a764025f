# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""Where prompts and training texts come from."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass
class TextArguments:
    """Which texts to train on."""

    data_path: list[str] = field(
        metadata={"help": "Files or folders: text files, or JSON lines whose --text_field holds the text."}
    )
    file_pattern: str = field(default="*", metadata={"help": "Which files of a folder to read, e.g. '*.py'."})
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Names of folders to leave out, e.g. site-packages."}
    )
    text_field: str = field(default="text", metadata={"help": "Field of a JSON line that holds the text."})
    held_out: float = field(default=0.05, metadata={"help": "Share of the files (or JSON lines) kept for evaluation."})
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the choice of held-out files; keep it when going on from a model."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, not {self.held_out}.")
        if not self.file_pattern or Path(self.file_pattern).is_absolute():
            raise ValueError(f"--file_pattern must be a pattern like '*.py', not {self.file_pattern!r}.")


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of a JSON-lines file; a bad line is named by file and line."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object.")
    return row


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A row's field, which must be a string."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{where} has no text field {name!r}; it has {', '.join(row) or 'no fields'}.")
    return row[name]


def read_texts(arguments: TextArguments) -> dict[str, str]:
    """Name → text of every file (or JSON line) under `--data_path`; files that are not UTF-8 are left out."""
    texts: dict[str, str] = {}
    names: set[str] = set()
    for root in map(Path, arguments.data_path):
        if not root.exists():
            raise ValueError(f"--data_path: {root} does not exist.")
        for path in [root] if root.is_file() else sorted(root.rglob(arguments.file_pattern)):
            if path.is_file() and not set(path.relative_to(root).parts) & set(arguments.exclude):
                name = str(path.relative_to(root.parent))
                texts |= _file_texts(path, str(path) if name in names else name, arguments.text_field)
                names.add(name)
    if not texts:
        raise ValueError(f"--data_path: no text found in {', '.join(arguments.data_path)}.")
    return texts


def _file_texts(path: Path, name: str, field_name: str) -> dict[str, str]:
    if path.suffix == ".jsonl":
        return {
            f"{name}:{number}": text_field(row, field_name, f"{path}:{number}") for number, row in read_json_lines(path)
        }
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return {}
    return {name: text} if text.strip() else {}


def split_held_out(texts: dict[str, str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Training texts, in a seeded random order, and the `share` of them that is held out (at least one)."""
    names = sorted(texts)
    random.Random(seed).shuffle(names)
    num_held_out = max(1, round(share * len(names)))
    if num_held_out == len(names):
        raise ValueError(f"--data_path holds {len(names)} text(s): too few to hold some out.")
    return [texts[name] for name in names[num_held_out:]], [texts[name] for name in names[:num_held_out]]


EXAMPLE_PROMPTS = Path(__file__).parent / "examples" / "prompts.jsonl"


@dataclass(frozen=True)
class Example:
    """A prompt, and the response that the data has for it."""

    prompt: str
    response: str


@dataclass
class DatasetArguments:
    """Which prompts to decode."""

    dataset: Literal["custom_jsonl", "human_eval"] = field(
        default="custom_jsonl", metadata={"help": "custom_jsonl (fields prompt and response) or human_eval."}
    )
    data_path: str | None = field(
        default=None,
        metadata={"help": "File of JSON lines. Default: examples/prompts.jsonl, or the hub for human_eval."},
    )
    num_samples: int | None = field(default=None, metadata={"help": "How many prompts; all by default."})
    random_shuffle: bool = field(default=True, metadata={"help": "Shuffle the rows, by --seed, before taking some."})
    n_shot: int = field(default=0, metadata={"help": "Solved examples in front of every prompt."})
    template: str | None = field(default=None, metadata={"help": "Text around each prompt, which stands at {message}."})

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, not {self.num_samples}.")
        if self.n_shot < 0:
            raise ValueError(f"--n_shot must not be negative, but is {self.n_shot}.")
        if self.template is not None and "{message}" not in self.template:
            raise ValueError("--template must contain {message}.")


def read_examples(arguments: DatasetArguments, seed: int) -> list[Example]:
    """The examples to decode: shuffled, `n_shot` of them set aside as shots, shots and template around each prompt."""
    examples = {"custom_jsonl": _custom_jsonl, "human_eval": _human_eval}[arguments.dataset](arguments.data_path)
    if arguments.random_shuffle:
        random.Random(seed).shuffle(examples)
    shots, examples = examples[: arguments.n_shot], examples[arguments.n_shot :][: arguments.num_samples]
    if not examples:
        raise ValueError(f"--dataset {arguments.dataset}: no prompts are left after {len(shots)} shots.")
    before = "".join(f"{shot.prompt}{shot.response}\n\n" for shot in shots)
    template = arguments.template or "{message}"
    return [Example(template.replace("{message}", before + row.prompt), row.response) for row in examples]


def _custom_jsonl(data_path: str | None) -> list[Example]:
    return _json_lines(Path(data_path) if data_path else EXAMPLE_PROMPTS, "prompt", "response")


def _human_eval(data_path: str | None) -> list[Example]:
    if data_path:
        return _json_lines(Path(data_path), "prompt", "canonical_solution")
    from datasets import load_dataset

    rows = load_dataset("openai/openai_humaneval", split="test")
    return [Example(row["prompt"], row["canonical_solution"]) for row in rows]


def _json_lines(path: Path, prompt: str, response: str) -> list[Example]:
    return [
        Example(*(text_field(row, name, f"{path}:{number}") for name in (prompt, response)))
        for number, row in read_json_lines(path)
    ]
