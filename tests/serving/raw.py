"""Requests byte by byte, as no client library would send them, and their answers."""

import contextlib
import http.client
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from beacon_jax.serving.service import Service
from tests.serving.conftest import eventually

FIELDS = {"message", "type", "param", "code"}  # of an error in OpenAI's form


class Answer(NamedTuple):
    """What came back; status 0: the connection was closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error that the body tells of."""
        return self.json["error"]


def connect(service: Service, seconds: float = 60) -> socket.socket:
    """Opens a connection."""
    at = urlsplit(service.address)  # type: ignore[attr-defined]
    return socket.create_connection((at.hostname, at.port), seconds)


class Reader:
    """Reads one answer after the other from a connection."""

    def __init__(self, connection: socket.socket):
        self._file = connection.makefile("rb")

    def makefile(self, mode: str) -> "Reader":
        """Returns what an answer is read from, which its end does not close."""
        return self

    def close(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def read(connection: socket.socket | Reader, method: str = "POST") -> Answer:
    """Reads one answer."""
    response = http.client.HTTPResponse(connection, method=method)  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (ConnectionError, http.client.BadStatusLine):
        return Answer(0, {}, b"")
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, body)


def exchange(service: Service, data: bytes, method: str = "POST") -> Answer:
    """Sends bytes on a connection of their own; returns the first answer."""
    with connect(service) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer before all is sent
            connection.sendall(data)
        return read(connection, method)


def head(method: str, path: str, *lines: str) -> bytes:
    """Writes the head of a request."""
    first = f"{method} {path} HTTP/1.1"
    return "\r\n".join([first, "Host: x", *lines, "", ""]).encode("latin-1")


def post(service: Service, path: str, body: bytes, *lines: str) -> Answer:
    """Posts a body, with more lines of the head."""
    length = f"Content-Length: {len(body)}"
    if not any(line.lower().startswith("content-type") for line in lines):
        lines = (*lines, "Content-Type: application/json")
    return exchange(service, head("POST", path, length, *lines) + body)


def refused(answer: Answer, *words: str) -> str:
    """Asserts that an answer is an error in our form, which has these words."""
    assert 400 <= answer.status < 600 and answer.status != 500, answer
    assert answer.headers["content-type"] == "application/json", answer
    error = answer.error
    assert set(error) == FIELDS, error
    message = error["message"]
    assert len(message) < 1500 and "Traceback" not in message, message
    remedy = [":", ",", " must be ", "use "]
    assert any(x in message for x in remedy), f"no remedy: {message}"
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


def fair(answer: Answer, *words: str) -> None:
    """Asserts that an answer is a good one, or an error in our form."""
    if not 200 <= answer.status < 300:
        refused(answer, *words)


class Log(logging.Handler):
    """Keeps what is logged as an error, and every traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.bad: list[str] = []
        self.all: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.all.append(record.getMessage())
        if record.levelno >= logging.ERROR or record.exc_info:
            self.bad.append(logging.Formatter().format(record))


@contextlib.contextmanager
def logged() -> Iterator[Log]:
    """Listens to all loggers."""
    log = Log()
    loggers = [logging.getLogger(x) for x in (None, "uvicorn", "uvicorn.error")]
    loggers = [x for x in loggers if x.name == "root" or not x.propagate]
    for logger in loggers:
        logger.addHandler(log)
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeHandler(log)


def still_serves(service: Service) -> None:
    """Asserts that a server answers, and that nothing is left of other requests."""
    assert exchange(service, head("GET", "/health"), "GET").json == {"status": "ok"}
    asked = json.dumps({"prompt": "hello", "max_tokens": 2, "temperature": 0})
    answer = post(service, "/v1/completions", asked.encode(), *keyed(service))
    assert answer.status == 200, answer
    assert answer.json["usage"]["completion_tokens"] >= 1
    idle = {"waiting": 0, "reading": 0, "answering": 0}
    eventually(lambda: service.engine.state() == idle)
    eventually(lambda: not service.reading.jobs())
    assert service.engine.running and service.reading.running


@contextlib.contextmanager
def unharmed(*services: Service) -> Iterator[Log]:
    """Asserts at the end of a block that servers are as they were, nothing logged."""
    with logged() as log:
        yield log
        for service in services:
            still_serves(service)
    assert not log.bad, "\n".join(log.bad)


def keyed(service: Service) -> tuple[str, ...]:
    """Returns the line of a head that has the key, if there is one."""
    key = service.limits.key
    return () if key is None else (f"Authorization: Bearer {key}",)
