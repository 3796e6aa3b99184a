"""Ends a command that fails, is interrupted, or has no reader any more."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

PATIENCE = 3.0  # seconds that Ctrl-C waits for Python: XLA compiles for minutes
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
    command: str, afterwards: str = "", *, patience: float | None = PATIENCE
) -> Iterator[None]:
    """Wraps a command: Ctrl-C ends it with one line and exit code 130.

    A closed stdout (as by `| head`) ends it without a word.

    Args:
      afterwards: what the user can do then ("the same command goes on").
      patience: seconds after which the process ends where Python does not answer, as
        while XLA compiles; None: the command answers Ctrl-C by itself.
    """
    line = f"\n{command}: stopped by Ctrl-C" + (f"; {afterwards}" if afterwards else "")
    if patience is not None and threading.current_thread() is threading.main_thread():
        _watch(line, patience)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(line, file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Python would fail again at what is left to write when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


def wait_for_python() -> None:
    """Lets Ctrl-C wait as long as it takes from now on: somebody else answers it."""
    signal.set_wakeup_fd(-1)


def _watch(line: str, patience: float) -> None:
    """Ends the process if Python has not answered an interrupt after `patience`."""
    answered = threading.Event()

    def answer(*_: object) -> None:
        answered.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, answer)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGINT and not answered.wait(patience):
                print(line, file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()
