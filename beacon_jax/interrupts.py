"""Raises in the main thread, and ends the process, when a signal comes.

Python runs a handler between two of its own instructions, wherever it is: perhaps in a
callback of the garbage collector (jax has one), a `__del__` or a weak reference, where
an exception is printed as "ignored" and the program goes on. `Insistent` raises it
again until it arrives, without a word about the attempts that did not.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

AGAIN = 0.02  # seconds after which an exception that was ignored is raised again


class Insistent:
    """Raises exceptions that no callback can keep; used in the main thread.

    Attributes:
      repeats: signals that this class has sent to itself, and nobody has counted yet.
    """

    def __init__(self) -> None:
        self.repeats = 0
        self._number: int = signal.SIGINT
        self._error: BaseException | None = None
        self._before: Callable[[Any], Any] | None = None

    def install(self) -> None:
        """Begins to hear of ignored exceptions."""
        self._before = sys.unraisablehook
        sys.unraisablehook = self._ignored

    def remove(self) -> None:
        """Stops hearing of them, if nobody else has begun to."""
        if self._before is not None and sys.unraisablehook == self._ignored:
            sys.unraisablehook = self._before

    def throw(self, number: int, error: BaseException) -> NoReturn:
        """Raises `error`; a handler of signal `number` calls it, each time it runs."""
        self._number, self._error = number, error
        raise error

    def _ignored(self, found: Any) -> None:
        if self._error is None or found.exc_value is not self._error:
            if self._before is not None:
                self._before(found)
            return
        with contextlib.suppress(RuntimeError):  # Python is ending anyway
            threading.Thread(target=self._again, daemon=True).start()

    def _again(self) -> None:
        time.sleep(AGAIN)  # the callback is over by then, or it happens once more
        self.repeats += 1
        _thread.interrupt_main(signal.Signals(self._number))


def leave(code: int) -> NoReturn:
    """Ends this process and its worker processes now, whatever they do.

    Nothing is flushed: the main thread may hold the lock of a file that nobody reads.
    """
    with contextlib.suppress(Exception):
        multiprocessing: Any = sys.modules.get("multiprocessing")
        for child in multiprocessing.active_children() if multiprocessing else ():
            child.kill()
    os._exit(code)
