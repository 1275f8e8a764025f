"""A conversation at the terminal: prompts of several lines, and Ctrl-C that ends an answer and not the session."""

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from self_speculation.decoding.stopping import StopRule
from self_speculation.generator_base import GenerationResult, RowStep, StepStreamer

if sys.platform != "win32":
    import termios

INTERRUPT = b"\x03"


def read_prompts() -> Iterator[str]:
    """Prompts from standard input: all of it if it is piped, else one after another until an empty Ctrl-D."""
    try:
        if not is_conversation():
            yield sys.stdin.read().removesuffix("\n")
            return
        while (prompt := _read_prompt()) is not None:
            if prompt.strip():
                yield prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text: --prompt_file takes a file.") from error


def is_conversation() -> bool:
    """Whether somebody types the prompts."""
    return sys.stdin is not None and sys.stdin.isatty()


def _read_prompt() -> str | None:
    """Lines up to Ctrl-D; None if there were none, or after Ctrl-C."""
    print("Prompt, several lines if you like; Ctrl-D on a line of its own sends it, Ctrl-D alone leaves.")
    lines: list[str] = []
    try:
        while True:
            lines.append(input("… " if lines else "> "))
    except EOFError:
        print()
        return "\n".join(lines) if lines else None
    except KeyboardInterrupt:
        print()
        return None


class InterruptKey:
    """Ctrl-C as a key. Under `torchrun` its signal would reach the launcher, which then ends the session."""

    def __init__(self) -> None:
        self.is_needed = "TORCHELASTIC_RUN_ID" in os.environ and sys.stdin.isatty()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, Ctrl-C is a byte to read and not a signal."""
        if not self.is_needed:
            yield
            return
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        during = termios.tcgetattr(descriptor)
        during[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
        termios.tcsetattr(descriptor, termios.TCSANOW, during)
        try:
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if the key has been pressed."""
        descriptor = sys.stdin.fileno() if self.is_needed else None
        while descriptor is not None and select.select([descriptor], [], [], 0)[0]:
            if INTERRUPT in os.read(descriptor, 1024):
                raise KeyboardInterrupt


class KeepingStreamer:
    """Passes steps on to a streamer, if there is one, lets Ctrl-C through between them, and keeps the answer so far."""

    def __init__(self, streamer: StepStreamer | None, key: InterruptKey) -> None:
        self.streamer = streamer
        self.key = key
        self.result = GenerationResult()

    def begin(self, prompt: list[int], stop_rule: StopRule) -> None:
        """An answer begins."""
        self.stop_rule = stop_rule
        self.resumed_at = time.perf_counter()
        if self.streamer:
            self.streamer.begin(prompt, stop_rule)

    def update(self, step: RowStep) -> None:
        """One more step has been decided."""
        self.result.collect(step, time.perf_counter() - self.resumed_at)
        self.result.text = self.stop_rule.text(self.result.tokens, finished=True)
        if self.streamer:
            self.streamer.update(step)
        self.key.check()
        self.resumed_at = time.perf_counter()

    def end(self) -> None:
        """The answer is complete."""
        if self.streamer:
            self.streamer.end()
