"""Files of a finished piece of work that take their places together: a kill leaves the old ones or the new ones."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from self_speculation.exit_adapter import EXIT_ADAPTER_FILE

INCOMPLETE_FILES = "incomplete-files"
# Without them, the other files of a model cannot be loaded.
ENTRIES = {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, EXIT_ADAPTER_FILE}


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write files into; when the block ends, they are renamed into `folder`, and not if it fails.

    Raises:
        OSError: a file could not be written.
    """
    beside = folder / INCOMPLETE_FILES
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    _take_places(beside, folder)
    shutil.rmtree(beside)


def _take_places(beside: Path, folder: Path) -> None:
    """Rename the files that differ from what is there. A model cannot be loaded until its last file is in place."""
    paths = sorted(beside.iterdir(), key=lambda path: (path.name in ENTRIES, path.name))
    changed = [path for path in paths if not _is_there(path, folder)]
    if len(changed) > 1:
        changed = paths
        for entry in ENTRIES & {path.name for path in paths}:
            (folder / entry).unlink(missing_ok=True)
    for path in changed:
        os.replace(path, folder / path.name)


def _is_there(path: Path, folder: Path) -> bool:
    """Whether the folder has the same file already."""
    other = folder / path.name
    return other.is_file() and cmp(path, other, shallow=False)
