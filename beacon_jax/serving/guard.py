"""What every request passes: the key, the size, readiness; headers and counters."""

import hmac
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beacon_jax.serving.errors import Refused, response
from beacon_jax.serving.service import Service

SAFE = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ID = re.compile("^/v1/memories/[^/]+")
_KEYED = ("/v1/", "/metrics")


class Guard:
    """Refuses what must not pass, and counts what is answered."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = _ID.sub("/v1/memories/{name}", scope["path"])

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
                status = message["status"]
                # Paths that are not ours are not counted one by one.
                counted = "other" if status in (404, 405) else route
                self._service.metrics.requests.labels(counted, str(status)).inc()
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            return await response(refused)(scope, receive, sent)
        await self._app(scope, receive, sent)

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
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > service.limits.body:
            raise too_large(service)
        if path.startswith("/v1/") and scope["method"] == "POST":
            if not service.ready.is_set():
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
