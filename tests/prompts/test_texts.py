"""What train.py reads: texts of files and of the hub's layout, streams, prompts with responses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.sources import Examples, Stream, Texts, read_source
from self_speculation.prompts.texts import read_texts


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_the_hubs_layout(suffix: str, streaming: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"content": f"text {number}"} for number in range(30)]
    folder = tmp_path / "own"
    folder.mkdir()
    table = datasets.Dataset.from_list(rows)
    path = str(folder / f"train.{suffix}")
    _ = table.to_parquet(path) if suffix == "parquet" else table.to_json(path)
    flags = {"hub_dataset": str(folder), "text_field": "content", "held_out": 0.1, "stream_held_out": 3}
    source = read_source(TextArguments(**flags, streaming=streaming), seed=5)
    assert type(source) is (Stream if streaming else Texts)
    training = list(source.training()) if streaming else source.training
    assert sorted(training + source.held_out) == sorted(row["content"] for row in rows)
    assert len(source.held_out) == 3
    assert training != sorted(training)
    if streaming:
        assert list(read_source(TextArguments(**flags, streaming=True), seed=5).training()) == training
        assert list(read_source(TextArguments(**flags, streaming=True), seed=6).training()) != training
        with pytest.raises(ValueError, match=r"^--streaming needs --tokenizer"):
            source.for_tokenizer()
    with pytest.raises(ValueError, match=r"^--hub_dataset .*own, row 1, has no text field 'text'"):
        read_source(TextArguments(hub_dataset=str(folder)), seed=0)


def test_a_missing_hub_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--hub_dataset: .*nowhere cannot be loaded"):
        read_source(TextArguments(hub_dataset=str(tmp_path / "nowhere")), seed=0)


def test_parquet_files_are_texts(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"text": [f"text {number}" for number in range(10)]}).to_parquet(tmp_path / "rows.parquet")
    source = read_source(TextArguments(data_path=[str(tmp_path)], held_out=0.2), seed=0)
    assert (len(source.training), len(source.held_out)) == (8, 2)


def test_task_rows_of_train_and_eval_files(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("eval", 2), ("test", 3)):
        rows = [
            {"domain": split, "utterance": f"wake me at {number}", "semantic_parse": f"[IN:WAKE {number} ]"}
            for number in range(count)
        ]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    source = read_source(TextArguments(dataset="top_v2", data_path=[str(tmp_path)]), seed=1)
    assert type(source) is Examples
    assert {example.row["domain"] for example in source.training} == {"train"}
    assert {example.row["domain"] for example in source.held_out} == {"eval"}
    assert (len(source.training), len(source.held_out)) == (6, 2)
    order = [example.row["utterance"] for example in source.training]
    assert order != sorted(order)


def test_task_rows_of_one_file_are_split(tmp_path: Path) -> None:
    rows = [{"q": f"question {number}", "a": f"answer {number}"} for number in range(10)]
    write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"data_path": [str(tmp_path / "rows.jsonl")], "prompt_field": "q", "response_field": "a"}
    source = read_source(TextArguments(dataset="custom_jsonl", held_out=0.3, **flags), seed=1)
    prompts = [example.prompt for example in source.training + source.held_out]
    assert (len(source.held_out), sorted(prompts)) == (3, [row["q"] for row in rows])
    assert source.for_tokenizer()[0] == source.training[0].prompt + source.training[0].response
    with pytest.raises(ValueError, match="has no text field 'prompt'"):
        read_source(TextArguments(dataset="custom_jsonl", data_path=flags["data_path"]), seed=1)
    with pytest.raises(ValueError, match="--dataset human_eval needs --data_path"):
        read_source(TextArguments(dataset="human_eval"), seed=1)


def test_task_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"question": f"{split} {number}", "answer": "42"} for number in range(3)]

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_source(TextArguments(dataset="gsm8k"), seed=1)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert {example.row["question"].split()[0] for example in source.training} == {"train"}
    assert {example.row["question"].split()[0] for example in source.held_out} == {"test"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "--data_path"),
        ({"data_path": ["a"], "hub_dataset": "b"}, "--hub_dataset"),
        ({"data_path": ["a", "b"], "dataset": "top_v2"}, "--data_path"),
        ({"data_path": ["a"], "streaming": True}, "--streaming"),
        ({"hub_dataset": "b", "stream_held_out": 0}, "--stream_held_out"),
    ],
)
def test_bad_arguments_are_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} .*\.$"):
        TextArguments(**fields)


@pytest.mark.slow
def test_train_imports_without_datasets() -> None:
    code = "import sys; sys.modules['datasets'] = None; import train"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


@pytest.mark.slow
def test_real_parses_are_read(data_folder: Path) -> None:
    source = read_source(TextArguments(dataset="top_v2", data_path=[str(data_folder / "topv2")]), seed=1)
    assert (len(source.training), len(source.held_out)) == (124_597, 17_160)


def test_a_text_may_be_piped() -> None:
    """As a shell's `<(command)` does it."""
    reading, writing = os.pipe()
    os.write(writing, b"def piped(): pass")
    os.close(writing)
    try:
        assert list(read_texts(TextArguments(data_path=[f"/dev/fd/{reading}"])).values()) == ["def piped(): pass"]
    finally:
        os.close(reading)
