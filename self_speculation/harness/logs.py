"""What of lm-eval's log is worth showing."""

import logging


def is_news(record: logging.LogRecord) -> bool:
    """Whether a log message is more than advice on `--metadata`, which every task over local files brings on."""
    return "--metadata" not in str(record.msg)
