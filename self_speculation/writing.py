"""Writing files such that an error names the file: a full disk is noticed without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of what is done in here names the file, if it names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """The file's whole text, in UTF-8; what was there before stays until all of it is written."""
    unfinished = path.with_name(f"{path.name}.incomplete")
    with naming(path):
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
