"""Show what a run left behind: one page of HTML with its settings, figures, pictures and answers.

layerskip report --folder logs
layerskip report --folder runs/stories --output stories.html

It reads what generate, correctness, benchmark, sweep, eval and train write, and may be made while they run. The folder
may stand first, without its flag. The page needs no other file, no script and no network.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from self_speculation.commands.flags import parse
from self_speculation.ending import one_sentence_errors
from self_speculation.measuring.report_page import page
from self_speculation.measuring.report_sources import read_sections
from self_speculation.settings import Settings, setting
from self_speculation.terminal import say
from self_speculation.writing import write_text


@dataclass
class ReportArguments(Settings):
    """What to show, and where to write it."""

    folder: str = setting("./logs", help="Folder with results: the --output_dir of the programs.")
    output: str | None = setting(None, help="The page's file. Default: report.html in that folder.")
    answers: int = setting(20, help="Most answers, or samples, that are shown of a program.", at_least=0)


# The flags, in the order in which `main` takes them.
GROUPS = (ReportArguments,)


@one_sentence_errors()
def main() -> None:
    """Read a folder, write a page."""
    args = sys.argv[1:]
    if args and not args[0].startswith("-"):
        args = ["--folder", *args]
    [arguments] = parse(*GROUPS, description=__doc__, args=args)
    folder = Path(arguments.folder)
    path = folder / "report.html" if arguments.output is None else Path(arguments.output)
    sections = read_sections(folder, arguments.answers)
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no such folder.")
    write_text(path, page(f"layerskip: {folder}", sections))
    say(f"{path} shows {', '.join(section.program for section in sections)}.")


if __name__ == "__main__":
    main()
