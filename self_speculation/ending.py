"""How a program ends: with its result, or with one sentence and an exit code; with no traceback that a user can cause.

2    a mistake in flags or files, a full disk, too little memory
130  Ctrl-C
143  SIGTERM

A reader that closes its end of a pipe ends nothing: results are written, and the exit code is that of the verdict.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, NoReturn, TextIO

from self_speculation.terminal import shown_on

MISTAKE = 2
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
# What safetensors and torch say of a full disk; neither raises an OSError.
FULL_DISK = ("No space left on device", "PytorchStreamWriter failed writing file", "unexpected pos")
# What torch says where memory is short: on a GPU, and on the CPU, where it has no error of its own for it.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Terminated(BaseException):
    """SIGTERM: the program is asked to end, by a scheduler or by `torchrun`."""


def fail(message: str) -> NoReturn:
    """Say in one sentence what is wrong with the input, and exit with code 2."""
    line = " ".join(message.splitlines())
    print(shown_on(sys.stderr, f"error: {line}"), file=sys.stderr)
    raise SystemExit(MISTAKE)


@contextmanager
def one_sentence_errors(go_on: str = "", lower: str = "--batch_size or --max_steps") -> Iterator[None]:
    """End the program as this module promises.

    `go_on` says what is kept of a run that is stopped, and how it goes on; `lower` which flags need less memory.
    """
    with _lasting_streams(), _terminable():
        try:
            try:
                yield
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt as error:
            _stop("interrupted", _kept(error, go_on), INTERRUPTED)
        except Terminated as error:
            _stop("terminated", _kept(error, go_on), TERMINATED)
        # Those that are no user's doing are raised again.
        except Exception as error:
            sentence = _sentence(error, go_on, lower)
            if sentence is None:
                raise
            fail(sentence)


@contextmanager
def importing() -> Iterator[None]:
    """While packages are imported, which takes seconds, a signal ends the program at once.

    Nothing has been done yet that could be kept. And an exception from a signal may be swallowed by the module that it
    interrupts, whose half of an import then fails in ways of its own.
    """
    endings = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", TERMINATED)}

    def end(number: int, frame: FrameType | None) -> None:
        how, code = endings[signal.Signals(number)]
        if _is_first():
            os.write(2, f"{how}.\n".encode())
        os._exit(code)

    with one_sentence_errors():
        before = {number: signal.signal(number, end) for number in endings}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _kept(error: BaseException, go_on: str) -> str:
    """What is kept of the run; a note that the error has on its way knows better."""
    return " ".join(getattr(error, "__notes__", [go_on]))


def _stop(how: str, go_on: str, code: int) -> NoReturn:
    """The end of a run that was stopped; of several processes the first one speaks."""
    if _is_first():
        print(f"{how}. {go_on}".rstrip(), file=sys.stderr)
    raise SystemExit(code)


def _sentence(error: Exception, go_on: str, lower: str) -> str | None:
    """What a user can do about the error; None where it is not a user's."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or any(said in text for said in FULL_DISK):
        where = getattr(error, "filename", None) or "--output_dir"
        return f"{where}: no space is left on the device. {go_on}".rstrip()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(said in text for said in NO_MEMORY)):
        return f"there is not enough memory: a lower {lower}, or a smaller --model, needs less."
    if isinstance(error, OSError):
        return f"{_as_name(error.filename)}: {error.strerror}." if error.filename else text
    return text if isinstance(error, ValueError) else None


def _as_name(file: object) -> str:
    """A file's name, in quotation marks where it would not be seen as one."""
    name = str(file)
    return name if name.isprintable() and name == name.strip() else repr(name)


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _terminable() -> Iterator[None]:
    """While this lasts, SIGTERM is raised as `Terminated`, on the first process; the others end at once."""
    is_ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not (is_ours and _is_first()):
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        # A forked process, which has inherited this, has nothing to say.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _LastingStream:
    """Standard output or error, for as long as the program runs: what nobody reads any more is dropped."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream = stream
        self.name = name

    def write(self, text: str) -> int:
        """Write; returns how many characters."""
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered."""
        with self._lasting():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The stream keeps what it could not write, and would fail at the program's end once more.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, self.name) from error


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """Standard output and error that outlive their readers, and that no character is too much for."""
    with _tolerant(sys.stdout) as output, _tolerant(sys.stderr) as errors:
        lasting: list[Any] = [_LastingStream(output, "standard output"), _LastingStream(errors, "standard error")]
        with redirect_stdout(lasting[0]), redirect_stderr(lasting[1]):
            yield


@contextmanager
def _tolerant(stream: TextIO | None) -> Iterator[TextIO]:
    """The stream, which writes what its encoding lacks as an escape sequence; a file for one that is closed."""
    if stream is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield nowhere
    elif isinstance(stream, io.TextIOWrapper):
        strictness = stream.errors
        stream.reconfigure(errors="backslashreplace")
        try:
            yield stream
        finally:
            stream.reconfigure(errors=strictness)
    else:
        yield stream
