"""Texts from files: plain ones, JSON lines, and the share of them that is held out."""

from pathlib import Path

import pytest

from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.texts import read_texts, split_held_out


def test_texts_come_from_files_and_json_lines(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep" / "skipped").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "deep" / "b.txt").write_text("second")
    (folder / "deep" / "skipped" / "c.txt").write_text("skipped")
    (folder / "blank.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "rows.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "more": 1}\n')
    texts = read_texts(TextArguments(data_path=[str(folder)], exclude=["skipped"]))
    assert texts == {
        "texts/a.txt": "first",
        "texts/deep/b.txt": "second",
        "texts/rows.jsonl:1": "third",
        "texts/rows.jsonl:3": "fourth",
    }
    only = read_texts(TextArguments(data_path=[str(folder)], file_pattern="b.*"))
    assert only == {"texts/deep/b.txt": "second"}
    one = read_texts(TextArguments(data_path=[str(folder / "a.txt"), str(folder / "deep" / "b.txt")]))
    assert list(one.values()) == ["first", "second"]


def test_files_of_one_name_in_two_folders_are_both_read(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number) / "texts").mkdir(parents=True)
        (tmp_path / str(number) / "texts" / "a.txt").write_text(f"text {number}")
        (tmp_path / str(number) / "texts" / "rows.jsonl").write_text(f'{{"text": "row {number}"}}\n')
    texts = read_texts(TextArguments(data_path=[str(tmp_path / "1" / "texts"), str(tmp_path / "2" / "texts")]))
    assert sorted(texts.values()) == ["row 1", "row 2", "text 1", "text 2"]


def test_held_out_texts_are_a_seeded_share() -> None:
    texts = {f"{number:02}": f"text {number}" for number in range(20)}
    training, held_out = split_held_out(texts, 0.25, seed=1)
    assert len(held_out) == 5
    assert sorted(training + held_out) == sorted(texts.values())
    assert split_held_out(dict(reversed(texts.items())), 0.25, seed=1) == (training, held_out)
    assert split_held_out(texts, 0.25, seed=2)[1] != held_out
    assert len(split_held_out(texts, 0.001, seed=1)[1]) == 1
    with pytest.raises(ValueError, match=r"^--data_path holds 1 text"):
        split_held_out({"a": "text"}, 0.5, seed=1)
