"""What a model, a dataset or a file wrote cannot command a terminal; files and pipes get every character."""

import io
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from self_speculation.commands import benchmark, generate
from self_speculation.ending import fail
from self_speculation.harness.logs import without_commands
from self_speculation.harness.report import results_table
from self_speculation.measuring.probes import Probes
from self_speculation.terminal import harmless, say

# Clears the screen, sets the window's title, and turns the direction of writing.
ATTACK = "\x1b[2J\x1b]0;title\x07\x9b1A\u202egnp.exe\u2066x\u200f"
SHOWN = "\ufffd[2J\ufffd]0;title\ufffd\ufffd1A\ufffdgnp.exe\ufffdx\ufffd"
QUICK = Probes(bytes_per_second=lambda device: 1e10, live_bytes=lambda: 12345)

Shown = Callable[[], tuple[io.StringIO, str]]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[(Terminal, SHOWN), (io.StringIO, ATTACK)], ids=["terminal", "pipe"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """A function that makes one stream of standard output and error; returns it, and what of the attack it is to get.

    A function, since pytest puts its own streams in place between a fixture and a test.
    """

    def begin() -> tuple[io.StringIO, str]:
        make, expected = request.param
        stream = make()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream, expected

    return begin


@pytest.mark.parametrize(
    "character",
    [*"\x00\x07\x08\r\x1b\x7f\x85\x9b\u2028\ud800\ufffe", *map(chr, [0x61C, 0x200E, 0x200F])]
    + [chr(code) for first, last in ((0x202A, 0x202E), (0x2066, 0x2069)) for code in range(first, last + 1)],
    ids=ascii,
)
def test_commands_become_the_replacement_character(character: str) -> None:
    assert harmless(f"a{character}b") == "a\ufffdb"


def test_text_stays_as_it_is() -> None:
    text = "def f():\n\treturn 'é 漢字 🙂 👩\u200d💻 עברית'\n"
    assert harmless(text) == text


def test_what_is_said(shown: Shown) -> None:
    stream, expected = shown()
    say(ATTACK)
    with pytest.raises(SystemExit):
        fail(ATTACK)
    assert stream.getvalue() == f"{expected}\nerror: {expected}\n"


@pytest.mark.parametrize("streamer", ["none", "standard", "speculative"])
def test_an_answer(
    streamer: str,
    shown: Shown,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log has all of it."""
    stream, expected = shown()
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda self, tokens, **_: ATTACK if len(tokens) else "")
    flags = ["--generation_strategy", "self_speculative", "--max_steps", 3, "--streamer", streamer]
    assert run(generate.main, "--prompt", "x", *flags) == 0
    assert expected in stream.getvalue()
    assert (ATTACK in stream.getvalue()) == (expected == ATTACK)
    assert json.loads((tmp_path / "logs" / "generate.jsonl").read_text(encoding="utf-8"))["text"] == ATTACK


def test_a_sample_in_full(shown: Shown, run: Callable[..., int], tmp_path: Path) -> None:
    stream, expected = shown()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": ATTACK, "response": ATTACK}) + "\n")
    flags = ["--data_path", rows, "--max_steps", 2, "--verbose", "True", "--score_text", "False"]
    assert run(partial(benchmark.main, QUICK), *flags) == 0
    assert stream.getvalue().count(expected) == 2
    assert (ATTACK in stream.getvalue()) == (expected == ATTACK)


def test_a_sentence_that_quotes_a_row(shown: Shown, run: Callable[..., int], tmp_path: Path) -> None:
    stream, expected = shown()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({ATTACK: 1}) + "\n")
    assert run(benchmark.main, "--data_path", rows) == 2
    assert expected in stream.getvalue()
    assert (ATTACK in stream.getvalue()) == (expected == ATTACK)


def test_names_in_tables(shown: Shown) -> None:
    stream, _ = shown()
    table = results_table({"results": {ATTACK: {"acc,none": 0.5}}, "n-shot": {}})
    Console(file=stream, markup=False, width=200, color_system=None).print(table)
    assert ("\u202e" in stream.getvalue()) == (not stream.isatty())


def test_messages_of_the_log(shown: Shown) -> None:
    stream, expected = shown()
    handler = logging.StreamHandler(stream)
    handler.addFilter(without_commands)
    handler.handle(logging.LogRecord("lm_eval", logging.INFO, "", 0, "row %s", (ATTACK,), None))
    assert stream.getvalue() == f"row {expected}\n"
