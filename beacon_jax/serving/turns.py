"""Who may launch programs: two threads in turn, where devices have to agree.

Programs that are split over devices have to be launched in one order everywhere, or
their collectives wait for each other for ever. On one device the launches of two
threads are independent, and nobody waits.
"""

import collections
import threading
from typing import Self


class Turns:
    """A lock that threads get in the order in which they asked; `with turns:`.

    Attributes:
      needed: False: it does nothing.
    """

    def __init__(self, needed: bool):
        self.needed = needed
        self._lock = threading.Lock()
        self._held = False
        self._queue: collections.deque[threading.Event] = collections.deque()

    def __enter__(self) -> Self:
        if self.needed:
            mine = threading.Event()
            with self._lock:
                if not self._held and not self._queue:
                    self._held = True
                    return self
                self._queue.append(mine)
            mine.wait()  # the one in front passes it on
        return self

    def __exit__(self, *_: object) -> None:
        if self.needed:
            with self._lock:
                if self._queue:
                    self._queue.popleft().set()
                else:
                    self._held = False

    def pause(self) -> None:
        """Lets those who wait go first."""
        if self.needed:
            self.__exit__()
            self.__enter__()
