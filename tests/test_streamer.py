"""What streamers show: the screen of an emulated terminal, plain output, and the picture."""

import io
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TextStreamer

from self_speculation.decoding.cell import FREE, Cell
from self_speculation.decoding.stopping import StopReason, StopRule
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator, RowStep
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.speculative_streamer import (
    STYLES,
    PlainTextStreamer,
    Producer,
    SpeculativeTextStreamer,
    colored_pieces,
    export_svg,
)

DRAFT, ACCEPTED, RECOVERED, BONUS = "2;33", "32", "1;35", "36"
END = 0
TEXTS = {
    "code": "def add(a, b):\n    if a:\n        return a + b\n\n\nprint(add(1, 2))\n",
    "one long line": "0123456789abcdefghij" * 9,
    "full rows": "abcd\nabcde\nabcdefgh\n" + "x" * 20 + "\n" + "y" * 80 + "\nend",
    "wide": "漢字かな交じり文、abc漢\n한국어 텍스트 a漢b字c\n" * 2,
    "emoji": "ok 🙂🙂🙂 a🙂b🚀\n🙂🚀🙂🚀🙂x🙂\n",
    "tabs": "\tx\tyy\n漢\t|\n\t\tdeep\n",
    "accents": "Zoë naïve Ångström — “quoted” … ½\n" * 2,
    "joined": "a❤️b 👩‍💻 🇫🇷 e\u0301\nthen plain text\nhere, and more\n",
}


class Terminal(io.TextIOBase):
    """As much of a terminal as text needs; `rows` are all lines so far, the last `height` of them are the screen."""

    def __init__(self, width: int, height: int = 24) -> None:
        self.width, self.height = width, height
        self.rows: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self.style = ""
        self.frames: list[list[str]] = []

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.frames.append(self.lines())

    def write(self, text: str) -> int:
        for sequence in re.findall(r"\x1b\[[\d;]*[A-Za-z]|[\s\S]", text):
            if sequence == "\n":
                self._line_feed()
            elif sequence.startswith("\x1b["):
                self._control(sequence[-1], sequence[2:-1])
            else:
                self._put(sequence)
        return len(text)

    def lines(self, style: str | None = None) -> list[str]:
        """All lines up to the last that has text; with a style, only the characters that have it."""
        lines = ["".join(char for char, own in row if style in (None, own)).rstrip() for row in self.rows]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def _put(self, char: str) -> None:
        assert unicodedata.category(char) != "Cc", f"control character {char!r}"
        cells = cells_of(char)
        if not cells:
            return
        if self.column + cells > self.width:
            self._line_feed()
        row = self.rows[self.row]
        row += [(" ", "")] * (self.column - len(row))
        row[self.column : self.column + cells] = [(char, self.style), ("", self.style)][:cells]
        self.column += cells

    def _line_feed(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])

    def _control(self, name: str, parameters: str) -> None:
        number = int(parameters) if parameters.isdigit() and parameters != "0" else 1
        if name == "A":
            self.row = max(self.row - number, len(self.rows) - self.height, 0)
        elif name == "G":
            self.column = min(number, self.width) - 1
        elif name == "K" and parameters in ("", "2"):
            del self.rows[self.row][0 if parameters else self.column :]
        elif name == "m":
            self.style = "" if parameters == "0" else parameters
        else:
            raise AssertionError(f"unknown control sequence {name} {parameters}")


def cells_of(char: str) -> int:
    if unicodedata.combining(char) or char in "\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def wrapped(text: str, width: int) -> list[str]:
    """The rows that `text` takes on a terminal, from the definition; blank ones at the end left out."""
    rows = []
    for line in text.split("\n"):
        row, used, column = "", 0, 0
        for char in line:
            shown = " " * (8 - column % 8) if char == "\t" else char
            for part in shown:
                cells = cells_of(part)
                column += cells
                if used + cells > width:
                    rows.append(row)
                    row, used = "", 0
                row, used = row + part * bool(cells), used + cells
        rows.append(row)
    rows = [row.rstrip() for row in rows]
    while rows and not rows[-1]:
        rows.pop()
    return rows


class Vocabulary:
    """Tokens that are any bytes, numbered as they come; `END` is the end token."""

    def __init__(self, stop_words: tuple[str, ...] = ()) -> None:
        self.pieces = [b""]
        self.stop_rule = StopRule(frozenset({END}), frozenset(), stop_words, self.decode)

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", errors="replace")

    def encode(self, *pieces: str | bytes) -> list[int]:
        start = len(self.pieces)
        self.pieces += [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        return list(range(start, len(self.pieces)))

    def chop(self, text: str, rng: random.Random) -> list[int]:
        """`text` as tokens of one to six bytes, which do not end where characters do."""
        data, cuts = text.encode(), [0]
        while cuts[-1] < len(data):
            cuts.append(cuts[-1] + rng.randint(1, 6))
        return self.encode(*(data[start:end] for start, end in pairwise(cuts)))


def random_steps(vocabulary: Vocabulary, text: str, rng: random.Random) -> Iterator[RowStep]:
    """Steps that write `text`, with drafts that go astray in other texts or are longer than a screen."""
    tokens = [*vocabulary.chop(text, rng), END]
    while tokens:
        count = min(rng.randint(1, 6), len(tokens))
        new, tokens = tokens[:count], tokens[count:]
        rejected = rng.random() < 0.7
        wrong = vocabulary.chop(rng.choice([*TEXTS.values()]) * rng.choice([1, 1, 9]), rng) if rejected else []
        wrong = wrong if rng.random() < 0.2 else wrong[: rng.randint(0, 20)]
        drafted = new[:-1] + wrong
        yield RowStep(drafted, count - 1, new, None if tokens else StopReason.END_OF_SEQUENCE)


def on(terminal: Terminal) -> Console:
    return Console(file=terminal, width=terminal.width, height=terminal.height, no_color=False, force_interactive=True)


def play(streamer: PlainTextStreamer, stop_rule: StopRule, *steps: RowStep) -> None:
    streamer.begin([1], stop_rule)
    for step in steps:
        streamer.update(step)
    streamer.end()


def as_result(steps: list[RowStep], stop_rule: StopRule) -> GenerationResult:
    tokens = [token for step in steps for token in step.tokens]
    return GenerationResult(stop_rule.text(tokens, finished=True), tokens, steps[-1].stop_reason, steps=steps)


def test_emulator_waits_at_the_right_edge() -> None:
    terminal = Terminal(3, height=2)
    terminal.write("abc")
    assert (terminal.row, terminal.column) == (0, 3)
    terminal.write("\ndef")
    assert terminal.lines() == ["abc", "def"]
    terminal.write("gh漢\x1b[2K\x1b[9A\x1b[2GX\x1b[K")
    assert terminal.lines() == ["abc", "def", "gX"]
    assert wrapped("abc\ndefgh漢", 3) == ["abc", "def", "gh", "漢"]


@pytest.mark.parametrize("width", [5, 8, 20, 80])
@pytest.mark.parametrize("height", [2, 24])
@pytest.mark.parametrize("name", TEXTS)
def test_screen_shows_exactly_the_committed_text_after_every_step(name: str, width: int, height: int) -> None:
    for seed in range(2):
        rng = random.Random(f"{name} {width} {height} {seed}")
        vocabulary, terminal, tokens = Vocabulary(), Terminal(width, height), []
        streamer = SpeculativeTextStreamer(on(terminal))
        streamer.begin([1], vocabulary.stop_rule)
        for step in random_steps(vocabulary, TEXTS[name], rng):
            streamer.update(step)
            tokens += step.tokens
            text = vocabulary.stop_rule.text(tokens, finished=step.stop_reason is not None)
            assert terminal.lines() == wrapped(text, width)
            assert not any(terminal.lines(DRAFT))
        streamer.end()
        assert terminal.lines() == wrapped(TEXTS[name], width)


def test_draft_is_shown_and_replaced_in_colours() -> None:
    vocabulary, terminal = Vocabulary(), Terminal(20)
    good, wrong, right, more, last = vocabulary.encode("def", " sub", " add", "(a)", ":")
    streamer = SpeculativeTextStreamer(on(terminal))
    streamer.begin([1], vocabulary.stop_rule)
    streamer.update(RowStep([good, wrong], 1, [good, right]))
    assert terminal.frames == [["def sub"], ["def add"]]
    assert (terminal.lines(ACCEPTED), terminal.lines(RECOVERED)) == (["def"], [" add"])
    streamer.update(RowStep([more], 1, [more, last]))
    assert terminal.lines() == ["def add(a):"]
    assert [terminal.lines(style) for style in (ACCEPTED, RECOVERED, BONUS)] == [["def(a)"], [" add"], [":"]]


def test_draft_has_its_own_colour_while_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, terminal, seen = Vocabulary(), Terminal(4), []
    monkeypatch.setattr("time.sleep", lambda seconds: seen.append((seconds, terminal.lines(DRAFT))))
    ab, wrong, right = vocabulary.encode("ab", "漢x\n\n漢字", "c")
    step = RowStep([wrong], 0, [right], StopReason.MAX_STEPS)
    play(SpeculativeTextStreamer(on(terminal), pause_seconds=0.5), vocabulary.stop_rule, RowStep([], 0, [ab]), step)
    assert seen == [(0.5, ["漢", "x", "", "漢字"])]
    assert terminal.lines() == ["abc"]


@pytest.mark.parametrize("committed", ["abcde", "abc漢", "a漢字", "12345abcde"])
@pytest.mark.parametrize("continuation", ["\nnext", "f", "\n", "漢", "\n\nx", ""])
def test_line_that_ends_at_the_right_edge_goes_on_as_if_no_draft_had_been_there(
    committed: str, continuation: str
) -> None:
    vocabulary, terminal = Vocabulary(), Terminal(5)
    first, wrong, right = vocabulary.encode(committed, "wrong\nwrong", continuation)
    steps = RowStep([], 0, [first]), RowStep([wrong], 0, [right], StopReason.MAX_STEPS)
    play(SpeculativeTextStreamer(on(terminal)), vocabulary.stop_rule, *steps)
    assert terminal.lines() == wrapped(committed + continuation, 5)


def test_draft_longer_than_the_screen_is_cut_to_the_screen() -> None:
    vocabulary, terminal = Vocabulary(), Terminal(5, height=4)
    first, wrong, right = vocabulary.encode("one\ntwo\nabc", "0123456789" * 10, "!")
    steps = RowStep([], 0, [first]), RowStep([wrong], 0, [right], StopReason.MAX_STEPS)
    play(SpeculativeTextStreamer(on(terminal)), vocabulary.stop_rule, *steps)
    assert ["one", "two", "abc01", "23456", "78901", "23456"] in terminal.frames
    assert terminal.lines() == ["one", "two", "abc!"]


@pytest.mark.parametrize(
    ("disputed", "drawn"), [("❤\ufe0f", "x❤"), ("🇫🇷", "x"), ("e\u0301", "xe"), ("👩\u200d💻", "x👩")]
)
def test_no_draft_is_drawn_beside_characters_of_disputed_width(disputed: str, drawn: str) -> None:
    vocabulary, terminal = Vocabulary(), Terminal(10)
    odd, wrong, newline = vocabulary.encode(disputed, "x", "\n")
    steps = RowStep([], 0, [odd]), RowStep([wrong], 0, [newline]), RowStep([wrong, odd, wrong], 0, [newline])
    play(SpeculativeTextStreamer(on(terminal)), vocabulary.stop_rule, *steps)
    assert [frame[1:] for frame in terminal.frames if len(frame) > 1] == [[drawn]]
    assert not any("x" in frame[0] for frame in terminal.frames)


def test_character_split_across_tokens_appears_when_complete_and_in_the_completing_colour() -> None:
    vocabulary, terminal = Vocabulary(), Terminal(20)
    first, second, third = vocabulary.encode(b"a\xe6", b"\xbc", b"\xa2b")
    streamer = SpeculativeTextStreamer(on(terminal))
    streamer.begin([1], vocabulary.stop_rule)
    streamer.update(RowStep([first, second], 2, [first, second]))
    assert terminal.frames == [["a"], ["a"]]
    streamer.update(RowStep([], 0, [third]))
    assert terminal.lines() == ["a漢b"]
    assert terminal.lines(BONUS) == ["漢b"]


def test_stop_string_and_what_follows_it_are_never_shown() -> None:
    vocabulary, terminal = Vocabulary(stop_words=("\nEND",)), Terminal(20)
    tokens = vocabulary.encode("one", "\nE", "x", "\n", "EN", "D two")
    cut, steps = tokens[:5], [RowStep(tokens[:2], 2, tokens[:3])]
    steps.append(RowStep(tokens[3:], 3, tokens[3:], StopReason.STOP_WORD))
    assert vocabulary.stop_rule.cut(cut, tokens[5:]) == (tokens[5:], StopReason.STOP_WORD)
    play(SpeculativeTextStreamer(on(terminal)), vocabulary.stop_rule, *steps)
    assert set(map(tuple, terminal.frames)) == {("one",), ("one", "Ex")}


def test_end_token_in_a_rejected_draft_hides_what_was_drafted_after_it() -> None:
    vocabulary, terminal = Vocabulary(), Terminal(20)
    before, after, right = vocabulary.encode("before", "after", "right")
    play(SpeculativeTextStreamer(on(terminal)), vocabulary.stop_rule, RowStep([before, END, after], 0, [right]))
    assert terminal.frames == [["before"], ["right"], ["right"]]


def test_control_characters_reach_no_terminal() -> None:
    vocabulary = Vocabulary()
    [token] = vocabulary.encode("a\x1b[2Jb\rc\x07\x9b5A")
    step = RowStep([token], 1, [token], StopReason.MAX_STEPS)
    for kind, num_frames in ((SpeculativeTextStreamer, 3), (PlainTextStreamer, 2)):
        terminal = Terminal(40)
        play(kind(on(terminal)), vocabulary.stop_rule, step)
        assert terminal.frames == [["a\ufffd[2Jb\ufffdc\ufffd\ufffd5A"]] * num_frames


def test_tabs_of_drafts_stand_where_those_of_the_text_will() -> None:
    vocabulary, terminal = Vocabulary(), Terminal(40)
    first, second = vocabulary.encode("漢a", "b\tc\n\td")
    steps = RowStep([], 0, [first]), RowStep([second], 1, [second])
    play(SpeculativeTextStreamer(on(terminal)), vocabulary.stop_rule, *steps)
    assert terminal.frames == [["漢a"], *[["漢ab    c", "        d"]] * 3]


def test_interruption_leaves_no_draft_and_the_next_answer_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    vocabulary, terminal = Vocabulary(), Terminal(5)
    first, wrong, right = vocabulary.encode("abc", "wrong", "right")
    streamer = SpeculativeTextStreamer(on(terminal))
    streamer.begin([1], vocabulary.stop_rule)
    streamer.update(RowStep([], 0, [first]))
    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        streamer.update(RowStep([wrong], 0, [right]))
    assert terminal.lines() == ["abcwr", "ong"]
    streamer.end()
    monkeypatch.undo()
    play(streamer, vocabulary.stop_rule, RowStep([wrong], 0, [right], StopReason.MAX_STEPS))
    assert terminal.lines() == ["abc", "right"]


@pytest.mark.parametrize("kind", [PlainTextStreamer, SpeculativeTextStreamer])
@pytest.mark.parametrize("name", TEXTS)
def test_output_that_is_no_terminal_is_the_text_and_only_grows(name: str, kind: type[PlainTextStreamer]) -> None:
    vocabulary, file, tokens = Vocabulary(), io.StringIO(), []
    streamer = kind(Console(file=file, force_terminal=True))
    streamer.begin([1], vocabulary.stop_rule)
    for step in random_steps(vocabulary, TEXTS[name], random.Random(0)):
        streamer.update(step)
        tokens += step.tokens
        assert file.getvalue() == vocabulary.stop_rule.text(tokens, finished=step.stop_reason is not None)
    streamer.end()
    assert file.getvalue() == TEXTS[name] + "\n"


def test_no_color_is_respected() -> None:
    vocabulary, terminal = Vocabulary(), Terminal(20)
    console = on(terminal)
    console.no_color = True
    [token] = vocabulary.encode("text")
    play(SpeculativeTextStreamer(console), vocabulary.stop_rule, RowStep([token], 1, [token]))
    assert terminal.lines("") == ["text"]


def test_pieces_name_the_producer_of_every_token() -> None:
    vocabulary = Vocabulary(stop_words=("##",))
    a, b, c, hash_, d, wrong = vocabulary.encode("a", b"b\xc3", b"\xabc", "#", "d", "wrong")
    steps = [
        RowStep([a, wrong], 1, [a, b]),
        RowStep([c, hash_], 2, [c, hash_, d]),
        RowStep([a, hash_], 2, [a, hash_]),
        RowStep([hash_, d], 1, [hash_], StopReason.STOP_WORD),
    ]
    assert colored_pieces(steps, vocabulary.stop_rule) == [
        ("a", Producer.ACCEPTED),
        ("b", Producer.RECOVERED),
        ("ëc", Producer.ACCEPTED),
        ("#", Producer.ACCEPTED),
        ("d", Producer.BONUS),
        ("a", Producer.ACCEPTED),
    ]


def test_drafts_that_were_looked_up_have_a_colour_of_their_own(tmp_path: Path) -> None:
    vocabulary = Vocabulary()
    exit_token, more, looked_up, wrong, right = vocabulary.encode("exit", "more", "looked", "wrong", "right")
    steps = [
        RowStep([exit_token], 1, [exit_token, more], cell=Cell(2, 1)),
        RowStep([looked_up, wrong], 1, [looked_up, right], StopReason.MAX_STEPS, Cell(FREE, 2)),
    ]
    assert colored_pieces(steps, vocabulary.stop_rule) == [
        ("exit", Producer.ACCEPTED),
        ("more", Producer.BONUS),
        ("looked", Producer.LOOKED_UP),
        ("right", Producer.RECOVERED),
    ]
    assert len(set(STYLES.values())) == len(Producer)
    export_svg("", as_result(steps, vocabulary.stop_rule), vocabulary.stop_rule, tmp_path / "answer.svg", "")
    rows, classes = picture_rows(tmp_path / "answer.svg")
    assert rows[-1].startswith("accepted draft · looked up · recovered · bonus")
    assert classes["looked"] == classes["looked up"] != classes["exit"] == classes["accepted draft"]


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_join_to_the_text(name: str) -> None:
    vocabulary = Vocabulary(stop_words=("then",))
    steps = list(random_steps(vocabulary, TEXTS[name], random.Random(1)))
    text = as_result(steps, vocabulary.stop_rule).text
    assert "".join(piece for piece, _ in colored_pieces(steps, vocabulary.stop_rule)) == text


def test_bytes_that_are_invalid_for_a_while_repeat_nothing() -> None:
    def decode(tokens: list[int]) -> str:
        """As tokenizers with byte fallback do: an incomplete character spoils those before it."""
        data = b"".join(vocabulary.pieces[token] for token in tokens)
        text = data.decode("utf-8", errors="replace")
        return "\ufffd" * len(data) if "\ufffd" in text else text

    vocabulary, file = Vocabulary(), io.StringIO()
    rule = StopRule(frozenset({END}), frozenset(), (), decode)
    tokens = vocabulary.encode("漢", b"\xe6", b"\xbc\xa2")
    steps = [RowStep([], 0, [token]) for token in tokens]
    assert colored_pieces(steps, rule) == [("漢", Producer.BONUS)] * 2
    play(PlainTextStreamer(Console(file=file)), rule, *steps)
    assert file.getvalue() == "漢漢\n"


@pytest.fixture
def generate(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., GenerationResult]:
    """A function that answers with the tiny model, without end token, and shows the answer with a streamer."""
    model = make_model(eos_token_id=None)
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    config = GenerationConfig(max_new_tokens=60, exit_layer=5, num_speculations=4, sample=False)
    return lambda streamer: generator.generate(["def add(a, b):\n"], config, streamer)[0]


def test_streamer_of_transformers_prints_the_text(
    generate: Callable[..., GenerationResult],
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = generate(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert result.text
    assert capsys.readouterr().out == result.text + "\n"


def test_plain_and_speculative_streamers_print_a_models_answer(
    generate: Callable[..., GenerationResult], capsys: pytest.CaptureFixture[str]
) -> None:
    result = generate(PlainTextStreamer())
    assert capsys.readouterr().out == result.text + "\n"
    terminal = Terminal(20)
    assert generate(SpeculativeTextStreamer(on(terminal))).tokens == result.tokens
    assert terminal.lines() == wrapped(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", result.text), 20)


def picture_rows(path: Path) -> tuple[list[str], dict[str, str]]:
    """The text lines of a rich SVG, put together by position, and the class of each piece of text."""
    rows: dict[float, list[str]] = {}
    classes: dict[str, str] = {}
    for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text"):
        text = (element.text or "").replace("\xa0", " ")
        classes[text] = element.get("class", "").rpartition("-")[2]
        if not classes[text].startswith("r"):
            continue
        is_squeezed = 1 < len(text) < sum(map(cells_of, text)) and "\u200d" not in text
        assert not is_squeezed, text
        cells = rows.setdefault(float(element.get("y", "")), [])
        cells += [" "] * (round(float(element.get("x", "")) / 12.2) - len(cells))
        cells += [part for char in text for part in (char, "")[: cells_of(char)]]
    first, height = 20, 24.4
    indices = {round((y - first) / height): "".join(cells).rstrip() for y, cells in rows.items()}
    return [indices.get(index, "") for index in range(max(indices) + 1)], classes


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "joined"])
def test_picture_has_the_text_as_it_is(name: str, tmp_path: Path) -> None:
    vocabulary, prompt = Vocabulary(), "# <prompt> & [bold]no markup[/bold] :smile:\nx = "
    steps = list(random_steps(vocabulary, TEXTS[name], random.Random(2)))
    result = as_result(steps, vocabulary.stop_rule)
    export_svg(prompt, result, vocabulary.stop_rule, tmp_path / "answer.svg", "a <title>")
    rows, _ = picture_rows(tmp_path / "answer.svg")
    expected = wrapped(prompt + TEXTS[name], 100)
    assert rows[: len(expected)] == expected
    assert rows[-1].startswith("accepted draft · recovered · bonus · acceptance rate ")
    assert f"{result.acceptance_rate:.1%}" in rows[-1]
    assert not any(rows[len(expected) : -1])


def test_picture_gives_producers_their_colours_and_takes_any_character(tmp_path: Path) -> None:
    vocabulary = Vocabulary()
    good, wrong, right, more, odd = vocabulary.encode("good", "wrong", "right", "more", "\x1b\uffff👩‍💻")
    steps = [RowStep([good, wrong], 1, [good, right]), RowStep([odd], 1, [odd, more], StopReason.MAX_STEPS)]
    result = as_result(steps, vocabulary.stop_rule)
    export_svg("prompt ", result, vocabulary.stop_rule, tmp_path / "answer.svg", "title\x00")
    rows, classes = picture_rows(tmp_path / "answer.svg")
    assert rows[0].startswith("prompt goodright\ufffd\ufffd👩")
    own = [classes[text] for text in ("prompt ", "good", "right", "more")]
    assert len(set(own)) == 4
    assert own[1:] == [classes[text] for text in ("accepted draft", "recovered", "bonus")]


def test_picture_of_an_answer_without_drafts(tmp_path: Path) -> None:
    vocabulary = Vocabulary()
    result = as_result([RowStep([], 0, vocabulary.encode("answer"))], vocabulary.stop_rule)
    export_svg("", result, vocabulary.stop_rule, tmp_path / "answer.svg", "")
    assert picture_rows(tmp_path / "answer.svg")[0] == [
        "answer",
        "",
        "accepted draft · recovered · bonus · no drafts · 1.00 tokens per step",
    ]
