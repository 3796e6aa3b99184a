"""A chat endpoint on this machine that misbehaves as told, and stops by itself."""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONGEST = 60.0  # seconds that a server lives
MOST = 2_000  # requests that it takes


def pairs_about(text: str, count: int = 4) -> list[dict[str, str]]:
    """The answer of this server to a segment: depends on it alone."""
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    return [
        {"question": f"What is {name} {i}?", "answer": f"It is {name}, number {i}."}
        for i in range(count)
    ]


class ChatServer:
    """`behave(number, text)` says what the n-th request (from 0) gets: None (a good
    answer), a status or (status, headers), "drop", or a text as the model's answer.

    served: how often each segment got a good answer. bodies, headers: what came.
    """

    def __init__(self, behave: Callable[[int, str], Any] = lambda number, text: None):
        self.behave = behave
        self.served: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._done = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["ChatServer"]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer.answer(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            timeout = 0.1
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=self._serve, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join(timeout=10)
            self._server.server_close()

    def _serve(self) -> None:
        end = time.monotonic() + LONGEST
        while not self._done.is_set() and time.monotonic() < end:
            if len(self.bodies) >= MOST:
                return
            self._server.handle_request()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = body["messages"][1]["content"]
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._reply(handler, self.behave(number, text), text)
        finally:
            with self._lock:
                self._now -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, told: Any, text: str) -> None:
        if told == "drop":
            handler.close_connection = True
            handler.connection.close()
            return
        if isinstance(told, int):
            told = (told, {})
        if isinstance(told, tuple):
            status, headers = told
            self._send(handler, status, b'{"error": "as told"}', headers)
            return
        if told is None:
            with self._lock:
                self.served[text] += 1
            told = json.dumps(pairs_about(text))
        answer = {"choices": [{"message": {"role": "assistant", "content": told}}]}
        self._send(handler, 200, json.dumps(answer).encode(), {})

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
