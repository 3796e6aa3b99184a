"""Ends a command that fails, is interrupted, or has no reader any more."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from beacon_jax.interrupts import Insistent, leave

PATIENCE = 3.0  # seconds that Ctrl-C waits for Python: XLA compiles for minutes
CLEANING = 7.0  # seconds more for what a command does when it is interrupted
INTERRUPTED = 128 + signal.SIGINT  # exit codes as shells know them
UNREAD = 128 + signal.SIGPIPE


def fail(error: Exception) -> NoReturn:
    """Ends the process with one line and exit code 1.

    A reader that has closed stdout is no error: `ended` handles that.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    # Errors about an argument also know its flag.
    sys.exit(f"error: {getattr(error, 'in_flags', error)}")


@contextlib.contextmanager
def ended(
    command: str, afterwards: str = "", *, patience: float = PATIENCE
) -> Iterator[None]:
    """Wraps a command: Ctrl-C ends it with one line and exit code 130.

    A closed stdout (as by `| head`) ends it without a word.

    Args:
      afterwards: what the user can do then ("the same command goes on").
      patience: seconds after which the process ends where Python does not answer, as
        while XLA compiles.
    """
    line = f"\n{command}: stopped by Ctrl-C" + (f"; {afterwards}" if afterwards else "")
    answer = _Answer(line)
    if threading.current_thread() is threading.main_thread():
        answer.watch(patience)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.arrived()
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Python would fail again at what is left to write when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


def wait_for_python() -> None:
    """Lets Ctrl-C wait as long as it takes from now on: somebody else answers it."""
    signal.set_wakeup_fd(-1)


class _Answer:
    """What Ctrl-C does: a line, once, and the end of the process."""

    def __init__(self, line: str):
        self._line, self._lock = line, threading.Lock()
        self._handled, self._arrived = threading.Event(), threading.Event()
        self._insistent = Insistent()

    def watch(self, patience: float) -> None:
        """Ends the process if Python has not ended it `patience` after an interrupt.

        While it cleans up (workers finish what they write) it has CLEANING more.
        """
        signal.signal(signal.SIGINT, self._handle)
        self._insistent.install()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while received := os.read(reader, 1):
                if received[0] != signal.SIGINT:
                    continue
                if not self._arrived.wait(patience):
                    self._say()
                if self._handled.is_set():
                    time.sleep(CLEANING)
                leave(INTERRUPTED)

        threading.Thread(target=wait, daemon=True).start()

    def arrived(self) -> None:
        """Says the line; the command is over, and another Ctrl-C changes nothing."""
        self._arrived.set()
        self._say()

    def _handle(self, number: int, frame: object) -> None:
        if self._arrived.is_set():
            return
        self._handled.set()
        self._insistent.throw(number, KeyboardInterrupt())

    def _say(self) -> None:
        with self._lock:
            if self._line:
                with contextlib.suppress(OSError):  # nobody reads it
                    print(self._line, file=sys.stderr, flush=True)
            self._line = ""
