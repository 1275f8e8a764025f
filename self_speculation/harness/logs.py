"""What of lm-eval's log is worth showing."""

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


def is_news(record: logging.LogRecord) -> bool:
    """Whether a log message is more than advice on `--metadata`, which every task over local files brings on."""
    return "--metadata" not in str(record.msg)
