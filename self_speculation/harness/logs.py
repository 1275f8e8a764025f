"""What of lm-eval's log is worth showing."""

import logging
import sys

from self_speculation.terminal import shown_on


def is_news(record: logging.LogRecord) -> bool:
    """Whether a log message is more than advice on `--metadata`, which every task over local files brings on."""
    return "--metadata" not in str(record.msg)


def without_commands(record: logging.LogRecord) -> bool:
    """Pass a message on, harmless on a terminal: with `--write_out` it quotes a task's rows."""
    record.msg, record.args = shown_on(sys.stderr, record.getMessage()), ()
    return True
