"""Shows who produced which part of an answer: live on a terminal, with every draft before its verdict, or as a picture.

Drafts are erased by computing how many rows of the terminal they took. Where terminals disagree about the width of a
character (joined emoji, flags, combining marks) no draft is drawn: text that only grows needs no arithmetic.
"""

import io
import re
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from itertools import accumulate, pairwise, takewhile
from pathlib import Path

from rich.cells import cell_len, chop_cells, split_graphemes
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from self_speculation.decoding.cell import Source
from self_speculation.decoding.stopping import StopRule
from self_speculation.generator_base import GenerationResult, RowStep
from self_speculation.terminal import harmless
from self_speculation.writing import naming

TAB_CELLS = 8
PICTURE_CELLS = 100
# Regional indicators pair up to flags, soft hyphens may be invisible; other cases have no width of their own.
DISPUTED_WIDTH = re.compile("[\xad\U0001f1e6-\U0001f1ff]")


class Producer(StrEnum):
    """Who produced a token: a draft, or the full model after a rejected draft or after a fully accepted one.

    Drafts of exits and drafts that were looked up, and so cost nothing, are told apart.
    """

    ACCEPTED = "accepted"
    LOOKED_UP = "looked_up"
    RECOVERED = "recovered"
    BONUS = "bonus"


PROMPT_STYLE = Style()
DRAFT_STYLE = Style(color="yellow", dim=True)
STYLES = {
    Producer.ACCEPTED: Style(color="green"),
    Producer.LOOKED_UP: Style(color="bright_blue", underline=True),
    Producer.RECOVERED: Style(color="magenta", bold=True),
    Producer.BONUS: Style(color="cyan"),
}


NAMES = {
    Producer.ACCEPTED: "accepted draft",
    Producer.LOOKED_UP: "looked up",
    Producer.RECOVERED: "recovered",
    Producer.BONUS: "bonus",
}


def producers(step: RowStep) -> list[Producer]:
    """Who produced each token of a step."""
    is_looked_up = step.cell is not None and step.cell.source == Source.LOOKUP
    draft = Producer.LOOKED_UP if is_looked_up else Producer.ACCEPTED
    last = Producer.RECOVERED if step.is_rejected else Producer.BONUS
    return [draft if index < step.accepted else last for index in range(len(step.tokens))]


def colored_pieces(steps: list[RowStep], stop_rule: StopRule) -> list[tuple[str, Producer]]:
    """An answer's text, cut into what each token added to it, and who produced the token.

    A character of several tokens belongs to the one that completes it.
    """
    answer = _GrowingAnswer(stop_rule)
    for step in steps:
        answer.add(step)
    return answer.settled(finished=True)


class PlainTextStreamer:
    """Prints an answer's text as it settles and never takes anything back, so it suits files and pipes.

    On a terminal it can show the prompt in front.
    """

    def __init__(self, console: Console | None = None, shows_prompt: bool = False) -> None:
        self.console = console or Console()
        self.is_terminal = self.console.file.isatty()
        self.shows_prompt = shows_prompt and self.is_terminal

    def begin(self, prompt: list[int], stop_rule: StopRule) -> None:
        """An answer begins; on a terminal the cursor must be at the left edge."""
        self.answer = _GrowingAnswer(stop_rule)
        if self.shows_prompt:
            self._print(stop_rule.decode(prompt), PROMPT_STYLE)

    def update(self, step: RowStep) -> None:
        """Print what the step made certain."""
        self.answer.add(step)
        for text, producer in self.answer.settled(finished=step.stop_reason is not None):
            self._print(text, STYLES[producer])
        self.console.file.flush()

    def end(self) -> None:
        """Close the line."""
        self.console.file.write("\n")
        self.console.file.flush()

    def _print(self, text: str, style: Style) -> None:
        self.console.file.write(harmless(text) if self.is_terminal else text)


class SpeculativeTextStreamer(PlainTextStreamer):
    """Shows every draft and then, in its place, what was accepted and what the full model said instead or in addition.

    The draft stays for `pause_seconds`. Where nothing can be erased, this is a `PlainTextStreamer`.
    """

    def __init__(self, console: Console | None = None, shows_prompt: bool = False, pause_seconds: float = 0.0) -> None:
        super().__init__(console, shows_prompt)
        self.pause_seconds = pause_seconds
        can_erase = self.is_terminal and self.console.is_interactive and not self.console.legacy_windows
        self.line = _OpenLine(self.console) if can_erase else None

    def update(self, step: RowStep) -> None:
        """Show the draft, then replace it."""
        if self.line and step.drafted:
            self.line.draw(self.answer.preview(step.drafted))
            time.sleep(self.pause_seconds)
            self.line.erase()
        super().update(step)

    def end(self) -> None:
        """Close the line, without the draft that an interruption may have left."""
        if self.line:
            self.line.erase()
            self.line.text = ""
        super().end()

    def _print(self, text: str, style: Style) -> None:
        if self.line:
            self.line.write(text, style)
        else:
            super()._print(text, style)


def export_svg(prompt_text: str, result: GenerationResult, stop_rule: StopRule, path: Path, title: str) -> None:
    """Save a picture of the prompt, the answer coloured by who produced it, and a legend."""
    text = Text()
    _append(text, prompt_text, Style(color="default"))
    for piece, producer in colored_pieces(result.steps, stop_rule):
        _append(text, piece, STYLES[producer])
    lines = [*text.split("\n", allow_blank=True), Text(), _legend(result)]
    width = min(PICTURE_CELLS, max(line.cell_len for line in lines))
    console = Console(record=True, width=width, file=io.StringIO(), no_color=False, legacy_windows=False)
    for line in lines:
        for row in _rows_of(line, width):
            console.print(row)
    with naming(path):
        console.save_svg(str(path), title=harmless(title), theme=MONOKAI)


class _GrowingAnswer:
    """An answer's tokens while they come, and the text that each of them completes."""

    def __init__(self, stop_rule: StopRule) -> None:
        self.stop_rule = stop_rule
        # What may become a stop string is held back, but belongs to its own tokens all the same.
        self.without_stop_words = replace(stop_rule, stop_words=())
        self.tokens: list[int] = []
        self.producers: list[Producer] = []
        self.ends = [0]
        self.num_settled = 0

    def add(self, step: RowStep) -> None:
        """The tokens that a step committed."""
        for token, producer in zip(step.tokens, producers(step), strict=True):
            self.tokens.append(token)
            self.producers.append(producer)
            complete = self.without_stop_words.text(self.tokens, finished=False)
            # Bytes that turn out to be invalid can shorten the text of a byte-fallback tokenizer.
            self.ends.append(max(self.ends[-1], len(complete)))

    def settled(self, finished: bool) -> list[tuple[str, Producer]]:
        """What has become certain since the last call, a piece a token."""
        text = self.stop_rule.text(self.tokens, finished)
        bounds = [max(self.num_settled, end) for end in (*self.ends[:-1], len(text))]
        self.num_settled = max(self.num_settled, len(text))
        pieces = zip(pairwise(bounds), self.producers, strict=True)
        return [(text[start:end], producer) for (start, end), producer in pieces if text[start:end]]

    def preview(self, drafted: list[int]) -> str:
        """The text that a draft would add, up to its first stop."""
        draft, _ = self.stop_rule.cut(self.tokens, drafted)
        return self.stop_rule.text(self.tokens + draft, finished=False)[self.num_settled :]


class _OpenLine:
    """The unfinished line at a terminal's cursor: `text`, which stays, and after it a draft that will be erased."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.text = ""
        self.last_style = Style()
        self.draft = ""

    def write(self, text: str, style: Style) -> None:
        """Add text that stays."""
        text = _expanded(harmless(text), self.text)
        self.console.file.write(self._painted(text, style))
        self.text = (self.text + text).rpartition("\n")[2]
        self.last_style = style

    def draw(self, draft: str) -> None:
        """Show as much of a draft as can be erased again: its characters of known width that fit on the screen."""
        draft = _expanded(harmless(draft), self.text)
        known = "".join(takewhile(_has_known_width, draft)) if all(map(_has_known_width, self.text)) else ""
        prefixes = [known[:length] for length in range(len(known) + 1)]
        self.draft = prefixes[bisect_left(prefixes, self.console.height, key=self._rows_below) - 1]
        self.console.file.write(self._painted(self.draft, DRAFT_STYLE))
        self.console.file.flush()

    def erase(self) -> None:
        """Take the draft away, row by row: clearing all to the end of the screen, tmux may keep it in its history.

        The last character of the text is printed again: at the right edge a terminal's cursor waits *on* it until
        the next one comes, a state that no movement of the cursor can restore.
        """
        if not self.draft:
            return
        row = (chop_cells(self.text, self.console.width) or [""])[-1]
        rows_away = "\x1b[2K\x1b[A" * self._rows_below(self.draft)
        draft_away = f"\x1b[{cell_len(row[:-1]) + 1}G\x1b[K"
        self.console.file.write(rows_away + draft_away + self._painted(row[-1:], self.last_style))
        self.draft = ""

    def _rows_below(self, draft: str) -> int:
        """Rows from the one where the text ends to the one where the draft ends."""
        width = self.console.width
        return _num_rows(self.text + draft, width) - _num_rows(self.text, width)

    def _painted(self, text: str, style: Style) -> str:
        return style.render(text, color_system=None if self.console.no_color else ColorSystem.STANDARD)


def _expanded(text: str, line: str) -> str:
    """`text`, which follows `line`, with spaces for its tabs."""
    first, *others = text.split("\t")
    shown = line + first
    for part in others:
        column = cell_len(shown.rpartition("\n")[2])
        shown += " " * (TAB_CELLS - column % TAB_CELLS) + part
    return shown[len(line) :]


def _has_known_width(character: str) -> bool:
    """Whether all terminals give the character the same cells, whatever stands beside it."""
    return character == "\n" or (cell_len(character) > 0 and not DISPUTED_WIDTH.match(character))


def _num_rows(text: str, width: int) -> int:
    return sum(max(1, len(chop_cells(line, width))) for line in text.split("\n"))


def _append(text: Text, piece: str, style: Style) -> None:
    """Add a piece; rich's pictures give every character of a run one cell, so wide ones are runs of their own."""
    piece = _expanded(harmless(piece), text.plain)
    spans = [(0, len(piece), 0)] if piece.isascii() else split_graphemes(piece)[0]
    for start, end, _ in spans:
        text.append(piece[start:end], style)


def _rows_of(line: Text, width: int) -> Iterator[Text]:
    """A line cut where it is full; rich itself would cut between words and drop spaces."""
    rows = chop_cells(line.plain, width)
    yield from line.divide(accumulate(map(len, rows[:-1])))


def _legend(result: GenerationResult) -> Text:
    occurring = {producer for step in result.steps for producer in producers(step)}
    # What only some strategies have is named where it occurs.
    shown = [producer for producer in NAMES if producer != Producer.LOOKED_UP or producer in occurring]
    entries = Text(" · ").join(Text(NAMES[producer], STYLES[producer]) for producer in shown)
    rate = result.acceptance_rate
    acceptance = "no drafts" if rate is None else f"acceptance rate {rate:.1%}"
    return entries.append(f" · {acceptance} · {result.tokens_per_step:.2f} tokens per step")
