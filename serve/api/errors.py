"""APIError: the one exception that becomes an answer, in OpenAI's envelope. Its text never carries internals."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

from serve.text.chat import PromptError

_MAX_MESSAGE = 1000  # characters: validation must not echo a large input back

_TYPES = {408: "timeout", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}


@dataclass
class APIError(Exception):
    """What is wrong with a request, for the client that sent it."""

    status: int
    message: str
    param: str | None = None  # the field, such as "messages[0].role"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message[:_MAX_MESSAGE], "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer that carries it."""
        return Response(orjson.dumps(self.body), self.status, dict(self.headers), "application/json")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> APIError:
    """400 for a field whose value is wrong."""
    return APIError(400, message, param, code)


def unsupported(param: str, message: str | None = None) -> APIError:
    """400 for a field that we know and do not honour yet: ignoring it would change the answer silently."""
    return APIError(400, message or f"`{param}` is not supported yet.", param, "unsupported_parameter")


@contextmanager
def prompt_errors() -> Iterator[None]:
    """Convert a PromptError to the APIError of a 400."""
    try:
        yield
    except PromptError as error:
        raise invalid(error.param, str(error), error.code) from None


def client_gone() -> APIError:
    """499, the usual status in logs of a request whose client went away. Nobody reads it."""
    return APIError(499, "The client closed the connection.", None, "client_gone")


def engine_error(message: str = "The engine failed on this request.") -> APIError:
    """500 without internals."""
    return APIError(500, message, None, "engine_error")
