"""Ends a command that fails, is interrupted, or has no reader any more."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from absl import flags

PATIENCE = 3.0  # seconds that Ctrl-C waits for Python: XLA compiles for minutes
INTERRUPTED = 128 + signal.SIGINT  # exit codes as shells know them
UNREAD = 128 + signal.SIGPIPE


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

    text = getattr(said, "in_flags", str(said))
    name = text.partition("=")[0]
    known = flags.FLAGS if values is None else values
    return f"--{text}" if name.isidentifier() and name in known else text


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
    interrupt = _Interrupt(line)
    if threading.current_thread() is threading.main_thread():
        interrupt.watch(patience)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would fail again at what is left to write when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)
    except BaseException as error:
        # A library may have made another error of it.
        if isinstance(error, KeyboardInterrupt) or interrupt.arrived:
            interrupt.say()
            sys.exit(INTERRUPTED)  # what hangs on the way out is not waited for
        raise
    interrupt.left.set()


def wait_for_python() -> None:
    """Lets Ctrl-C wait as long as it takes from now on: somebody else answers it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Interrupt:
    """Turns Ctrl-C into a KeyboardInterrupt, and ends the process where that fails.

    Attributes:
      arrived: whether there was one.
      left: set when the command has ended without one.
    """

    def __init__(self, line: str):
        self.arrived = False
        self.left = threading.Event()
        self._line, self._said = line, False

    def watch(self, patience: float) -> None:
        """Begins: an interrupt that has not ended the command after `patience` does."""
        signal.signal(signal.SIGINT, self._answer)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while received := os.read(reader, 1):
                if received[0] == signal.SIGINT and not self.left.wait(patience):
                    self.end()

        threading.Thread(target=wait, daemon=True).start()

    def say(self) -> None:
        """Writes the line, once, past Python's buffers and locks."""
        if not self._said:
            self._said = True
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, f"{self._line}\n".encode())

    def end(self) -> NoReturn:
        """Ends the process, from any thread, without a word of Python's own."""
        self.say()
        os._exit(INTERRUPTED)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.arrived or _swallowed(frame):
            self.end()
        self.arrived = True
        raise KeyboardInterrupt


def _swallowed(frame: FrameType | None) -> bool:
    """Tells whether an exception raised in this frame would not arrive as it is.

    Modules written in C make an ImportError of it while they are imported; what the
    garbage collector calls only prints it.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name in (
            "__del__",
            "_xla_gc_callback",
        ):
            return True
        frame = frame.f_back
    return False
