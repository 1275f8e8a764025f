# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""Prompts from files: order, shots, templates, and bad rows named by file and line."""

import json
from pathlib import Path

import pytest

from data import EXAMPLE_PROMPTS, DatasetArguments, Example, read_examples


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six rows with braces and wide characters."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n} {{x}} 漢", "response": f" r{n}"}) + "\n" for n in range(6)))
    return path


def test_same_seed_same_prompts_in_the_same_order(rows: Path) -> None:
    arguments = DatasetArguments(data_path=str(rows))
    assert read_examples(arguments, 1) == read_examples(arguments, 1)
    assert read_examples(arguments, 1) != read_examples(arguments, 2)
    fewer = DatasetArguments(data_path=str(rows), num_samples=2)
    assert read_examples(fewer, 1) == read_examples(arguments, 1)[:2]
    in_order = DatasetArguments(data_path=str(rows), random_shuffle=False, num_samples=1)
    assert read_examples(in_order, 1) == [Example("p0 {x} 漢", " r0")]


def test_shots_are_other_rows_and_the_template_is_around_all(rows: Path) -> None:
    arguments = DatasetArguments(
        data_path=str(rows), random_shuffle=False, n_shot=1, num_samples=1, template="<{message}> {x}"
    )
    assert read_examples(arguments, 0) == [Example("<p0 {x} 漢 r0\n\np1 {x} 漢> {x}", " r1")]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "bad.jsonl:2"),
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": 1, "response": "b"}\n', "bad.jsonl:3"),
        ('{"prompt": "a", "resp', "bad.jsonl:1"),
        ("[1, 2]\n", "bad.jsonl:1"),
        ("", "no prompts"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        read_examples(DatasetArguments(data_path=str(path)), 0)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.jsonl is not UTF-8"):
        read_examples(DatasetArguments(data_path=str(path)), 0)


def test_the_example_prompts_are_python_that_goes_on() -> None:
    examples = read_examples(DatasetArguments(), 0)
    assert len(examples) >= 30
    assert len({example.prompt for example in examples}) == len(examples)
    for example in examples:
        assert not example.prompt.endswith("\n")
        compile(example.prompt + example.response, str(EXAMPLE_PROMPTS), "exec")


def test_real_rows_of_human_eval(data_folder: Path) -> None:
    path = str(data_folder / "humaneval" / "HumanEval.jsonl")
    examples = read_examples(DatasetArguments(dataset="human_eval", data_path=path, random_shuffle=False), 0)
    assert len(examples) == 164
    assert "def has_close_elements" in examples[0].prompt
    assert "return" in examples[0].response
