"""Thousands of bad and odd inputs: each program works, or says in one sentence what is wrong and harms nothing."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import forked
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from inputs import PROGRAMS, SOUND, Damaged, Files, Input, inputs
from places import harmed, in_quick_children, main_of, snapshot

REFUSED, INTERRUPTED = 2, 130
BAR = re.compile(r"\r[^\r\n]*(it/s|s/it|\?it/s)\]")
# Each program's share of the inputs: those that take less time have more.
SHARES = {"generate": 0.3, "correctness": 0.2, "benchmark": 0.12, "sweep": 0.08, "eval": 0.1, "train": 0.2}
SAMPLE, PART = 100, 50
NAMED = re.compile(
    r"--[a-z]\w+"
    r"|\b(model|logs|out|new|data|texts|own|tokens|bad)/"
    r"|\b[\w-]+\.(jsonl?|csv|txt|parquet|yaml|npy|py)\b"
    r"|standard (input|output)"
)
DEEP = b'{"a":' * 50_000
# Files by which a promise was once broken: tracebacks, and a log that was rewritten before it was refused.
FOUND = {
    "deep results": ("benchmark", "--resume True", Damaged("logs/benchmark.json", DEEP)),
    "deep line": ("sweep", "--resume True", Damaged("logs/sweep.jsonl", b"{}\n" + DEEP + b"\n7\n")),
    "log in UTF-16": ("sweep", "--resume True", Damaged("logs/sweep.jsonl", '{"cell": null}\n7\n'.encode("utf-16-le"))),
    "deep record": ("train", "--resume_from_checkpoint True", Damaged("out/layerskip_run.json", DEEP)),
    "deep state": (
        "train",
        "--resume_from_checkpoint True",
        Damaged("out/checkpoint-2/trainer_state.json", DEEP),
    ),
    "no first or last token": ("eval", "", Damaged("model/tokenizer_config.json", None)),
}
Attempt = Callable[[Input], tuple[forked.Outcome, str]]


def broken_promise(given_input: Input, ended: forked.Outcome) -> str:
    """What is wrong with an ending; nothing, if the program has kept its promise."""
    if ended.code is None:
        return "it hung"
    if ended.code == 0:
        return "it was accepted" if given_input.is_bad else ""
    if ended.code == INTERRUPTED:
        return ""
    if ended.code != REFUSED:
        return f"exit code {ended.code}"
    if "Traceback" in ended.errors:
        return "a traceback"
    lines = [line for line in BAR.sub("", ended.errors).splitlines() if line.strip()]
    if [line for line in lines if line.startswith("error: ")] != lines[-1:]:
        return "not one sentence"
    return "" if names_something(lines[-1].removeprefix("error: "), given_input) else "nothing is named"


def names_something(sentence: str, given_input: Input) -> bool:
    """Whether a sentence names a flag, a file of the input, or a word that was given."""
    files = [Path(file.path).name for file in given_input.files]
    own = given_input.flags[len(SOUND[given_input.program].split()) :]
    words = [repr(word) if len(word.strip()) < 3 else word for word in own]
    return bool(NAMED.search(sentence)) or any(name in sentence for name in [*files, *words])


@pytest.fixture
def tried(make_place: Callable[[Input], Path]) -> Iterator[Attempt]:
    """A function that tries an input; returns how it ended, and which promise it broke."""

    def attempt(one: Input) -> tuple[forked.Outcome, str]:
        place = make_place(one)
        before = {path: content for path, content in snapshot(place).items() if path.startswith(("logs/", "out/"))}
        ended = forked.start(main_of(one.program), list(one.flags), place, one.text).outcome()
        broken = broken_promise(one, ended)
        if not broken and ended.code == REFUSED and (lost := harmed(before, snapshot(place))):
            broken = f"harmed {lost}"
        return ended, broken

    with in_quick_children():
        yield attempt


@dataclass
class Survey:
    """How many inputs ended how, and those that broke the promise."""

    counts: Counter[int | None] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def extend(self, program: str, part: int, count: int, tried: Attempt, sound: Files) -> None:
        """Try the first inputs of a part, which are the same ones every time."""

        @seed(part)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs(program, sound))
        def attempt(one: Input) -> None:
            ended, broken = tried(one)
            self.counts[ended.code] += 1
            if broken:
                self.failures.append(f"{broken}: {one}\n{ended.errors[-1500:]}")

        attempt()


def check(program: str, count: int, tried: Attempt, sound: Files) -> None:
    """A program keeps its promise for so many inputs, part by part."""
    survey = Survey()
    for part, first in enumerate(range(0, count, PART)):
        survey.extend(program, part, min(PART, count - first), tried, sound)
    print(f"{program}: {dict(survey.counts)}")
    assert not survey.failures, "\n\n".join(survey.failures)


@pytest.mark.parametrize(("program", "flags", "file"), FOUND.values(), ids=FOUND)
def test_what_was_found_is_refused(program: str, flags: str, file: Damaged, tried: Attempt) -> None:
    ended, broken = tried(Input(program, (*SOUND[program].split(), *flags.split()), (file,)))
    assert (ended.code, broken) == (REFUSED, ""), ended.errors


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_sample_of_inputs_is_answered_or_refused(program: str, tried: Attempt, sound: Files) -> None:
    check(program, round(SHARES[program] * SAMPLE), tried, sound)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_inputs_are_answered_or_refused(program: str, tried: Attempt, sound: Files) -> None:
    """`LAYERSKIP_INPUTS` is their number."""
    check(program, round(SHARES[program] * int(os.environ.get("LAYERSKIP_INPUTS", "300"))), tried, sound)
