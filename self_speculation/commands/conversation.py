"""What is typed in a chat: messages, a line each, and commands, which begin with a slash."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from self_speculation.chat import Chat
from self_speculation.writing import naming

HELP = (
    "/reset forgets what was said · /save FILE writes it to a new file, as JSON · /help says this. "
    "A line that ends in \\ goes on in the next. Ctrl-C ends an answer, Ctrl-D the chat."
)


def typed_messages(chat: Chat, note: Callable[[str], None]) -> Iterator[str]:
    """Messages from the terminal, until Ctrl-D or Ctrl-C; commands are done in between, and noted."""
    note(HELP)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            note(_command(chat, line))
        elif line.strip():
            yield line


def _read_line() -> str | None:
    """A line, with those that continue it; None after Ctrl-D or Ctrl-C."""
    lines: list[str] = []
    try:
        while not lines or lines[-1].endswith("\\"):
            lines.append(input("… " if lines else "> "))
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text: --prompt_file takes a file.") from error
    return "\n".join(line.removesuffix("\\") for line in lines)


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
