"""APIError: the one exception that becomes an answer, in the envelope of its API. Its text reveals no internals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

END_OF_STREAM = b"data: [DONE]\n\n"  # of chat and completions; named events need none
MAX_MESSAGE = 1000  # characters: validation must not echo a large input

_TYPES = {408: "timeout", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}
_ANTHROPIC_PATH, _RESPONSES_PATH = "/v1/messages", "/v1/responses"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


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

    def envelope(self, path: str) -> dict[str, Any]:
        """The error in the form of the API that has this path: Anthropic's, or `body`."""
        if not _is_within(path, _ANTHROPIC_PATH):
            return self.body
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        details = {"error_code": self.code, "param": self.param}
        return {"type": "error", "error": {"type": kind, "message": self.message[:MAX_MESSAGE], "details": details}}

    def response(self, path: str = "") -> Response:
        return Response(orjson.dumps(self.envelope(path)), self.status, dict(self.headers), "application/json")

    def event(self, path: str, sequence_number: int) -> bytes:
        """The end of a stream that fails after `sequence_number` events, in the form of the API that has this path."""
        named = _is_within(path, _RESPONSES_PATH)
        if named:
            detail = {"code": self.code, "message": self.message[:MAX_MESSAGE], "param": self.param}
            body: dict[str, Any] = {"type": "error", "sequence_number": sequence_number, **detail}
        else:
            body = self.envelope(path)
            named = _is_within(path, _ANTHROPIC_PATH)
        data = b"data: " + orjson.dumps(body) + b"\n\n"
        return b"event: error\n" + data if named else data + END_OF_STREAM


def _is_within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


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
