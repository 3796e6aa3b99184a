"""Ends a command that fails, is interrupted, or has no reader any more."""

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from beacon_jax.interrupts import Insistent, leave
from beacon_jax.paths import FULL

if TYPE_CHECKING:
    from absl import flags

PATIENCE = 3.0  # seconds that Ctrl-C waits for Python: XLA compiles for minutes
CLEANING = 7.0  # seconds more for what a command does when it is interrupted
INTERRUPTED = 128 + signal.SIGINT  # exit codes as shells know them
UNREAD = 128 + signal.SIGPIPE


# What the user of a command can mend, or has to know of: one line, no traceback.
MENDED = (ValueError, OSError, ImportError, FloatingPointError)


def command(
    run: Callable[["flags.FlagValues"], None],
) -> Callable[[Sequence[str]], None]:
    """Makes the `main` of a command whose arguments are all flags.

    Other arguments, and errors that the user can mend, end it with one line.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str]) -> None:
        from absl import flags

        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {argv[1:]}: every option has --.")
        try:
            run(flags.FLAGS)
        except MENDED as error:
            fail(error)

    return main


def fail(error: Exception, values: "flags.FlagValues | None" = None) -> NoReturn:
    """Ends the process with one line and exit code 1.

    A reader that has closed stdout is no error: `ended` handles that.

    Args:
      values: the command's flags; None: those of the process.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    sys.exit(f"error: {in_flags(error, values)}")


def in_flags(
    said: Warning | Exception | str, values: "flags.FlagValues | None" = None
) -> str:
    """Returns what a warning or an error says, in the words of a command line.

    Errors about an argument may know its flag; else "ratio=3 ..." is "--ratio=3 ..."
    where the command has such a flag.
    """
    from absl import flags

    known = flags.FLAGS if values is None else values
    text = getattr(said, "in_flags", str(said))
    # Of an argument that is no flag, as a line of a chat.
    if values is not None and re.match(r"--\w+=", text):
        text = text if text[2:].partition("=")[0] in values else text[2:]
    if isinstance(said, OSError) and said.errno in FULL and not said.filename:
        # Where files are written, they are named; of stdout there is no name.
        text = (
            f"stdout, or a file that is written, fails ({said.strerror}): make room, "
            "or write elsewhere."
        )
    if "model" in known and text.startswith(f"path={known['model'].value}"):
        return f"--model{text.removeprefix('path')}"
    name = text.partition("=")[0]
    return f"--{text}" if name.isidentifier() and name in known else text


@contextlib.contextmanager
def ended(
    command: str, afterwards: str = "", *, patience: float = PATIENCE
) -> Iterator[None]:
    """Wraps a command: Ctrl-C ends it with one line and exit code 130.

    A closed stdout (as by `| head`) ends it without a word, a full one with a line.

    Args:
      afterwards: what the user can do then ("the same command goes on").
      patience: seconds after which the process ends where Python does not answer, as
        while XLA compiles.
    """
    line = f"\n{command}: stopped by Ctrl-C" + (f"; {afterwards}" if afterwards else "")
    answer = _Answer(line)
    if sys.stderr is None:  # closed by 2>&-: print would write to stdout
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:
        sys.exit(
            f"error: stdout is closed, and {command} writes there: redirect it to a "
            "file, or to /dev/null."
        )
    if threading.current_thread() is threading.main_thread():
        answer.watch(patience)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(UNREAD)
    except OSError as error:
        _drop_stdout()
        if answer.handled:
            answer.arrived()
            sys.exit(INTERRUPTED)
        sys.exit(f"error: {in_flags(error)}")
    except BaseException as error:
        # Somebody on the way may have made another error of it.
        if isinstance(error, KeyboardInterrupt) or answer.handled:
            answer.arrived()
            sys.exit(INTERRUPTED)
        raise


def _drop_stdout() -> None:
    """Sends what is left to write to nowhere: Python would fail again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def wait_for_python() -> None:
    """Lets Ctrl-C wait as long as it takes from now on: somebody else answers it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Answer:
    """Answers Ctrl-C: with a line, once, and the end of the process."""

    def __init__(self, line: str):
        self._lines = [line]
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

    @property
    def handled(self) -> bool:
        """Whether Python has heard of an interrupt."""
        return self._handled.is_set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._arrived.is_set():
            return
        if _importing(frame):
            self._say()
            leave(INTERRUPTED)
        self._handled.set()
        self._insistent.throw(number, KeyboardInterrupt())

    def _say(self) -> None:
        # Without a lock: another Ctrl-C may arrive right here, in the same thread.
        with contextlib.suppress(IndexError, OSError):  # said already; nobody reads it
            os.write(2, f"{self._lines.pop()}\n".encode())


def _importing(frame: FrameType | None) -> bool:
    """Tells whether a module is being imported, when there is nothing to lose yet.

    Modules written in C make an ImportError of an exception that is raised there, which
    others take for a package that is missing.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
