"""Ends a command that fails, is interrupted, or has no reader any more."""

import contextlib
import functools
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from beacon_jax.interrupts import Insistent, leave
from beacon_jax.paths import FULL, named_when_full

if TYPE_CHECKING:
    from absl import flags

PATIENCE = 3.0  # seconds that Ctrl-C waits for Python: XLA compiles for minutes
CLEANING = 7.0  # seconds more for what a command does when it is interrupted
INTERRUPTED = 128 + signal.SIGINT  # exit codes as shells know them
UNREAD = 128 + signal.SIGPIPE
OUTPUTS = ("out", "dst", "save_memory", "workdir")  # flags of what a command writes


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
    known = _flags(values)
    if isinstance(error, OSError) and error.errno in FULL:
        _let_go(error)
        given = [f"--{x}={known[x].value}" for x in OUTPUTS if x in known]
        given = [x for x in given if not x.endswith("=None")]
        place = next(iter(given), error.filename or "a file")
        try:
            with named_when_full(place):
                raise error
        except OSError as named:
            error = named
    sys.exit(f"error: {in_flags(error, known)}")


def _flags(values: "flags.FlagValues | None") -> "flags.FlagValues":
    from absl import flags

    return flags.FLAGS if values is None else values


def in_flags(
    said: Warning | Exception | str, values: "flags.FlagValues | None" = None
) -> str:
    """Returns what a warning or an error says, in the words of a command line.

    Errors about an argument may know its flag; else "ratio=3 ..." is "--ratio=3 ..."
    where the command has such a flag, and "path=DIR ..." is the flag that has DIR.
    """
    text = getattr(said, "in_flags", str(said))
    known = _flags(values)
    bare = text.removeprefix("--")
    name, _, rest = bare.partition("=")
    if name.isidentifier() and name in known:
        return f"--{bare}"
    if text != bare and values is not None:  # of an argument that is no flag
        return f"the text {rest}" if name == "text" else str(said)
    return _of_path(rest, known) if name == "path" else text


def _of_path(text: str, known: "flags.FlagValues") -> str:
    """Puts the flag in front of a text that begins with its value, if there is one."""
    from beacon_jax.resources import asset

    found = ""
    for name in known:
        value = known[name].value
        if not isinstance(value, str) or not value:
            continue
        for path in {value, str(Path(value)), asset(value), os.path.realpath(value)}:
            behind = text.removeprefix(path)
            if behind != text and not re.match(r"[\w/.-]*\w", behind):
                found = found or f"--{name}={value}{behind}"
    return found or text


def _fill_streams() -> None:
    """Opens the null device where stdin or stderr are closed.

    Else the next file that a command opens has their number, and what is printed goes
    into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the least number that is free is the next one
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end


def _let_go(error: OSError | None = None) -> None:
    """Ends the process if stdout takes no more, with the reason.

    Args:
      error: perhaps of stdout, which does not know it any more if it is unbuffered.
    """
    try:
        sys.stdout.flush()
        if error is not None and error.errno in FULL and _is_full():
            raise error
    except BrokenPipeError:
        _drop(sys.stdout)
        sys.exit(UNREAD)
    except OSError as fault:
        _drop(sys.stdout)
        try:
            with named_when_full("stdout"):
                raise fault
        except OSError as named:
            sys.exit(f"error: {named}")


def _is_full() -> bool:
    """Tells whether stdout is a device that takes nothing, or a file on a full disk."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # of a program that calls this one
        return False
    try:
        os.write(number, b"")
    except OSError:
        return True
    is_file = stat.S_ISREG(os.fstat(number).st_mode)
    return is_file and not os.fstatvfs(number).f_bavail


def _drop(stream: TextIO) -> None:
    """Drops what is left to write: Python would fail again at it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Wraps what writes to stdout.

    A closed one (as by `| head`) ends the process without a word, one that cannot be
    written with one line.
    """
    try:
        yield
    except BrokenPipeError:
        _drop(sys.stdout)
        sys.exit(UNREAD)
    except OSError as error:
        _let_go(error)
        raise
    finally:
        try:
            sys.stderr.flush()
        except OSError:  # nobody reads it, as `progress.say` has found
            _drop(sys.stderr)
        _let_go()


@contextlib.contextmanager
def ended(
    command: str, afterwards: str = "", *, patience: float = PATIENCE
) -> Iterator[None]:
    """Wraps a command: Ctrl-C ends it with one line and exit code 130.

    Stdout is as in `output`.

    Args:
      afterwards: what the user can do then ("the same command goes on").
      patience: seconds after which the process ends where Python does not answer, as
        while XLA compiles.
    """
    line = f"\n{command}: stopped by Ctrl-C" + (f"; {afterwards}" if afterwards else "")
    answer = _Answer(line)
    _fill_streams()
    if sys.stdout is None:
        sys.exit(
            f"error: stdout is closed, and {command} writes there: redirect it to a "
            "file, or to /dev/null."
        )
    if threading.current_thread() is threading.main_thread():
        answer.watch(patience)
    try:
        with output():
            yield
    except OSError as error:
        if answer.handled:
            answer.arrived()
            sys.exit(INTERRUPTED)
        fail(error)
    except BaseException as error:
        # Somebody on the way may have made another error of it.
        if isinstance(error, KeyboardInterrupt) or answer.handled:
            answer.arrived()
            sys.exit(INTERRUPTED)
        raise


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
