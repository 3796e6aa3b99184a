"""What every request passes: the key, the size, readiness; headers and counters."""

import hmac
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beacon_jax.serving.errors import Refused, logged, response
from beacon_jax.serving.service import Service

SAFE = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ID = re.compile("^/v1/memories/[^/]+")
_ELSEWHERE = ("cross-site", "same-site")
_KEYED = ("/v1/", "/metrics")
_LOCAL = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?", re.I)
# What requests are counted by; those of other paths are counted together.
_COUNTED = frozenset(
    f"/{path}"
    for path in [
        *("", "health", "ready", "metrics", "v1/models", "v1/completions"),
        *("v1/chat/completions", "v1/memories", "v1/memories/{name}"),
        *("v1/memories/{name}/append", "v1/memories/{name}/fork"),
    ]
)


class Guard:
    """Refuses what must not pass, and counts what is answered."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._open = 0  # requests that have no whole answer yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = _ID.sub("/v1/memories/{name}", scope["path"])
        route = route if route in _COUNTED else "other"
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
                status = str(message["status"])
                self._service.metrics.requests.labels(route, status).inc()
            await send(message)

        self._open += 1
        try:
            self._check(scope)
            await self._app(scope, receive, sent)
        except Exception as error:
            if begun:
                raise
            logged(error)
            await response(error)(scope, receive, sent)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        service, path = self._service, scope["path"]
        key, headers = service.limits.key, Headers(scope=scope)
        if key is not None and path.startswith(_KEYED):
            given = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                raise Refused(
                    401,
                    "the key is missing or wrong: send Authorization: Bearer KEY.",
                    "invalid_api_key",
                    **{"WWW-Authenticate": "Bearer"},
                )
        host = headers.get("host", "localhost")
        if service.limits.local and not _LOCAL.fullmatch(host):
            raise Refused(
                403,
                f"Host: {host[:80]!r} is no name of this machine: use localhost, or "
                "start the server with --api_key.",
                "host",
            )
        if scope["method"] != "GET" and headers.get("sec-fetch-site") in _ELSEWHERE:
            raise Refused(
                403,
                "a page of another site has sent this from a browser, with its user's "
                "rights: send it from the server's own page, or by a program.",
                "cross_site",
            )
        if self._open > (most := service.limits.connections):
            raise Refused(
                503,
                f"{most} requests are open, as many as may: ask again soon.",
                "busy",
                **{"Retry-After": "1"},
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > service.limits.body:
            raise too_large(service)
        posts = path.startswith("/v1/") and scope["method"] == "POST"
        if posts and not service.ready.is_set():
            raise Refused(
                503,
                f"the server compiles its programs, {service.compiled} of "
                f"{service.sizes} are done: ask again soon.",
                "not_ready",
                **{"Retry-After": "5"},
            )


def too_large(service: Service) -> Refused:
    """Makes the error of a body that is too long."""
    return Refused(
        413,
        f"the request has more than {service.limits.body:,} bytes: send a shorter "
        "text, or start the server with a larger --max_body.",
        "too_large",
    )
