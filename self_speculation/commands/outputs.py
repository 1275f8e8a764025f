"""Where a program's output goes: its results to a folder or nowhere, and what it says beside them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from self_speculation.commands.flags import OutputArguments
from self_speculation.ending import Terminated

# What an interrupted check of correctness has found, beside the results of an earlier whole one.
UNFINISHED = "correctness.unfinished.json"


@contextmanager
def results_folder(output: OutputArguments) -> Iterator[Path]:
    """The folder for results; with --no_log one that is gone afterwards. With --quiet, nothing is said beside them.

    Progress bars, notes and warnings go to standard error, and an exception that leaves this is told after it.
    """
    with _silence(output.quiet):
        if output.log:
            yield Path(output.output_dir)
            return
        with TemporaryDirectory(prefix="layerskip-") as folder:
            try:
                yield Path(folder)
            except (KeyboardInterrupt, Terminated) as error:
                error.add_note("With --no_log nothing is kept.")
                raise


@contextmanager
def notes(output: OutputArguments) -> Iterator[None]:
    """What is printed in here are notes: with --quiet they are not."""
    if not output.quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _silence(is_quiet: bool) -> Iterator[None]:
    if not is_quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


def ends_with_totals(output: OutputArguments) -> bool:
    """Whether standard output ends with the totals as a line of JSON: for a program, or because it was asked for."""
    return output.json or not sys.stdout.isatty()
