"""The page of results: what it shows, that nothing from a file is markup, and what it refuses.

The tests of the programs ask for it where they have results.
"""

import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from self_speculation import __main__
from self_speculation.commands import generate, report
from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.request import RowStep
from self_speculation.generator_base import GenerationResult
from self_speculation.measuring.step_texts import StepTexts

EVIL = "</pre><script>alert(1)</script> & \"quoted\" 'text' \u202e {{ 7 * 7 }}"
VOID = {"meta", "img", "br", "!doctype"}
Run = Callable[..., int]


class Page(HTMLParser):
    """A page as it is read: its elements in order, their texts by class, and that all are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or tag))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1][1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def answer(prompt: str, *steps: RowStep, texts: list[StepTexts] | None = None) -> str:
    """A line of `generate.jsonl`."""
    tokens = [token for step in steps for token in step.tokens]
    text = "".join(text for own in texts or [] for text in own.texts) or "plain"
    line = {"prompt": prompt, **asdict(GenerationResult(text, tokens, None, 0.5, 1.0, 1.0, list(steps)))}
    return json.dumps(line if texts is None else line | {"step_texts": [asdict(own) for own in texts]}) + "\n"


ANSWER = answer(
    EVIL,
    RowStep([5, 6, 7], 1, [5, 8], cell=Cell(2, 3)),
    RowStep([9], 1, [9, 5], cell=Cell(FREE, 1)),
    RowStep([], 0, [6], cell=Cell(2, 0)),
    texts=[StepTexts(["<b>", "two"], "<i>lost"), StepTexts(["three", "four"], ""), StepTexts(["&amp;"], "")],
)


def test_an_answer_is_coloured_by_who_produced_each_token(run_script: Run, logs: Path) -> None:
    (logs / "generate.jsonl").write_text(ANSWER)
    assert run_script(report.main, logs) == 0
    page = Page(logs / "report.html")
    assert (page.texts["accepted"], page.texts["recovered"]) == (["accepted draft", "<b>"], ["recovered", "two"])
    assert (page.texts["looked_up"], page.texts["bonus"]) == (["looked up", "three"], ["bonus", "four", "&amp;"])
    assert [own["data-verdict"] for own in page.all("span") if own.get("class") == "step"] == [
        "step 1 · exit 2 drafted 3, 1 accepted · rejected: '<i>lost' · the last token is the full model's: recovered",
        "step 2 · the lookup drafted 1, 1 accepted · the last token is the full model's: bonus",
        "step 3 · no draft · the last token is the full model's: bonus",
    ]
    [picture] = page.all("img")
    head, data = picture["src"].split(",")
    assert head == "data:image/png;base64"
    assert b64decode(data).startswith(b"\x89PNG")
    assert "Answer 1" in page.texts["h3"]


def test_nothing_from_a_file_is_markup_and_nothing_is_fetched(run_script: Run, logs: Path) -> None:
    (logs / "generate.jsonl").write_text(ANSWER)
    run_script(report.main, logs)
    page = Page(logs / "report.html")
    assert "\n" + EVIL.replace("\u202e", "\ufffd") in page.texts["pre"]
    assert not {"script", "b", "i", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    addresses = [own.get(name) for _, own in page.elements for name in ("src", "href") if name in own]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    [policy] = [own["content"] for own in page.all("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_an_answer_without_texts_of_steps_is_shown_without_colours(run_script: Run, logs: Path) -> None:
    (logs / "generate.jsonl").write_text(answer("first", RowStep([], 0, [5])) + answer("second", RowStep([], 0, [5])))
    assert run_script(report.main, "--folder", logs, "--answers", 1) == 0
    page = Page(logs / "report.html")
    assert "step" not in {own.get("class") for own in page.all("span")}
    assert [text for text in page.texts["pre"] if text.strip()] == ["\nsecond", "\nplain"]
    assert "The newest 1 of 2 answers." in page.texts["p"]


def test_what_generate_logs_is_shown(run: Run, run_script: Run, tmp_path: Path) -> None:
    """Of a conversation's log that is still written to, the whole lines."""
    logs = tmp_path / "logs"
    flags = ["--generation_strategy", "self_speculative", "--exit_layer", 2, "--max_steps", 12, "--sample", "False"]
    assert run(generate.main, "--prompt", "def add(a, b):", *flags) == 0
    text = json.loads((logs / "generate.jsonl").read_text())["text"]
    with (logs / "generate.jsonl").open("a") as file:
        file.write('{"prompt": "half a li')
    assert run_script(__main__.main, "report", logs, "--output", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    coloured = [own for name in ("accepted", "recovered", "bonus") for own in page.texts[name][1:]]
    assert sorted("".join(coloured)) == sorted(text)
    assert not (logs / "report.html").exists()


def test_runs_that_have_only_begun(run_script: Run, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("benchmark", "sweep"):
        (logs / f"{name}.json").write_text(json.dumps({"arguments": {"model": EVIL}}))
        (logs / f"{name}.jsonl").touch()
    assert run_script(report.main, logs) == 0
    assert "shows benchmark, sweep." in capsys.readouterr().out
    page = Page(logs / "report.html")
    assert page.texts["p"].count("Unfinished: there are no totals yet.") == 2
    assert EVIL.replace("\u202e", "\ufffd") in page.texts["td"]


@pytest.mark.parametrize(
    ("files", "flags", "sentence"),
    [
        ({}, [], "error: --folder: logs has no results of generate, correctness, benchmark, sweep, eval, train."),
        ({"notes.txt": "x"}, [], "error: --folder: logs has no results of "),
        ({}, ["--folder", "nowhere"], "error: --folder: nowhere is not a folder."),
        ({"benchmark.json": "[]"}, [], "error: logs/benchmark.json is not a JSON object."),
        ({"benchmark.json": "{}"}, [], "error: logs/benchmark.json is not what benchmark writes."),
        ({"sweep.json": '{"arguments": {}, "final": 3}'}, [], "error: logs/sweep.json is not what sweep writes."),
        ({"correctness.json": "{}"}, [], "error: logs/correctness.json is not what correctness writes."),
        ({"results_1.json": '{"results": 1}'}, [], "error: logs/results_1.json is not what eval writes."),
        ({"exits.csv": "exit_layer,loss\n1,much\n"}, [], "error: logs/exits.csv is not what train writes."),
        ({"layerskip_run.json": "{}"}, [], "error: logs/layerskip_run.json is not what train writes."),
        ({"generate.jsonl": ANSWER + "{]\n"}, [], "error: logs/generate.jsonl:2 is not a JSON object."),
        ({"generate.jsonl": "[" * 10**5 + "\n"}, [], "error: logs/generate.jsonl:1 is not a JSON object."),
        ({"generate.jsonl": '{"prompt": 1}\n'}, [], "error: logs/generate.jsonl is not what generate writes."),
        (
            {"generate.jsonl": ANSWER},
            ["--output", "no/such/x.html"],
            "error: --output no/such/x.html: there is no such",
        ),
        ({"generate.jsonl": ANSWER}, ["--answers", "-1"], "error: --answers must be at least 0"),
    ],
)
def test_other_folders_are_refused(
    files: dict[str, str],
    flags: list[str],
    sentence: str,
    run_script: Run,
    logs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence, and the page that was there before stays."""
    monkeypatch.chdir(logs.parent)
    (logs / "report.html").write_text("before")
    for name, text in files.items():
        (logs / name).write_text(text)
    assert run_script(report.main, *(flags if "--folder" in flags else ["logs", *flags])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(sentence)
    assert (logs / "report.html").read_text() == "before"
