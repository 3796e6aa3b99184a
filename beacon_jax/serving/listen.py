"""The process: sockets, connections that are left open, and signals."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from beacon_jax.serving.app import make_app
from beacon_jax.serving.service import Service

IDLE = 75  # seconds that a connection may stay open between two requests
FINISH = 30  # seconds for answers that have begun, when the server is to end


class Patient(H11Protocol):
    """A connection that is closed unless it sends a whole head in time.

    uvicorn waits for ever for the first request of a connection, and for the rest of a
    request's head. Those who open connections and leave them would use them all up.
    """

    seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head is complete
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        self._expect_head(IDLE + self.seconds)

    def _expect_head(self, seconds: float | None = None) -> None:
        wait = self.seconds if seconds is None else seconds
        self._head_timer = self.loop.call_later(wait, self._give_up)

    def _give_up(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self.transport.close()


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
        config = uvicorn.Config(
            app,
            http=type("Connection", (Patient,), {"seconds": limits.seconds}),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=FINISH,
            h11_max_incomplete_event_size=64 * 1024,
            backlog=2048,
        )
        self.socket = listen(host, port)
        self._server = uvicorn.Server(config)
        service.on_failed = self.stop

    @property
    def address(self) -> str:
        """The address to open in a browser."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT; answers that have begun are finished."""
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


def is_loopback(host: str) -> bool:
    """Tells whether an address is reached from this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def quiet() -> None:
    """Keeps lines of the libraries to those that say what is wrong."""
    for name in ("uvicorn.error", "uvicorn.access", "sse_starlette", "multipart"):
        logging.getLogger(name).setLevel(logging.WARNING)
