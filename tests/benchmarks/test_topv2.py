"""The TOPv2 experiment: what is learnt, what is measured, exact match by hand, and restarts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from benchmarks import topv2
from benchmarks.topv2 import TopV2Arguments
from self_speculation.measuring.run_log import RunLog
from self_speculation.prompts.example import Example
from self_speculation.training.tokenizer import train_tokenizer

FLAGS = (
    "--num_layers 4 --hidden_size 64 --vocab_size 270 --train_steps 3 --train_batch_size 2 --warmup_steps 1 "
    "--num_samples 3 --max_steps 6 --num_speculations 2 --p_max 0.2 --layer_dropout_schedule constant --e_scale 1.0 "
    "--early_exit_curriculum gradual"
)
WAYS = ["full", *(f"{way} {place}" for way in ("exit", "self-speculative") for place in ("3L/4", "L/2", "L/4"))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in TOPv2's layout: ten rows to learn from, four to test on, one of which is in both."""
    folder = tmp_path_factory.mktemp("topv2")
    for split, numbers in (("train", range(10)), ("test", range(9, 13))):
        lines = [
            {"domain": "timer", "utterance": f"stop {n}", "semantic_parse": f"[IN:STOP stop {n} ]"} for n in numbers
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def run_main(run_script: Callable[..., int], rows: Path) -> Callable[..., int]:
    """Run the experiment into a folder; returns its exit code."""

    def run_into(folder: Path, *flags: str) -> int:
        return run_script(topv2.main, *FLAGS.split(), "--data_path", rows, "--output_dir", folder, *flags)

    return run_into


@pytest.fixture(scope="module")
def finished(run_main: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("finished") / "topv2"
    assert run_main(folder) == 0
    return folder


def test_a_run_leaves_a_model_lines_and_a_table(finished: Path) -> None:
    names = {"model", "tokenizer", "topv2.json", "topv2.jsonl", "topv2.md"}
    assert {path.name for path in finished.iterdir()} == names
    lines = RunLog(finished, "topv2").lines()
    assert [line["sample"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert list(line["ways"]) == WAYS
        assert all(line["ways"][name]["tokens"] == line["ways"]["full"]["tokens"] for name in WAYS[4:])
    decoding = json.loads((finished / "topv2.json").read_text())["decoding"]
    assert all(decoding[name]["different_answers"] == 0 for name in WAYS[4:])
    table = (finished / "topv2.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == WAYS
    assert "| 82.9% |" in table[-1]


def test_a_restart_neither_trains_nor_decodes_again(
    run_main: Callable[..., int], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "topv2.jsonl").read_bytes()
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run_main(finished, "--resume", "True") == 0
    assert (finished / "topv2.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--resume"),
        ("--resume True --seed 5", "--seed"),
        ("--num_samples 0", "--num_samples"),
        ("--num_speculations 0", "--num_speculations"),
        ("--exits 1 2", "--exits"),
        ("--rivals other", "--rivals"),
        ("--data_path nowhere", "nowhere"),
    ],
)
def test_mistakes_get_one_sentence(
    run_main: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str], flags: str, named: str
) -> None:
    assert run_main(finished, *flags.split()) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert named in sentence


def test_only_the_parse_is_learnt() -> None:
    example = Example("[timer] stop 1\nParse:", " [IN:STOP stop 1 ]")
    tokenizer = train_tokenizer([example.prompt + example.response], 270)
    data = topv2.training_set([example, Example("[timer] stop\nParse:", " [IN:STOP stop ]")], tokenizer)
    assert data.is_ragged
    row = data.examples[0]
    assert tokenizer.decode(row["input_ids"]) == f"<s>{example.prompt}{example.response}</s>"
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == f"{example.response}</s>"
    assert (
        row["input_ids"][: row["labels"].index(-100) + row["labels"].count(-100)]
        == tokenizer(example.prompt)["input_ids"]
    )
    batch = data.collator([dict(row) for row in data.examples])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert torch.equal(batch["labels"][1][-1:], torch.tensor([-100]))


def test_ways_exit_at_three_quarters_and_draft_there() -> None:
    found = topv2.ways(TopV2Arguments("x", num_speculations=5, max_steps=7), num_layers=12)
    settings = {name: (c.generation_strategy, c.exit_layer, c.num_speculations) for name, c in found.items()}
    assert settings == {
        "full": ("autoregressive", None, None),
        "exit 3L/4": ("early_exit", 9, None),
        "exit L/2": ("early_exit", 6, None),
        "exit L/4": ("early_exit", 3, None),
        "self-speculative 3L/4": ("self_speculative", 9, 5),
        "self-speculative L/2": ("self_speculative", 6, 5),
        "self-speculative L/4": ("self_speculative", 3, 5),
    }
    assert {c.max_new_tokens for c in found.values()} == {7}
    assert not any(c.sample for c in found.values())


def test_a_model_that_was_trained_elsewhere_is_measured(
    run_main: Callable[..., int], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    flags = ["--trained_model", str(finished / "model"), "--exits", "1", "2", "2", "--rivals", "hf_generate"]
    assert run_main(tmp_path / "measured", *flags, "hf_early_exit") == 0
    document = json.loads((tmp_path / "measured" / "topv2.json").read_text())
    assert list(document["decoding"]) == [*WAYS, "hf_generate", "hf_early_exit"]
    before = RunLog(finished, "topv2").lines()
    for line, earlier in zip(RunLog(tmp_path / "measured", "topv2").lines(), before, strict=True):
        assert {line["ways"][name]["text"] for name in (*WAYS[:1], *WAYS[4:], "hf_generate")} == {
            earlier["ways"]["full"]["text"]
        }


def answered(text: str, tokens: list[int], seconds: float, drafted: int) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "text": text,
        "stop_reason": "end_token",
        "prefill_seconds": 0.0,
        "first_token_seconds": 0.0,
        "decode_seconds": seconds,
        "drafted": [drafted],
        "accepted": [1] if drafted else [0],
        "committed": [len(tokens)],
    }


def test_exact_match_counts_rows_and_those_that_are_new() -> None:
    examples = [Example("", f" parse {n}", row={"utterance": f" Say  {n}"}) for n in range(4)]
    full = ["parse 0", " parse 1", "parse 2", "parse 1"]
    early = ["parse 0", "nothing", "parse", "parse 3"]
    lines = [
        {
            "sample": number,
            "ways": {
                "full": answered(full[number], [number], 2.0, 0),
                "exit L/2": answered(early[number], [9], 1.0, 0),
                "self-speculative L/2": answered(full[number], [number], 1.0, 4),
            },
        }
        for number in (2, 0, 3, 1)
    ]
    figures = topv2.results(lines, examples, known={"say 0", "say 3"})
    shown = {name: (own["exact match"], own["exact match, unseen"], own["unseen"]) for name, own in figures.items()}
    assert shown == {
        "full": (0.75, 1.0, 2),
        "exit L/2": (0.5, 0.0, 2),
        "self-speculative L/2": (0.75, 1.0, 2),
    }
    assert [own["different_answers"] for own in figures.values()] == [0, 4, 0]
    table = topv2.as_table(figures)
    assert table.loc["self-speculative L/2"].to_dict() == {
        "exact match": "75.0%",
        "exact match, paper": "82.9%",
        "exact match, unseen": "100.0%",
        "acceptance": "25.0%",
        "acceptance, paper": "97.6%",
        "speed-up": "2.00",
        "speed-up, paper": "1.64",
    }
    assert table.loc["full", "acceptance"] == ""


@pytest.mark.slow
def test_utterances_that_are_new_in_the_real_test_split(data_folder: Path) -> None:
    arguments = TopV2Arguments(str(data_folder / "topv2"))
    known = arguments.known_utterances()
    examples = arguments.examples("test", 100_000)
    assert len(examples) == 38_785
    assert sum(topv2.plain(example.row["utterance"]) in known for example in examples) == 7_210


def test_no_new_rows_leave_the_cell_empty() -> None:
    examples = [Example("", " parse", row={"utterance": "say"})]
    figures = topv2.results([{"sample": 0, "ways": {"full": answered("parse", [1], 1.0, 0)}}], examples, {"say"})
    assert figures["full"]["exact match, unseen"] is None
    assert topv2.as_table(figures).loc["full", "exact match, unseen"] == ""
