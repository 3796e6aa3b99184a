"""The process: sockets, connections that are left open, and signals."""

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from beacon_jax.interrupts import leave
from beacon_jax.serving.app import make_app
from beacon_jax.serving.errors import response
from beacon_jax.serving.service import Service

IDLE = 75  # seconds that a connection may stay open between two requests
REFUSED = 64  # connections beyond the limit that are still told so
FINISH = 30  # seconds for answers that have begun, when the server is to end


class Patient(H11Protocol):
    """A connection that has to send a whole head in time, and to take its answer.

    uvicorn waits for ever for the first request of a connection, for the rest of a
    request's head, and for a client that reads no more. Those who open connections and
    leave them would use them all up. So such a connection is closed after `seconds`,
    and earlier if there are more than `most`: those first that wait longest for a head.

    Attributes:
      heads: the connections that wait for a head.
    """

    seconds = 30.0
    most = 1024
    heads: ClassVar[dict["Patient", None]]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stall_timer: asyncio.TimerHandle | None = None
        self._expect_head(self.seconds)
        oldest, more = next(iter(self.heads)), len(self.connections) - self.most
        if more > REFUSED or (more > 0 and oldest is not self):
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head is complete
            self._head_is_there()

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:  # else the next request was there already
            self._expect_head(IDLE + self.seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_taken()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # another answer has begun or is complete
            return
        said = response(ValueError("the request is no valid HTTP: send another."))
        headers = [*said.raw_headers, (b"connection", b"close")]
        for part in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(said.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(part))
        self.transport.close()
        self._expect_head(self.seconds)  # to take this answer, in fact

    def _expect_head(self, seconds: float) -> None:
        self._head_is_there()
        self.heads[self] = None
        self._head_timer = self.loop.call_later(seconds, self._give_up)

    def _head_is_there(self) -> None:
        if self.heads.pop(self, self) is None:
            self._head_timer.cancel()

    def _give_up(self) -> None:
        # What it has not taken by now would keep it open.
        self.transport.abort()

    def _expect_taken(self, before: int | None = None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
            return
        self._stall_timer = self.loop.call_later(self.seconds, self._expect_taken, left)


class Ending(uvicorn.Server):
    """Ends at the first signal when all answers are complete, at the second at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            leave(128 + sig)
        self.should_exit = True  # not told to uvicorn, which would raise it again


class Server:
    """A service behind a socket."""

    def __init__(self, service: Service, host: str, port: int):
        """Opens the socket.

        Raises:
          OSError: the port is taken, or the address is not this machine's.
        """
        self.service = service
        app = make_app(service)
        app.router.lifespan_context = self._lifespan
        limits = service.limits
        others = 128 + REFUSED  # files that are open besides
        room = files(limits.connections + others) - others
        most = max(min(limits.connections, room), 16)
        config = uvicorn.Config(
            app,
            http=type(
                "Connection",
                (Patient,),
                {"seconds": limits.seconds, "most": most, "heads": {}},
            ),
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=FINISH,
            h11_max_incomplete_event_size=64 * 1024,
            backlog=512,  # more of them at once would be open beyond the limit
        )
        self.socket = listen(host, port)
        self._server = Ending(config)
        service.on_failed = self.stop

    @property
    def address(self) -> str:
        """The address to open in a browser."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT; answers that have begun are finished."""
        AppStatus.disable_automatic_graceful_drain()  # it would cut streams off
        self._server.run(sockets=[self.socket])

    def stop(self) -> None:
        """Ends `run`, from another thread."""
        self._server.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.service.start()
        yield
        await asyncio.to_thread(self.service.close, FINISH)


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket.

    Raises:
      OSError: names address and port, and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        said = getattr(error, "strerror", None) or error
        raise OSError(
            f"--host={host} --port={port} cannot be used ({said}): choose another "
            "port, or an address of this machine."
        ) from None
    return opened


def files(wanted: int) -> int:
    """Lets the process open so many files, if it may; returns how many it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < more:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        return more
    return wanted


def is_loopback(host: str) -> bool:
    """Tells whether an address is reached from this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def quiet() -> None:
    """Keeps lines of the libraries to those that say what is wrong."""
    for name in ("uvicorn.access", "sse_starlette", "multipart", "python_multipart"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Its warnings are of requests that are no HTTP: anyone could fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
