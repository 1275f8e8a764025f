"""Ctrl-C and SIGTERM while a model trains: the running step is finished, and saved, before they count."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OutlivingWorkers:
    """What a process that loads data does first, with signals let wait in it too: it is needed until the step ends.

    A terminal's Ctrl-C, and many a scheduler, signal all processes at once. The first SIGTERM is passed over; a second
    one counts, which is how the processes are ended that nobody waits for.
    """

    def __init__(self, first: Callable[[int], None] | None) -> None:
        self.first = first

    def __call__(self, worker: int) -> None:
        """Called in the process that has begun to load data."""
        if self.first is not None:
            self.first(worker)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


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
            # Blocked still, if the data of an epoch could not be loaded.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            self._restore()
        self._deliver()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer before processes begin to load data: SIGTERM waits until they know what to do."""
        if self.handlers and args.dataloader_num_workers:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer when there is a batch."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

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

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _deliver(self) -> None:
        number, self.waiting_signal = self.waiting_signal, None
        if number is not None:
            signal.raise_signal(number)
