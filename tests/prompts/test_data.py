"""Every dataset from files and from the hub: order, shots, templates, lengths, and bad rows named by file and line."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.fitting import PromptLimit, fit, prompt_limit, shorten
from self_speculation.prompts.formats import DATASETS
from self_speculation.prompts.readers import WINDOW_WORDS
from self_speculation.prompts.sources import read_examples
from self_speculation.prompts.splits import EXAMPLE_PROMPTS

ARTICLE = " ".join(f"word{n}" for n in range(120))
SOURCE_ROWS: dict[str, dict[str, str]] = {
    "human_eval": {"task_id": "T/0", "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "f()"},
    "gsm8k": {"question": "1 + 1?", "answer": "1 + 1 = {2}\n#### 2"},
    "top_v2": {"domain": "alarm", "utterance": "Wake me", "semantic_parse": "[IN:CREATE_ALARM ]"},
    "cnn_dm_summarization": {"id": "0", "article": "Long. Story.", "highlights": "Short ."},
    "cnn_dm_lm": {"id": "0", "article": ARTICLE, "highlights": "Short ."},
    "xsum_summarization": {"document": "Long. Story.", "summary": "Short.", "id": "0"},
}
OWN_TEXTS = {
    "human_eval": ("def f():\n", "    pass\n"),
    "gsm8k": ("Question: 1 + 1?\nAnswer:", " 1 + 1 = {2}\n#### 2"),
    "top_v2": ("[alarm] Wake me\nParse:", " [IN:CREATE_ALARM ]"),
    "cnn_dm_summarization": ("Summarize the following article:\n\nLong. Story.\n\nSummary:", " Short ."),
    "cnn_dm_lm": (ARTICLE[: ARTICLE.index(" word100")], ARTICLE[ARTICLE.index(" word100") :]),
    "xsum_summarization": ("Summarize the following article:\n\nLong. Story.\n\nSummary:", " Short."),
}
HUB = {
    "human_eval": ("openai/openai_humaneval", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "top_v2": ("WillHeld/top_v2", None),
    "cnn_dm_summarization": ("abisee/cnn_dailymail", "3.0.0"),
    "cnn_dm_lm": ("abisee/cnn_dailymail", "3.0.0"),
    "xsum_summarization": ("EdinburghNLP/xsum", None),
}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the file's suffix says."""
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else lines(*rows), encoding="utf-8")
    return path


def numbered(name: str, count: int) -> list[dict[str, str]]:
    """Rows of the custom format that say where they come from."""
    return [{"prompt": f"{name} {n}:", "response": f" {name} answer {n}"} for n in range(count)]


def prompts(seed: int = 0, **flags: Any) -> list[str]:
    return [example.prompt for example in read_examples(DatasetArguments(**flags), seed)]


def count_words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six rows with braces and wide characters."""
    path = tmp_path / "rows.jsonl"
    return write(path, [{"prompt": f"p{n} {{x}} {{message}} 漢", "response": f" r{n}"} for n in range(6)])


# The table of datasets.


def test_every_dataset_is_a_choice_of_the_flag() -> None:
    assert set(get_args(get_type_hints(DatasetArguments)["dataset"])) == set(DATASETS)
    assert set(HUB) == {name for name, dataset in DATASETS.items() if dataset.hub}


@pytest.mark.parametrize("name", SOURCE_ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_of_every_dataset_in_every_format(name: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", [SOURCE_ROWS[name]])
    [example] = read_examples(DatasetArguments(dataset=name, data_path=str(path)), 0)
    assert (example.prompt, example.response) == OWN_TEXTS[name]
    assert example.row == SOURCE_ROWS[name]
    assert example.place.startswith(str(path))


@pytest.mark.parametrize("name", HUB)
def test_every_dataset_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None = None, *, split: str) -> list[dict[str, str]]:
        asked.append((path, config, split))
        own = {"prompt", "question", "utterance", "article", "document"} & set(SOURCE_ROWS[name])
        return [SOURCE_ROWS[name] | {key: f"{split}{n} {SOURCE_ROWS[name][key]}" for key in own} for n in range(5)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    examples = read_examples(DatasetArguments(dataset=name, n_shot=2), 0)
    assert asked == [(*HUB[name], split) for split in (["test"] if name == "human_eval" else ["test", "train"])]
    assert len(examples) == (3 if name == "human_eval" else 5)
    shot_split = "test" if name == "human_eval" else "train"
    for example in examples:
        assert [shot_split in shot for shot in example.shots] == [True, True]
        assert "test" in example.message
        assert example.message not in "".join(example.shots)


@pytest.mark.hub
@pytest.mark.parametrize("name", HUB)
def test_the_hub_has_every_dataset(name: str) -> None:
    assert len(prompts(dataset=name, num_samples=2, n_shot=1)) == 2


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), RuntimeError("scripts are not supported")])
def test_a_failure_of_the_hub_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"--dataset gsm8k: openai/gsm8k .*--data_path") as raised:
        read_examples(DatasetArguments(dataset="gsm8k"), 0)
    assert "\n" not in str(raised.value)


def test_reading_files_needs_no_datasets_package() -> None:
    code = (
        "import sys, data; data.read_examples(data.DatasetArguments(), 0);"
        "print({'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLE_PROMPTS.parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_fields_of_the_custom_format_are_flags(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [{"ask": "a,\nb", "say": "c"}])
    flags = {"data_path": str(path), "prompt_field": "ask", "response_field": "say"}
    assert read_examples(DatasetArguments(**flags), 0) == [Example("a,\nb", "c")]


def test_the_length_of_a_text_s_beginning_is_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"article": "one\n two  three"}, {"article": "too short"}])
    arguments = DatasetArguments(dataset="cnn_dm_lm", data_path=str(path), prompt_words=2)
    [example] = read_examples(arguments, 0)
    assert (example.prompt, example.response) == ("one\n two", "  three")
    with pytest.raises(ValueError, match=r"no prompts are left of 2 rows .*--prompt_words 3"):
        prompts(dataset="cnn_dm_lm", data_path=str(path), prompt_words=3)


def test_text_files_are_one_example_each_and_long_ones_are_windows(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(WINDOW_WORDS + 5)]
    (tmp_path / "b.txt").write_text("\n".join(words))
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "notes.jsonl").write_text("not read")
    flags = {"dataset": "text", "prompt_words": 2, "random_shuffle": False}
    first, *rest = read_examples(DatasetArguments(data_path=str(tmp_path), **flags), 0)
    assert (first.prompt, first.response) == ("one two", " three")
    assert [(e.prompt + e.response).split() for e in rest] == [words[:WINDOW_WORDS], words[WINDOW_WORDS:]]
    assert prompts(data_path=str(tmp_path / "b.txt"), **flags) == ["w0\nw1", f"w{WINDOW_WORDS}\nw{WINDOW_WORDS + 1}"]


CHAT = [("system", "Be {brief}."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(("name", "text"), [("messages", "content"), ("data", "message")])
def test_a_chat_is_answered_by_its_last_assistant_turn(name: str, text: str, tmp_path: Path) -> None:
    turns = [{"role": role, text: said} for role, said in [*CHAT, ("user", "Thanks")]]
    path = write(tmp_path / "chat.jsonl", [{name: turns}])
    [example] = read_examples(DatasetArguments(dataset="chat_format", data_path=str(path)), 0)
    assert example.prompt == "System: Be {brief}.\nUser: Hi\nAssistant: Hello\nUser: Why?\nAssistant:"
    assert example.response == " So."
    [shorter], _ = fit([example], count_words, exactly(count_words(example.prompt) - 1))
    assert shorter.prompt == "System: Be {brief}.\nHi\nAssistant: Hello\nUser: Why?\nAssistant:"


# Order, shots and templates.


def test_same_seed_same_prompts_in_the_same_order(rows: Path) -> None:
    arguments = DatasetArguments(data_path=str(rows))
    assert read_examples(arguments, 1) == read_examples(arguments, 1)
    assert [example.before[:2] for example in read_examples(arguments, 1)] == ["p2", "p3", "p5", "p0", "p4", "p1"]
    assert read_examples(arguments, 1) != read_examples(arguments, 2)
    fewer = DatasetArguments(data_path=str(rows), num_samples=2)
    assert read_examples(fewer, 1) == read_examples(arguments, 1)[:2]
    in_order = DatasetArguments(data_path=str(rows), random_shuffle=False, num_samples=1)
    assert read_examples(in_order, 1) == [Example("p0 {x} {message} 漢", " r0")]


def test_shots_of_one_file_are_other_rows_and_the_template_is_around_all(rows: Path) -> None:
    flags = {"data_path": str(rows), "random_shuffle": False, "n_shot": 1, "num_samples": 1}
    template = "<{message}> {x} {} {0}"
    shot, own = "p0 {x} {message} 漢 r0", "p1 {x} {message} 漢"
    assert prompts(**flags, template=template) == [f"<{shot}\n\n{own}> {{x}} {{}} {{0}}"]


def test_a_folder_has_prompts_in_test_and_shots_in_train(tmp_path: Path) -> None:
    write(tmp_path / "test-00000-of-00002.parquet", numbered("test", 2))
    write(tmp_path / "test-00001-of-00002.parquet", numbered("more", 1))
    write(tmp_path / "train_200.jsonl", numbered("train", 9))
    write(tmp_path / "validation.csv", numbered("validation", 3))
    (tmp_path / "README.md").write_text("not data")
    flags = {"data_path": str(tmp_path), "random_shuffle": False}
    assert prompts(**flags) == ["test 0:", "test 1:", "more 0:"]
    examples = read_examples(DatasetArguments(**flags, n_shot=2), 0)
    assert len(examples) == 3
    assert all(len(example.shots) == 2 for example in examples)
    assert all(shot.startswith("train") for example in examples for shot in example.shots)
    # By the seed even where the prompts are in order: splits are often grouped.
    assert len({read_examples(DatasetArguments(**flags, n_shot=2), seed)[0].shots for seed in range(9)}) > 1
    # One shot more is one behind the others.
    assert read_examples(DatasetArguments(**flags, n_shot=3), 0)[0].shots[:2] == examples[0].shots


@pytest.mark.parametrize("name", ["validation_100.jsonl", "valid.jsonl", "eval.json"])
def test_without_train_shots_are_of_the_validation_split(name: str, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", numbered("test", 2))
    write(tmp_path / name, numbered("other", 3))
    [first, _] = prompts(data_path=str(tmp_path), n_shot=3)
    assert first.count("other") == 6


@pytest.mark.parametrize("name", ["test.jsonl", "train.jsonl", "testimony.jsonl"])
def test_a_folder_of_one_split_sets_shots_aside(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, numbered("row", 3))
    assert prompts(data_path=str(tmp_path), n_shot=1, random_shuffle=False) == [
        "row 0: row answer 0\n\nrow 1:",
        "row 0: row answer 0\n\nrow 2:",
    ]


def test_all_files_of_a_folder_without_splits_are_read_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.csv"):
        write(tmp_path / name, numbered(name, 1))
    assert prompts(data_path=str(tmp_path), random_shuffle=False) == ["a.json 0:", "b.jsonl 0:", "c.csv 0:"]


@pytest.mark.parametrize("folder", [True, False])
def test_shots_from_shots_path(folder: bool, tmp_path: Path) -> None:
    data, shots = tmp_path / "test.jsonl", tmp_path / "shots"
    shots.mkdir()
    write(data, numbered("test", 2))
    write(shots / "train.jsonl", numbered("shot", 4))
    write(shots / "test.jsonl", numbered("not", 4))
    path = shots if folder else shots / "train.jsonl"
    examples = read_examples(DatasetArguments(data_path=str(data), shots_path=str(path), n_shot=4), 0)
    assert len(examples) == 2
    assert sorted(examples[0].shots) == [f"shot {n}: shot answer {n}" for n in range(4)]
    with pytest.raises(ValueError, match="--n_shot 5: there are only 4"):
        prompts(data_path=str(data), shots_path=str(path), n_shot=5)


def test_no_shot_is_the_prompt_itself(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", numbered("row", 5) * 2))
    for seed in range(5):
        for example in read_examples(DatasetArguments(data_path=path, shots_path=path, n_shot=3), seed):
            assert len(set(example.shots)) == 3
            assert not any(shot.startswith(example.message) for shot in example.shots)
        for example in read_examples(DatasetArguments(data_path=path, n_shot=3), seed):
            assert not any(shot.startswith(example.message) for shot in example.shots)


# Lengths.


def exactly(most: int) -> PromptLimit:
    return PromptLimit(most, most)


def article(num_words: int, *shots: str, template: str = "{message}") -> Example:
    body = " ".join(f"w{n}" for n in range(num_words))
    return Example("Article: ", " r", body=body, after="\nSummary:", shots=shots, template=template)


def test_a_prompt_that_fits_stays_as_it_is() -> None:
    example = article(10, "a shot")
    assert fit([example], count_words, exactly(14)) == ([example], 0)


def test_shots_go_first_and_from_the_far_end() -> None:
    example = article(10, "far shot", "near shot")
    assert fit([example, article(3)], count_words, exactly(14)) == ([article(10, "near shot"), article(3)], 1)
    assert fit([example], count_words, exactly(13)) == ([article(10)], 1)


@pytest.mark.parametrize("most", range(3, 12))
def test_then_the_article_by_as_few_words_as_needed(most: int) -> None:
    [shorter], count = fit([article(10, "a shot")], count_words, exactly(most))
    assert (shorter.prompt, count) == (article(most - 2).prompt, 1)


def test_a_text_to_go_on_from_keeps_its_end() -> None:
    text = Example("", " d", body="a  b\nc", keep_end=True)
    assert fit([text], count_words, exactly(2))[0][0].prompt == "b\nc"


def test_few_counts_are_needed_for_a_long_article() -> None:
    seen = []

    def count(text: str) -> int:
        seen.append(text)
        return len(text)

    [shorter], _ = fit([article(10_000)], count, exactly(5_000))
    assert 4_990 < len(shorter.prompt) <= 5_000
    assert len(seen) < 20


@pytest.mark.parametrize(
    ("example", "most"),
    [
        (article(10), 2),
        (article(10, template="{message} and five words around it"), 7),
        (Example("a question of five words", "", shots=("a shot",)), 4),
    ],
)
def test_an_instruction_that_does_not_fit_is_refused(example: Example, most: int) -> None:
    with pytest.raises(ValueError, match=r"Sample 1 .*--max_prompt_tokens.*context"):
        fit([article(1, template="{message}") if most > 2 else Example("a", ""), example], count_words, exactly(most))


def test_a_prompt_with_nothing_to_leave_out_may_fill_the_context() -> None:
    question = Example("a question of five words", "", shots=("a shot",))
    assert fit([question], count_words, PromptLimit(4, 5)) == ([replace(question, shots=())], 1)
    assert fit([article(10)], count_words, PromptLimit(4, 9)) == ([article(2)], 1)
    assert fit([article(10)], count_words, PromptLimit(1, 9)) == ([article(1)], 1)


def test_what_was_shortened_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert shorten([article(10), article(3)], count_words, exactly(5)) == [article(3), article(3)]
    assert capsys.readouterr().err == "1 of 2 prompts were shortened to 5 tokens.\n"
    shorten([article(3)], count_words, exactly(5))
    assert capsys.readouterr().err == ""


def test_prompts_leave_room_for_the_answer() -> None:
    assert prompt_limit(DatasetArguments(), context=1024, max_new_tokens=512) == PromptLimit(512, 1023)
    assert prompt_limit(DatasetArguments(), context=256, max_new_tokens=512) == PromptLimit(128, 255)
    assert prompt_limit(DatasetArguments(), context=256, max_new_tokens=256) == PromptLimit(128, 255)
    assert prompt_limit(DatasetArguments(), context=256, max_new_tokens=0) == PromptLimit(255, 255)
    assert prompt_limit(DatasetArguments(max_prompt_tokens=7), context=256, max_new_tokens=512) == exactly(7)
    with pytest.raises(ValueError, match="--max_prompt_tokens must be less than the model's context of 256"):
        prompt_limit(DatasetArguments(max_prompt_tokens=256), context=256, max_new_tokens=1)


# Mistakes.


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "bad.jsonl:2"),
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": 1, "response": "b"}\n', "bad.jsonl:3"),
        ('{"prompt": "a", "resp', "bad.jsonl:1"),
        ("[1, 2]\n", "bad.jsonl:1"),
        ("", "bad.jsonl: there are no rows"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        prompts(data_path=str(path))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("bad.json", '[{"prompt": "a", "response": "b"},\n {"prompt": "a"}]', r"bad\.json: row 2 has no .*'response'"),
        ("bad.json", '[{"prompt": "a", "response": "b"}, 3]', r"bad\.json: row 2 is not a JSON object"),
        ("bad.json", '[{"prompt": "a"},\n{"prompt"]', r"bad\.json:2 is not valid JSON"),
        ("bad.json", '{"prompt": "a", "response": "b"}\n{"prompt": "a"}', r"bad\.json:2"),
        ("bad.csv", "prompt,response\na,b\na\n", r"bad\.csv:3 has no text field 'response'"),
        ("bad.csv", "prompt,response\na,b,c\n", r"bad\.csv:2 has more values"),
        ("bad.csv", 'prompt,response\n"a"b,c\n', r"bad\.csv:2 is not valid CSV"),
        ("bad.csv", "ask,say\na,b\n", r"bad\.csv:2 has no text field 'prompt'; it has ask, say"),
        ("bad.parquet", "PAR?", r"bad\.parquet cannot be read"),
    ],
)
def test_a_bad_row_of_another_format_is_named(name: str, text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        prompts(data_path=str(path))


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.parquet", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}])
    with pytest.raises(ValueError, match=r"bad\.parquet: row 2 has no text field 'response'"):
        prompts(data_path=str(path))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "chat.jsonl:2 has no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "chat.jsonl:2 has no assistant turn"),
        ({"messages": []}, "chat.jsonl:2 has no assistant turn"),
        ({"messages": "a"}, "chat.jsonl:2 has no list of turns"),
        ({"prompt": "a"}, "chat.jsonl:2 has no list of turns"),
        ({"data": [{"role": "user", "content": "a"}]}, "chat.jsonl:2, turn 1 has no text field 'message'"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "chat.jsonl:2, turn 2 has no text field 'role'"),
    ],
)
def test_a_bad_chat_is_named(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    good = {"messages": [{"role": role, "content": text} for role, text in CHAT]}
    path = write(tmp_path / "chat.jsonl", [good, row])
    with pytest.raises(ValueError, match=named):
        prompts(dataset="chat_format", data_path=str(path))


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json", "bad.csv", "bad.txt"])
def test_a_binary_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.\w+ is not UTF-8"):
        prompts(dataset="text" if name == "bad.txt" else "custom_jsonl", data_path=str(path))


@pytest.mark.parametrize("flag", ["data_path", "shots_path"])
def test_a_path_without_data_is_refused(flag: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--{flag}: .*nowhere does not exist"):
        prompts(**{flag: str(tmp_path / "nowhere")}, n_shot=1)
    with pytest.raises(ValueError, match=f"--{flag}: .* has no file of .jsonl"):
        prompts(**{flag: str(tmp_path)}, n_shot=1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"num_samples": 0}, "--num_samples"),
        ({"n_shot": -1}, "--n_shot"),
        ({"prompt_words": 0}, "--prompt_words"),
        ({"dataset": "text", "data_path": "x", "prompt_words": WINDOW_WORDS}, "--prompt_words"),
        ({"max_prompt_tokens": 0}, "--max_prompt_tokens"),
        ({"template": "{}"}, "--template"),
        ({"shots_path": "x"}, "--n_shot"),
        ({"dataset": "text"}, "--data_path"),
        ({"dataset": "chat_format"}, "--data_path"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DatasetArguments(**flags)


# The bundled prompts, and real rows.


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
    assert examples[0].row["entry_point"] == "has_close_elements"


REAL = [
    ("gsm8k", "gsm8k", 1319),
    ("cnn_dm", "cnn_dm_summarization", 500),
    ("cnn_dm", "cnn_dm_lm", 500),
    ("xsum", "xsum_summarization", 500),
    ("wikitext2", "text", 121),
]


@pytest.mark.parametrize(("folder", "name", "num_rows"), REAL, ids=[name for _, name, _ in REAL])
def test_real_rows_with_shots_from_the_folder(folder: str, name: str, num_rows: int, data_folder: Path) -> None:
    arguments = DatasetArguments(dataset=name, data_path=str(data_folder / folder), n_shot=2)
    examples = read_examples(arguments, 0)
    assert len(examples) == num_rows
    assert all(len(example.shots) == 2 and example.response.strip() for example in examples)
    fitted, _ = fit(examples[:20], count_words, exactly(90))
    assert all(count_words(example.prompt) <= 90 for example in fitted if example.body)


def test_real_rows_of_top_v2(data_folder: Path) -> None:
    flags = {"data_path": str(data_folder / "topv2"), "shots_path": str(data_folder / "topv2" / "eval.jsonl")}
    examples = read_examples(DatasetArguments(dataset="top_v2", n_shot=3, num_samples=50, **flags), 0)
    assert len({example.row["domain"] for example in examples}) > 3
    assert all(example.response.startswith(" [IN:") and example.prompt.endswith("Parse:") for example in examples)


def test_prompts_as_the_reference_asks(tmp_path: Path) -> None:
    """TOPv2's are the utterance alone, and no blank line stands between shots."""
    path = tmp_path / "rows.jsonl"
    for name in ("top_v2", "cnn_dm_summarization"):
        path.write_text(json.dumps(SOURCE_ROWS[name]) + "\n")
        asked = prompts(dataset=name, data_path=str(path), prompt_style="reference")
        assert asked == (["Wake me"] if name == "top_v2" else prompts(dataset=name, data_path=str(path)))
    rows = [SOURCE_ROWS["cnn_dm_summarization"] | {"highlights": f"s{number}"} for number in range(3)]
    rows = [row | {"article": f"a{number}"} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"dataset": "cnn_dm_summarization", "data_path": str(path), "n_shot": 1, "num_samples": 1}
    [own], [reference] = prompts(**flags), prompts(**flags, prompt_style="reference")
    assert own.count("Summary:") == reference.count("Summary:") == 2
    shot, rest = own.split("\n\nSummarize", 1)
    assert reference == f"{shot}\nSummarize{rest}"
