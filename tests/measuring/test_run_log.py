"""What a long run leaves on disk, whenever it is killed and however often it is begun."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from self_speculation.measuring.run_log import RunLog

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"max_steps": 8, "stop_words": ["a", "b"], "data_path": None, "temperature": 0.6}
NUM_LINES = 200


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    """A run in a folder that is not there yet."""
    return RunLog(tmp_path / "a" / "b", "sweep")


def contents(log: RunLog) -> dict[str, str]:
    """Every file of the run's folder."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(log.folder.iterdir())}


# Beginning


def test_a_run_begins_with_its_arguments_and_no_lines(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    assert sorted(contents(log)) == ["sweep.json", "sweep.jsonl"]
    assert json.loads(log.document.read_text()) == {"arguments": ARGUMENTS}
    assert log.lines() == []


def test_earlier_runs_are_set_aside_with_the_first_free_number(log: RunLog) -> None:
    for number in range(3):
        log.begin({"run": number}, resume=False)
        log.append({"line_of": number})
    found = {name: json.loads(text) for name, text in contents(log).items()}
    assert found == {
        "sweep.1.json": {"arguments": {"run": 0}},
        "sweep.1.jsonl": {"line_of": 0},
        "sweep.2.json": {"arguments": {"run": 1}},
        "sweep.2.jsonl": {"line_of": 1},
        "sweep.json": {"arguments": {"run": 2}},
        "sweep.jsonl": {"line_of": 2},
    }


def test_tables_and_pictures_are_set_aside_too(log: RunLog) -> None:
    log.folder.mkdir(parents=True)
    kept = ["generate.jsonl", "sweeping.csv", "sweep_map.1.png"]
    for name in (*kept, "sweep.csv", "sweep_map.png", "sweep.jsonl"):
        (log.folder / name).write_text(name)
    log.begin(ARGUMENTS, resume=False)
    names = sorted(path.name for path in log.folder.iterdir())
    assert names == sorted([*kept, "sweep.2.csv", "sweep_map.2.png", "sweep.2.jsonl", "sweep.json", "sweep.jsonl"])


def test_half_of_an_earlier_run_takes_a_number_that_neither_file_has(log: RunLog) -> None:
    log.folder.mkdir(parents=True)
    for name in ("sweep.jsonl", "sweep.1.json", "sweep.2.jsonl", "other.json"):
        (log.folder / name).write_text(f'"{name}"\n')
    log.begin(ARGUMENTS, resume=False)
    assert contents(log) == {
        "other.json": '"other.json"\n',
        "sweep.1.json": '"sweep.1.json"\n',
        "sweep.2.jsonl": '"sweep.2.jsonl"\n',
        "sweep.3.jsonl": '"sweep.jsonl"\n',
        "sweep.json": log.document.read_text(),
        "sweep.jsonl": "",
    }


# Resuming


def test_resuming_keeps_what_is_there(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.append({"n": 1})
    before = contents(log)
    log.begin(ARGUMENTS, resume=True)
    assert contents(log) == before
    log.append({"n": 2})
    assert log.lines() == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"n": 1}\n{"n": 2}\n', '{"n": 1}\n{"n": 2}\n'),
        ('{"n": 1}\n{"n": 2}', '{"n": 1}\n'),
        ('{"n": 1}\n{"n', '{"n": 1}\n'),
        ('{"n": 1}\n{"text": "漢', '{"n": 1}\n'),
        ('{"n": 1}\n\n', '{"n": 1}\n\n'),
        ('{"n', ""),
        ("", ""),
    ],
)
def test_resuming_drops_a_torn_last_line_and_no_other(log: RunLog, content: str, kept: str) -> None:
    log.begin(ARGUMENTS, resume=False)
    torn = content.encode()
    # A kill may cut inside a character.
    log.log.write_bytes(torn[:-1] if content.endswith("漢") else torn)
    log.begin(ARGUMENTS, resume=True)
    assert log.log.read_bytes() == kept.encode()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_steps": 9}, "--max_steps 8, not 9"),
        ({"stop_words": ["a"]}, r"--stop_words \['a', 'b'\], not \['a'\]"),
        ({"data_path": "x"}, "--data_path None, not x"),
        ({"new": 3}, "--new None, not 3"),
    ],
)
def test_resuming_with_other_arguments_is_refused(log: RunLog, changes: dict[str, object], sentence: str) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.append({"n": 1})
    with log.log.open("a") as file:
        file.write('{"torn')
    before = contents(log)
    with pytest.raises(ValueError, match=sentence):
        log.begin(ARGUMENTS | changes, resume=True)
    assert contents(log) == before


def test_resuming_without_an_argument_of_then_is_refused(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    fewer = {name: value for name, value in ARGUMENTS.items() if name != "temperature"}
    with pytest.raises(ValueError, match=r"--temperature 0\.6, not None"):
        log.begin(fewer, resume=True)


def test_some_arguments_may_differ_when_resuming(log: RunLog) -> None:
    """And a tuple is the list that JSON made of it."""
    log.begin(ARGUMENTS | {"resume": False, "verbose": False, "output_dir": "a"}, resume=False)
    log.begin(ARGUMENTS | {"stop_words": ("a", "b"), "resume": True, "verbose": True, "output_dir": "./a"}, resume=True)


@pytest.mark.parametrize("missing", ["sweep.json", "sweep.jsonl", "both"])
def test_resuming_nothing_is_refused(log: RunLog, missing: str) -> None:
    if missing != "both":
        log.begin(ARGUMENTS, resume=False)
        (log.folder / missing).unlink()
    with pytest.raises(ValueError, match=r"--resume: there is no earlier run in .*b\."):
        log.begin(ARGUMENTS, resume=True)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"n": 1}\n{"te{"n": 2}\n{"n": 3}\n', [{"n": 1}, {"n": 3}]),
        ('{"te\n{"n": 3}\n', [{"n": 3}]),
        ('{"n": 1}\n{"te\n{"n', [{"n": 1}]),
    ],
)
def test_resuming_drops_a_torn_line_that_another_process_went_on_behind(
    log: RunLog, content: str, kept: list[dict[str, int]]
) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.log.write_text(content)
    log.begin(ARGUMENTS, resume=True)
    assert log.lines() == kept
    assert sorted(contents(log)) == ["sweep.json", "sweep.jsonl"]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"arguments": 3}', '{"arguments', "\udcff"])
def test_a_damaged_document_is_named_when_resuming(log: RunLog, content: str) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.document.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"b/sweep\.json is damaged; without --resume the run is begun anew\.$"):
        log.begin(ARGUMENTS, resume=True)


# Lines


@pytest.mark.parametrize("damaged", ["", "x", "[1]", "3", '"{"', "\udcff"])
def test_a_damaged_line_is_named_by_its_number(log: RunLog, damaged: str) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.log.write_bytes(f'{{"n": 1}}\n{damaged}\n{{"n": 2}}\n'.encode("utf-8", "surrogateescape"))
    log.begin(ARGUMENTS, resume=True)
    with pytest.raises(ValueError, match=r"b/sweep\.jsonl:2 is damaged; delete that line, and --resume True does"):
        log.lines()


def test_a_line_that_its_reader_does_not_understand_is_named(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.append({"n": 1})
    log.append({"m": 2})
    assert log.read(lambda line: line.get("n")) == [1, None]
    with pytest.raises(ValueError, match=r"b/sweep\.jsonl:2 is damaged"):
        log.read(lambda line: line["n"])


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """A disk on which no file can become longer than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_was_written_in_part_is_noticed_at_once_and_repaired(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.append({"n": 1})
    with room(15), pytest.raises(OSError, match="a line was written in part; make room, and go on with") as caught:
        log.append({"n": 22222})
    assert caught.value.filename == str(log.log)
    assert log.log.read_bytes() == b'{"n": 1}\n{"n": '
    log.begin(ARGUMENTS, resume=True)
    log.append({"n": 22222})
    assert log.lines() == [{"n": 1}, {"n": 22222}]


def test_a_full_disk_names_the_file(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    with room(0):
        for write, path in ((log.append, log.log), (log.write, log.document)):
            with pytest.raises(OSError, match=r".+") as caught:
                write({"n": 1})
            assert caught.value.filename == str(path)
    assert json.loads(log.document.read_text()) == {"arguments": ARGUMENTS}


@pytest.mark.parametrize(
    "text", ["a\nb\r\nc\rd", "one\u2028two\u2029three\x85four\x0b\x0cfive\x1c", "漢字 🙂\n", '"\\\0\t', ""]
)
def test_any_text_goes_through_a_line_and_the_document(log: RunLog, text: str) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.append({"text": text})
    log.append({text: [text]})
    log.write({"text": text})
    assert log.lines() == [{"text": text}, {text: [text]}]
    assert log.log.read_bytes().count(b"\n") == 2
    assert json.loads(log.document.read_text(encoding="utf-8")) == {"text": text}


WRITER = f"""
import sys
from pathlib import Path
from self_speculation.measuring.run_log import RunLog

log, writer = RunLog(Path(sys.argv[1]), "sweep"), sys.argv[2]
for number in range({NUM_LINES}):
    log.append({{"writer": writer, "number": number, "text": writer * (37 * number)}})
"""


def test_lines_of_two_processes_do_not_mix(log: RunLog) -> None:
    log.begin(ARGUMENTS, resume=False)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, log.folder, name], cwd=ROOT) for name in "12"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    lines = log.lines()
    assert len(lines) == 2 * NUM_LINES
    for writer in "12":
        own = [line for line in lines if line["writer"] == writer]
        assert [line["number"] for line in own] == list(range(NUM_LINES))
        assert all(line["text"] == writer * (37 * line["number"]) for line in own)


# What cannot be written leaves what was there


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ({1, 2}, TypeError)]
)
def test_what_is_not_json_leaves_document_and_log_as_they_were(
    log: RunLog, value: object, error: type[Exception]
) -> None:
    log.begin(ARGUMENTS, resume=False)
    log.append({"n": 1})
    before = contents(log)
    with pytest.raises(error):
        log.write({"good": 1, "bad": value})
    with pytest.raises(error):
        log.append({"good": 1, "bad": value})
    assert contents(log) == before


def test_the_document_is_replaced_as_a_whole(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while it is written, or after a kill in the middle, sees the old one."""
    log.begin(ARGUMENTS, resume=False)
    seen = []
    write_text = Path.write_text

    def kill(path: Path, text: str, **options: object) -> int:
        write_text(path, text[: len(text) // 2], **options)
        seen.append(json.loads(log.document.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", kill)
    with pytest.raises(KeyboardInterrupt):
        log.write({"new": 1})
    monkeypatch.undo()
    assert seen == [{"arguments": ARGUMENTS}]
    assert json.loads(log.document.read_text()) == {"arguments": ARGUMENTS}
    log.write({"new": 2})
    assert json.loads(log.document.read_text()) == {"new": 2}
    assert sorted(contents(log)) == ["sweep.json", "sweep.jsonl"]
