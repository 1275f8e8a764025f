"""What is typed in a chat: messages, and commands, which begin with a slash."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from self_speculation.chat import Chat
from self_speculation.commands.typed_lines import KEYS, line_reader
from self_speculation.writing import naming

HELP = f"/reset forgets what was said · /save FILE writes it to a new file, as JSON · /help says this. {KEYS}"


def typed_messages(chat: Chat, note: Callable[[str], None]) -> Iterator[str]:
    """Messages from the terminal, until Ctrl-D; commands are done in between, and noted."""
    for line in iter(line_reader(), None):
        if line.startswith("/"):
            note(_command(chat, line))
        elif line.strip():
            yield line


def _command(chat: Chat, line: str) -> str:
    """Do what a command asks; returns what is to be said of it."""
    name, _, argument = line.partition(" ")
    if name == "/help":
        return HELP
    if name == "/reset":
        chat.reset()
        return "What was said is forgotten."
    if name == "/save":
        return _save(chat, argument.strip())
    return f"error: {name} is no command. {HELP}"


def _save(chat: Chat, name: str) -> str:
    """Write the messages to a new file."""
    if not name:
        return "error: /save needs the name of a file."
    try:
        with naming(Path(name)), Path(name).open("x", encoding="utf-8") as file:
            file.write(json.dumps(chat.messages, ensure_ascii=False, indent=2) + "\n")
    except FileExistsError:
        return f"error: /save: {name} exists already, and is kept as it is."
    except (OSError, ValueError) as error:
        return f"error: /save: {name} cannot be written ({getattr(error, 'strerror', None) or error})."
    return f"{len(chat.messages)} messages are in {name}."
