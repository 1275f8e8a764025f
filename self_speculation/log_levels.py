"""How severe a log message must be to be shown."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logging_at(least: int, name: str) -> Iterator[None]:
    """The logger `name` says what is at least this severe."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)
