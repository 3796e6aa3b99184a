"""Asks an OpenAI-compatible endpoint: retries, pace, and a key that stays secret."""

import concurrent.futures
import email.utils
import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import tenacity

RETRIED = frozenset([408, 409, 425, 429, *range(500, 600)])
# The answer would be the same for every question: no use going on.
HOPELESS = frozenset([301, 302, 303, 307, 308, 401, 402, 403, 404, 405])
SHOWN = 300  # characters of a server's message that an error quotes
LONGEST_HOLD = 600.0  # seconds that a Retry-After is believed


class Failed(Exception):
    """Raised when one question has no answer after all tries, or is refused."""


class Hopeless(Exception):
    """Raised when no question will have an answer: wrong key, address or model."""


class _Again(Exception):
    """Raised when a try went wrong in a way that the next one may not."""


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
        """Returns at this caller's turn.

        Raises:
          CancelledError: `stop` was set before.
        """
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
    """Sleeps for so many seconds; raises CancelledError as soon as `stop` is set."""
    if stop.wait(max(0.0, seconds)):
        raise concurrent.futures.CancelledError


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
          CancelledError: `stop` was set while waiting.
        """
        tries = tenacity.Retrying(
            sleep=lambda seconds: rest(seconds, stop),
            stop=tenacity.stop_after_attempt(self.tries),
            wait=tenacity.wait_exponential(self.first_wait, self.longest_wait),
            retry=tenacity.retry_if_exception_type(_Again),
            reraise=True,
        )
        try:
            return tries(self._try, messages, stop)
        except _Again as error:
            raise Failed(f"{error} ({self.tries} tries)") from None

    def _try(self, messages: Sequence[dict[str, str]], stop: threading.Event) -> str:
        self.pace.wait(stop)
        body = {"model": self.model, "messages": list(messages)}
        try:
            response = self._client.post("chat/completions", json=body)
            if response.is_success:
                return _content(response.json())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            # Refused, dropped or timed out; or what came is not what it should be.
            raise _Again(self._clean(f"{type(error).__name__}: {error}")) from None
        # Some servers quote the key that they refuse.
        said = " ".join(self._clean(response.text[:10_000]).split())[:SHOWN]
        trouble = f"HTTP {response.status_code}: {said or response.reason_phrase}"
        if response.status_code in HOPELESS:
            raise Hopeless(f"endpoint={self.url!r}: {trouble}")
        if response.status_code not in RETRIED:
            raise Failed(trouble)
        if asked := retry_after(response.headers.get("Retry-After")):
            self.pace.hold(asked)
        raise _Again(trouble)

    @functools.cached_property
    def _client(self) -> httpx.Client:
        # It follows no redirect, which would carry the key to another address.
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else None,
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,
        )

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _content(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError("an answer without choices[0].message.content")
    return content


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
