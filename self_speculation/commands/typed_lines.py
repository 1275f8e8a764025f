"""What is typed at the terminal, up to Enter: lines can be edited, recalled and continued."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

KEYS = (
    "Enter sends. A line that ends in \\ goes on in the next. "
    "Ctrl-C clears what is typed and ends an answer; Ctrl-D leaves."
)
PROMPT, CONTINUED = "> ", "… "

# Gives what is typed next; None after Ctrl-D.
Reader = Callable[[], str | None]


def is_conversation() -> bool:
    """Whether somebody types the prompts."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_prompts() -> Iterator[str]:
    """Prompts from standard input: all of it if it is piped, else one after another until Ctrl-D."""
    if is_conversation():
        yield from filter(str.strip, iter(line_reader(), None))
        return
    try:
        yield sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text: --prompt_file takes a file.") from error


def line_reader() -> Reader:
    """Reads by prompt_toolkit where it is installed, in which Alt-Enter begins a line; else by Python's own `input`."""
    if sys.stdout.isatty() and find_spec("prompt_toolkit"):
        return _toolkit_reader()
    # From then on `input` edits lines, and remembers them; some systems have none.
    with suppress(ImportError):
        import readline  # noqa: F401
    return _read_plainly


def _read_plainly() -> str | None:
    """A line, with those that continue it; Ctrl-C begins again."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(input(CONTINUED if lines else PROMPT))
        except KeyboardInterrupt:
            print()
            lines.clear()
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not {error.encoding} text: --prompt_file takes a file.") from error
    return "\n".join(line.removesuffix("\\") for line in lines)


def _toolkit_reader() -> Reader:
    from prompt_toolkit import PromptSession

    # A pasted text keeps its lines.
    session: PromptSession[str] = PromptSession(
        PROMPT, multiline=True, prompt_continuation=CONTINUED, key_bindings=_key_bindings()
    )

    def read() -> str | None:
        try:
            return session.prompt()
        except EOFError:
            return None

    return read


def _key_bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def clear(event: "KeyPressEvent") -> None:
        event.current_buffer.reset()

    return bindings
