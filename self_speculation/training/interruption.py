"""Ctrl-C and SIGTERM while a model trains: the running step is finished, and saved, before they count."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveBeforeStopping(TrainerCallback):
    """Lets the first signal wait for the checkpoint of the running step; a second one counts at once.

    What the signals do then is what they did before. Of several processes each would stop at a step of its own, and
    wait for the others: there signals count at once, and the newest checkpoint is what is kept.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.waiting_signal: int | None = None
        self.handlers: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self, num_processes: int) -> Iterator[None]:
        """While this lasts, signals wait."""
        if num_processes > 1 or current_thread() is not main_thread():
            yield
            return
        self.handlers = {number: signal.signal(number, self._let_wait) for number in SIGNALS}
        try:
            yield
        finally:
            self._restore()
        self._deliver()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if self.waiting_signal is not None:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer when a checkpoint is complete."""
        self._deliver()

    def _let_wait(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.waiting_signal = number
            self._restore()
        elif number == signal.SIGTERM:
            # A process that loads data has inherited this; it ends with the others.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _deliver(self) -> None:
        number, self.waiting_signal = self.waiting_signal, None
        if number is not None:
            signal.raise_signal(number)
