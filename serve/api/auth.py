"""API keys: who may ask, told apart by names that can be logged. Ray's front checks them, too: no heavy imports."""

import hashlib
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

from serve.api.errors import APIError

# The page asks for the key itself; the others say nothing but whether there is a server.
_OPEN_PATHS = re.compile(r"/|/web/.*|/health|/ping")


class ApiKeys:
    """The keys that open. Digests are compared, so that the time tells neither a key nor its length."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Without keys, everybody may ask."""
        self._digests = [(f"key{number}", _digest(key)) for number, key in enumerate(keys, 1)]

    def name_of(self, scope: Scope) -> str | None:
        """The name of the key that a request bears, `key1` for the first; None: it bears none of them."""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(key.strip())
        # All are compared, whichever it is.
        matches = [name for name, known in self._digests if hmac.compare_digest(digest, known)]
        return matches[0] if matches else None

    def refusal(self, scope: Scope, name: str | None) -> APIError | None:
        """The error for a request that bears none of the keys, where there are any and its path needs one.

        Args:
            name: of its key.
        """
        if not self._digests or name is not None or _OPEN_PATHS.fullmatch(route_path(scope)):
            return None
        if scope["method"] == "OPTIONS":  # a browser asks before it may send the key; no route answers
            return None
        return APIError(401, "The API key is missing or wrong.", None, "invalid_api_key")


def route_path(scope: Scope) -> str:
    """The path of a request, without the one under which a proxy serves this, and without double slashes."""
    return re.sub("/{2,}", "/", scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
