"""Errors in OpenAI's form, with the status that says whose they are."""

import logging
import math

from starlette.responses import JSONResponse

from beacon_jax.core.memory import CapacityError
from beacon_jax.serving.engine import Busy, TooLong
from beacon_jax.serving.prompts import TooManyTokens
from beacon_jax.serving.protocol import BadRequest
from beacon_jax.serving.reading import Cancelled
from beacon_jax.serving.store import Full, Unknown, Unwritable

logger = logging.getLogger(__name__)
LONGEST = 1000  # characters of a message


class Refused(Exception):
    """A request that is refused for what HTTP itself says of it."""

    def __init__(self, status: int, message: str, code: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def body(error: Exception) -> tuple[int, dict, dict[str, str]]:
    """Returns status, JSON and headers of an error."""
    status, kind, code, headers = 400, "invalid_request_error", None, {}
    param = getattr(error, "param", None)
    message = str(error)
    if isinstance(error, Refused):
        status, code, headers = error.status, error.code, error.headers
        kind = {
            401: "authentication_error",
            429: "rate_limit_error",
        }.get(status, kind)
    elif isinstance(error, Busy):
        status, kind, code = 429, "rate_limit_error", "busy"
        headers = {"Retry-After": str(math.ceil(error.seconds))}
    elif isinstance(error, TooLong | TooManyTokens | CapacityError | Full):
        status, code = 413, "too_long"
    elif isinstance(error, Unknown):
        status, code, message = 404, "memory_not_found", error.args[0]
    elif isinstance(error, Unwritable):
        status, kind, code = 507, "server_error", "store_full"
    elif isinstance(error, Cancelled):
        status, code = 409, "cancelled"
    elif isinstance(error, BadRequest | ValueError | TypeError):
        code = "bad_value"
    else:
        status, kind, code = 500, "server_error", "internal"
        message = "the server has an error of its own; its log says which."
    return (
        status,
        {
            "error": {
                "message": message if len(message) <= LONGEST else message[:LONGEST],
                "type": kind,
                "param": param,
                "code": code,
            }
        },
        headers,
    )


def logged(error: Exception) -> dict:
    """Returns the JSON of an error; one that is the server's own is logged."""
    status, content, _ = body(error)
    if status == 500:
        logger.error("a request failed", exc_info=error)
    return content


def response(error: Exception) -> JSONResponse:
    """Makes the response to an error."""
    status, content, headers = body(error)
    return JSONResponse(content, status, headers)
