"""One server of several processes: the first answers, the others do what it does.

Programs that are split over the devices of several processes have to be launched by all
of them, in one order. The first process has the sockets, the queue and the store. It
tells the others each thing that it does with its `Device`, and they do the same. What
it tells goes through connections of Python's `multiprocessing`, which know each other
by a key that the processes share through jax.
"""

import contextlib
import functools
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from beacon_jax.inference.memory import Memory
from beacon_jax.serving.device import Device

logger = logging.getLogger(__name__)
KEY = 32  # bytes
NAME = 256  # bytes of the longest name of a host


class Stopped(Exception):
    """The first process has given a text up."""


class Leader(Device):
    """The `Device` of the first process; every call of it is told the others first.

    Only whoever has the turn (`turns.Turns`) may call it.
    """

    def __init__(self, device: Device, others: list[Connection]):
        super().__init__(device.model, device.rows, device.dtype)
        self._others = others

    def compress(
        self,
        tokens: Int[np.ndarray, " n"],
        parent: Memory | None,
        settings: dict[str, Any],
        on_note: Callable[[str], None],
        on_progress: Callable[[int, int], None],
    ) -> Memory:
        """Reads a text, see `Device.compress`; others wait between its pieces, too."""
        self._tell("compress", tokens, parent, settings)

        def between(done: int, total: int) -> None:
            try:
                on_progress(done, total)  # passes the turn on, and gets it back
            except BaseException:
                self._tell("stop")
                raise
            self._tell("resume")

        return super().compress(tokens, parent, settings, on_note, between)

    def end(self) -> None:
        """Lets the other processes end."""
        with contextlib.suppress(OSError):
            self._tell("end")
        for other in self._others:
            other.close()

    def _tell(self, name: str, *given: Any) -> None:
        for other in self._others:
            other.send((name, given))


def _led(name: str) -> Callable[..., Any]:
    plain = getattr(Device, name)

    @functools.wraps(plain)
    def call(self: Leader, *given: Any) -> Any:
        self._tell(name, *given)
        return plain(self, *given)

    return call


for _name in (
    *("warm", "place", "window", "drop"),
    *("insert", "block", "release", "taken", "reset"),
):
    setattr(Leader, _name, _led(_name))


def lead(device: Device, host: str | None = None) -> Leader:
    """Waits for the other processes, and leads them.

    Args:
      host: address at which they reach this process; None: that of its name.
    """
    key = secrets.token_bytes(KEY)
    here = host or socket.gethostbyname(socket.gethostname())
    with Listener((here, 0), authkey=key) as listener:
        port = listener.address[1]
        assert isinstance(port, int)
        _share(here.encode().ljust(NAME, b"\0") + port.to_bytes(4) + key)
        count = jax.process_count() - 1
        return Leader(device, [listener.accept() for _ in range(count)])


def follow(device: Device) -> None:
    """Does what the first process does, until it ends.

    Raises:
      OSError: it has ended without a word.
    """
    told = _share(bytes(NAME + 4 + KEY))
    host = told[:NAME].rstrip(b"\0").decode()
    port = int.from_bytes(told[NAME : NAME + 4])
    with Client((host, port), authkey=told[NAME + 4 :]) as leader:
        try:
            _Follower(device, leader).run()
        except EOFError:
            raise OSError(
                "the first process of the server has ended without a word: see what it "
                "printed last, and start all of them again."
            ) from None


def _share(mine: bytes) -> bytes:
    """Returns the first process's bytes."""
    data = np.frombuffer(mine, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes()


class _Follower:
    """The loop of a process that follows.

    A text is read in a thread of its own, which works only while this one waits.
    """

    def __init__(self, device: Device, leader: Connection):
        self._device, self._leader = device, leader
        self._waits = threading.Event()  # the text's thread has paused, or ended
        self._goes_on = threading.Event()
        self._stopped = False

    def run(self) -> None:
        while True:
            name, given = self._leader.recv()
            if name == "end":
                return
            if name == "compress":
                thread = threading.Thread(target=self._read, args=given, daemon=True)
                thread.start()
                self._wait()
            elif name in ("resume", "stop"):
                self._stopped = name == "stop"
                self._goes_on.set()
                self._wait()
            else:
                self._do(getattr(self._device, name), *given)

    def _do(self, method: Callable[..., Any], *given: Any) -> None:
        try:
            method(*given)
        except Stopped:
            pass
        except Exception as error:  # the first process has it, too, and tells of it
            logger.debug("%s failed", method.__name__, exc_info=error)

    def _read(self, tokens: Any, parent: Any, settings: Any) -> None:
        nothing = lambda note: None
        self._do(
            self._device.compress, tokens, parent, settings, nothing, self._between
        )
        self._waits.set()

    def _between(self, done: int, total: int) -> None:
        self._goes_on.clear()
        self._waits.set()
        self._goes_on.wait()
        if self._stopped:
            raise Stopped

    def _wait(self) -> None:
        self._waits.wait()
        self._waits.clear()
