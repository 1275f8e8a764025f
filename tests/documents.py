"""The documents as tests read them: their blocks, the commands in those, and their prose."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CARD = ROOT / "checkpoints" / "layerskip-python-6M" / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), CARD)
# An indented block, such as one in a list, is none of ours.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r"^<!-- source: .*? -->\n+```python\n.*?^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r'^(\w+)="(.*)"$', re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A line that runs one of the programs (`generate`), or another script (`benchmarks/ablation`)."""

    page: Path
    program: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.program} {' '.join(self.flags)}"


def blocks(text: str, language: str) -> list[str]:
    """The contents of a page's fenced blocks in one language."""
    return [content for name, content in BLOCK.findall(text) if name == language]


def own_python(text: str) -> list[str]:
    """The blocks of Python that a page does not take from the source."""
    return blocks(INCLUDED.sub("", text), "python")


def commands(*programs: str) -> list[Command]:
    """Every command of all pages that runs one of these programs; without any, every command that runs a script."""
    return [command for page in PAGES for command in _commands(page) if not programs or command.program in programs]


def prose(text: str) -> list[str]:
    """A page's paragraphs and list items as they are read: no blocks, tables, headings, pictures or addresses."""
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("\n\n", text), flags=re.DOTALL)
    text = re.sub(r"^(#|\||!\[|---).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(- |\d+\. |> )", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def sentences(paragraphs: list[str]) -> list[str]:
    """Their sentences; a full stop inside code or a number ends none."""
    return [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`*(])", paragraph)]


def _commands(page: Path) -> Iterator[Command]:
    for block in blocks(page.read_text(encoding="utf-8"), "sh"):
        for name, value in ASSIGNMENT.findall(block):
            block = block.replace(f"${name}", name if value.startswith("$(") else value)
        for line in block.replace("\\\n", " ").splitlines():
            yield from _command(page, shlex.split(line, comments=True))


def _command(page: Path, words: list[str]) -> Iterator[Command]:
    for place, word in enumerate(words):
        if words[0] in ("python", "torchrun") and word.endswith(".py"):
            yield Command(page, word.removesuffix(".py"), tuple(words[place + 1 :]))
            return
    if words[:1] == ["layerskip"]:
        yield Command(page, words[1], tuple(words[2:]))
