"""An OpenAI-compatible chat endpoint: retries, pace, and a key that stays secret."""

import email.utils
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

RETRIED = frozenset([408, 409, 425, 429, *range(500, 600)])
# The answer would be the same for every question: no use going on.
HOPELESS = frozenset([301, 302, 303, 307, 308, 401, 402, 403, 404, 405])
SHOWN = 300  # characters of a server's message that an error quotes
LONGEST_HOLD = 600.0  # seconds that a Retry-After is believed


class Failed(Exception):
    """Raised when one question has no answer after all tries, or is refused."""


class Hopeless(Exception):
    """Raised when no question will have an answer: wrong key, address or model."""


class Stopped(Exception):
    """Raised when the run is asked to stop while a question waits for its turn."""


class Pace:
    """The pace of requests: evenly spaced, and none while the server said to wait."""

    def __init__(self, requests_per_minute: float = 0.0):
        if requests_per_minute < 0:
            raise ValueError(f"requests_per_minute={requests_per_minute} must be >= 0")
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0  # of time.monotonic(): the next turn that is free
        self._held = 0.0  # no request before
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Returns at this caller's turn; raises Stopped if `stop` is set before."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        rest(turn - time.monotonic(), stop)
        while (held := self._held - time.monotonic()) > 0:  # maybe held since
            rest(held, stop)

    def hold(self, seconds: float) -> None:
        """Lets no request start for so many seconds."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)


def rest(seconds: float, stop: threading.Event) -> None:
    """Sleeps for so many seconds; raises Stopped as soon as `stop` is set."""
    if stop.wait(max(0.0, seconds)):
        raise Stopped


@dataclass(frozen=True)
class Endpoint:
    """The address that questions go to, and how patiently they are asked.

    Attributes:
      url: the address up to and with /v1.
      key: sent as bearer token, to that address only; "": none.
      timeout: seconds without a byte of answer.
      tries: tries of one question. Between tries it waits for first_wait seconds, twice
        as long each time, at most longest_wait; or for what the server's Retry-After
        says if that is longer.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 300.0
    tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    pace: Pace = field(default_factory=Pace, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"endpoint={self.url!r} must begin with http:// or https:// "
                "(for example http://localhost:8000/v1)"
            )
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ValueError(
                "the API key holds spaces, line ends or other characters that no key "
                "has; set its environment variable to the bare key"
            )

    def ask(self, messages: Sequence[dict[str, str]], stop: threading.Event) -> str:
        """Asks a question and returns the text of the answer.

        Raises:
          Failed: no answer after all tries, or the server refuses this question.
          Hopeless: the server refuses any question.
          Stopped: `stop` was set while waiting.
        """
        body = json.dumps({"model": self.model, "messages": list(messages)}).encode()
        wait = self.first_wait
        for left in reversed(range(self.tries)):
            self.pace.wait(stop)
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code}: {self._message(error)}"
                if error.code in HOPELESS:
                    raise Hopeless(f"endpoint={self.url!r}: {trouble}") from None
                if error.code not in RETRIED:
                    raise Failed(trouble) from None
                asked = retry_after(error.headers.get("Retry-After"))
                if asked:
                    self.pace.hold(asked)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # Refused, dropped or timed out; or what came is not what it should be.
                trouble = f"{type(error).__name__}: {error}".replace(
                    self.key or "\0", "***"
                )
            if left:
                rest(wait, stop)
                wait = min(2 * wait, self.longest_wait)
        raise Failed(f"{trouble} ({self.tries} tries)")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", data=body, headers=headers
        )
        with _opener().open(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ValueError("an answer without choices[0].message.content")
        return content

    def _message(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(10_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = str(error.reason)
        # Some servers quote the key that they refuse.
        text = text.replace(self.key, "***") if self.key else text
        return " ".join(text.split())[:SHOWN] or str(error.reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def retry_after(header: str | None) -> float:
    """Returns the seconds that a Retry-After header asks for; 0 if there is none.

    The header holds a number or a date.
    """
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        seconds = moment.timestamp() - time.time()
    return min(max(seconds, 0.0), LONGEST_HOLD) if seconds == seconds else 0.0
