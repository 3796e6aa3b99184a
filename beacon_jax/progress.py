"""Says on stderr what a command is doing, once it takes longer than three seconds.

Work that is quicker than that stays silent. A thread looks at the clock, so that work
which cannot report by itself (loading, compiling) is shown too.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

AFTER = 3.0  # seconds of silence before the first line
EVERY = 5.0  # seconds between two lines
LOOK = 0.25  # seconds between two looks at the clock


def say(line: str, end: str = "\n") -> None:
    """Prints a line on stderr, if somebody reads it."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to stop the work
        print(line, end=end, file=sys.stderr, flush=True)


class Progress:
    """Shows the stages of a command, one at a time."""

    def __init__(
        self,
        show: Callable[[str], None] = say,
        *,
        after: float = AFTER,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._show, self._after, self._every, self._clock = show, after, every, clock
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def stage(self, doing: str, unit: str = "", note: str = "") -> Iterator["Stage"]:
        """Shows `doing` ("reading") while the block runs, if it runs long.

        Args:
          unit: of what is counted ("tokens"); "": nothing is.
          note: what is worked on, behind the figures.
        """
        stage = Stage(doing, unit, note, self._clock)
        with self._lock:
            before, self._stage = self._stage, stage
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
        try:
            yield stage
        finally:
            with self._lock:
                self._stage = before
        if stage.shown:
            self._show(stage.line(ended=True))

    def look(self) -> None:
        """Shows a line if it is time for one."""
        with self._lock:
            stage = self._stage
            if stage is None:
                return
            wait = self._every if stage.shown else self._after
            if self._clock() - stage.quiet_since >= wait:
                stage.shown = True
                stage.quiet_since = self._clock()
                self._show(_compiling(self._after) or stage.line())

    def _look(self) -> None:
        """Looks at the clock until there is no stage: a program makes many of these."""
        while True:
            time.sleep(LOOK)
            with self._lock:
                if self._stage is None:
                    self._thread = None
                    return
            self.look()


def starting() -> contextlib.AbstractContextManager["Stage"]:
    """Shows that a command's modules are imported, where that takes long."""
    return Progress().stage("starting")


class Stage:
    """One kind of work: how long it takes and, if it is counted, how far it is.

    Call it to report how far it is.
    """

    def __init__(self, doing: str, unit: str, note: str, clock: Callable[[], float]):
        self.note = note
        self._doing, self._unit, self._clock = doing, unit, clock
        self._start = self.quiet_since = clock()
        self._first: tuple[float, float] | None = None
        self._done = self._total = 0.0
        self.shown = False

    def __call__(self, done: float, total: float = 0) -> None:
        """Reports that `done` of `total` (0: nobody knows) are finished."""
        if self._first is None or done < self._first[0]:
            # The first report comes after the compilation: rates are counted from it.
            self._first = (done, self._clock())
        self._done, self._total = done, total

    def add(self, more: float) -> None:
        """Reports that `more` are finished besides those before."""
        self(self._done + more, self._total)

    def begin(self, done: float, total: float) -> None:
        """Reports what was there already: the rate is that of what follows."""
        self._first = (done, self._clock())
        self._done, self._total = done, total

    def skip(self, more: float) -> None:
        """Reports that `more` need no work: they do not count in the rate."""
        if self._first is not None:
            self._first = (self._first[0] + more, self._first[1])
        self._done += more

    def becomes(self, doing: str) -> None:
        """Begins other work of the same stage, which is counted and timed anew."""
        self._doing, self._first, self.shown = doing, None, False
        self._done = self._total = 0.0
        self._start = self.quiet_since = self._clock()

    def alive(self) -> None:
        """Reports that something else was shown just now, an answer for example.

        Its line is not to be written into.
        """
        self.quiet_since, self.shown = self._clock(), False

    def line(self, *, ended: bool = False) -> str:
        """Returns what is shown now."""
        now = self._clock()
        passed = f"{now - self._start:,.0f} s"
        note = f" ({self.note})" if self.note else ""
        if self._first is None:
            return f"{self._doing}{note}: {passed}" + ("" if ended else " ...")
        count = f"{self._done:,.0f}"
        if self._total:
            count += f" of {self._total:,.0f}"
        figures = [f"{self._doing}{note}: {count} {self._unit}"]
        new, since = self._done - self._first[0], now - self._first[1]
        if new and since > 0:
            figures.append(f"{new / since:,.1f} {self._unit}/s")
            if self._total and not ended:
                left = (self._total - self._done) * since / new
                figures.append(f"{duration(left)} left")
        return ", ".join([*figures, *([passed] if ended else [])])


def duration(seconds: float) -> str:
    """Writes seconds as people do: "40 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _compiling(least: float) -> str:
    """Returns what to say while XLA compiles for longer than `least` seconds."""
    module = sys.modules.get("beacon_jax.compiling")  # it imports jax
    running = module.watch.running() if module else None
    if running is None or running < least:
        return ""
    return f"compiling: {running:,.0f} s ..."
