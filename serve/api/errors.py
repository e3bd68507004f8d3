"""APIError: the one exception that becomes an answer, in OpenAI's envelope. Its text reveals no internals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

MAX_MESSAGE = 1000  # characters: validation must not echo a large input

_TYPES = {408: "timeout", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}


@dataclass
class APIError(Exception):
    status: int
    message: str
    param: str | None = None  # the field, such as "messages[0].role"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message[:MAX_MESSAGE], "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(orjson.dumps(self.body), self.status, dict(self.headers), "application/json")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> APIError:
    return APIError(400, message, param, code)


def unsupported(param: str, message: str | None = None) -> APIError:
    """400 for a known field that is not implemented: ignoring it would silently change the answer."""
    return APIError(400, message or f"`{param}` is not supported yet.", param, "unsupported_parameter")


def client_gone() -> APIError:
    """499, as nginx logs a client that disconnected. It is only recorded, never sent."""
    return APIError(499, "The client closed the connection.", None, "client_gone")


def engine_error(message: str = "The engine failed on this request.") -> APIError:
    return APIError(500, message, None, "engine_error")


def shutting_down() -> APIError:
    """503 while the engine stops; another server, or this one's successor, may accept a retry."""
    return APIError(503, "The server is shutting down.", None, "engine_stopped", {"Retry-After": "2"})
