"""Ends a run when it is told to stop.

Python calls a signal's handler between two of its own instructions, so not while XLA
compiles or a step is waited for, which at times takes minutes. A thread that reads the
numbers of arriving signals from a pipe (`signal.set_wakeup_fd`) answers at once
instead.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from beacon_jax.interrupts import Insistent, leave
from beacon_jax.training.processes import is_lead

GRACE = 3.0  # seconds for the main thread to leave by itself


class Signals:
    """Handles SIGINT and SIGTERM while a run is prepared, trains and exports.

    If something would be lost, the first signal lets the step in progress end, and
    `after` tells the loop to save. A second one, or a first one with nothing to lose,
    ends the process: SystemExit(128 + number), within seconds, whatever it does.

    With several processes SIGTERM belongs to jax's preemption service, which makes all
    of them stop at the same step; SIGINT is passed on to it.

    Args:
      saved: gives the step that the same command would go on from.
    """

    def __init__(self, saved: Callable[[], int]):
        self.received: signal.Signals | None = None
        self.failure: OSError | None = None
        self._saved = saved
        self._step: int | None = None
        self._ended = threading.Event()
        self._seen = self._handled = 0
        self._old: dict[int, Any] = {}
        self._insistent = Insistent()

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers in the main thread only
        self._lead = is_lead()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        numbers = [signal.SIGINT]
        if jax.process_count() == 1:
            numbers.append(signal.SIGTERM)
        for number in numbers:
            self._old[number] = signal.signal(number, self._arrived)
        self._insistent.install()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if not self._old:
            return
        self._insistent.remove()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()
        self._old = {}

    def running(self, step: int) -> None:
        """Notes that step `step` is on its way: from here on something can be lost."""
        self._step = step

    def safe(self) -> None:
        """Notes that what was trained is saved."""
        self._step = None

    def after(self, step: int) -> signal.Signals | None:
        """Returns the signal because of which the run ends after this step, if any."""
        if jax.process_count() == 1:
            return self.received
        stop = multihost_utils.reached_preemption_sync_point(step)
        return signal.SIGTERM if stop else None

    @contextlib.contextmanager
    def stop_after(self, kind: type[OSError]) -> Iterator[None]:
        """Ends the run after its next step if the body raises an error of this kind.

        All processes end; the error is kept as `failure`.
        """
        try:
            yield
        except kind as error:
            self.failure = self.failure or error
            if jax.process_count() == 1:
                self.received = self.received or signal.SIGTERM
            else:
                os.kill(os.getpid(), signal.SIGTERM)

    def _arrived(self, number: int, frame: Any) -> None:
        """Handles a signal in the main thread, as soon as Python is back."""
        self._handled += 1
        if self._step is None or self._handled > 1:
            self._insistent.throw(number, SystemExit(128 + number))
        self.received = signal.Signals(number)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        while data := self._reader.recv(1):
            if self._insistent.repeats:
                self._insistent.repeats -= 1  # the user has sent none
            elif data[0] in self._old:
                self._answer(signal.Signals(data[0]))

    def _answer(self, number: signal.Signals) -> None:
        """Answers a signal when it arrives, in a thread of its own."""
        self._seen += 1
        if self._step is not None and self._seen == 1:
            self._tell(
                f"{number.name}: finishing step {self._step}, then saving; again to "
                "stop without saving"
            )
            return
        step = self._saved()
        self._tell(
            f"{number.name}: stopped"
            + (" without saving" if self._step is not None else "")
            + "; the same command "
            + (f"goes on from step {step}." if step else "starts it again.")
        )
        if not self._ended.wait(GRACE):
            leave(128 + number)  # the main thread is inside XLA, or in a full pipe

    def _tell(self, text: str) -> None:
        """Writes to stderr, past Python's buffers and locks.

        It does not use stdout, which may be a closed pipe.
        """
        if self._lead:
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, f"{text}\n".encode())
