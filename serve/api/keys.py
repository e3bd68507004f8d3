"""API keys of a running server: who sent a request, and what the limits of the key leave."""

import hmac
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import Scope

from serve.api.errors import APIError, invalid
from serve.config.api_keys import ApiKey, digest

# Paths that need no API key: the inspector, which asks its user for the key, and the probes of health.
_PUBLIC_PATHS = re.compile(r"/?|/web/.*|/health|/ready|/live|/ping")
_ADMIN_PATHS = ("/metrics", "/load")  # for keys of the role admin, if there are any
RATE_HEADERS = [
    f"x-ratelimit-{fact}-{unit}" for unit in ("requests", "tokens") for fact in ("limit", "remaining", "reset")
]

type Clock = Callable[[], float]  # seconds


class RateLimit:
    """A token bucket: up to `limit` units at once, refilled at `limit` per minute."""

    def __init__(self, unit: Literal["requests", "tokens"], limit: int, clock: Clock) -> None:
        self._unit = unit
        self._clock = clock
        self._limit = limit
        self._available = float(limit)  # at `_time`; below 0 after the limit was lowered
        self._time = clock()

    def resize(self, limit: int) -> None:
        """Change the limit; what was used stays used."""
        self._refill()
        self._available += limit - self._limit
        self._limit = limit

    def take(self, amount: int, client: str) -> None:
        """Take `amount` units.

        Raises:
            APIError: 429, they are not available yet; 400, they never are.
        """
        self._refill()
        rule = f"{self._limit} {self._unit} per minute of the key {client!r}"
        if amount > self._limit:
            message = f"The request may use {amount} tokens, of prompts and outputs, above the limit of {rule}."
            raise invalid("max_tokens", message, "tokens_above_rate_limit")
        if amount > self._available:
            seconds = math.ceil((amount - self._available) * 60 / self._limit)
            raise _exceeded(f"The limit of {rule} is reached. Try again in {seconds} s.", seconds)
        self._available -= amount

    def refund(self, amount: int) -> None:
        """Return units that were taken and not used."""
        self._refill()
        self._available = min(self._available + amount, self._limit)

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's headers."""
        self._refill()
        return {
            f"x-ratelimit-limit-{self._unit}": str(self._limit),
            f"x-ratelimit-remaining-{self._unit}": str(max(0, int(self._available))),
            f"x-ratelimit-reset-{self._unit}": _duration((self._limit - self._available) * 60 / self._limit),
        }

    def _refill(self) -> None:
        now = self._clock()
        self._available = min(self._available + (now - self._time) * self._limit / 60, self._limit)
        self._time = now


class Key:
    """A key: its role, and what its client uses of its limits."""

    def __init__(self, name: str, owner: str, clock: Clock) -> None:
        self.name = name
        self.owner = owner  # identifies the client after a restart, too
        self.is_admin = False
        self._clock = clock
        self._requests: RateLimit | None = None
        self._tokens: RateLimit | None = None
        self._max_bodies: int | None = None
        self._min_priority: int | None = None
        self._bodies = 0  # requests with a body that are in progress

    def configure(self, entry: ApiKey) -> None:
        """Apply an entry of the key file; what was used of a limit stays used."""
        self.is_admin = entry.role == "admin"
        self._max_bodies, self._min_priority = entry.max_bodies, entry.min_priority
        self._requests = self._resized("requests", self._requests, entry.requests_per_minute)
        self._tokens = self._resized("tokens", self._tokens, entry.tokens_per_minute)

    def _resized(
        self, unit: Literal["requests", "tokens"], current: RateLimit | None, limit: int | None
    ) -> RateLimit | None:
        if limit is None:
            return None
        if current is None:
            return RateLimit(unit, limit, self._clock)
        current.resize(limit)
        return current

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request with a body, which is in progress until the block ends.

        Raises:
            APIError: 429, a limit is reached.
        """
        if self._max_bodies is not None and self._bodies >= self._max_bodies:
            raise _exceeded(f"The key {self.name!r} has {self._bodies} requests in progress, its maximum.", 1)
        if self._requests is not None:
            self._requests.take(1, self.name)
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1

    def charge(self, tokens: int) -> RateLimit | None:
        """Count tokens of a request before it runs, and return the limit that has them if there is one.

        Raises APIError as `RateLimit.take`.
        """
        if self._tokens is not None:
            self._tokens.take(tokens, self.name)
        return self._tokens

    def priority(self, requested: int) -> int:
        """The priority of a request: not before the key's floor. Lower numbers run first."""
        return requested if self._min_priority is None else max(requested, self._min_priority)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of its responses about its limits."""
        limits = [limit.headers for limit in (self._requests, self._tokens) if limit is not None]
        return {name: value for headers in limits for name, value in headers.items()}


class ApiKeys:
    """The accepted API keys. SHA-256 digests are compared, so timing reveals neither a key nor its length."""

    def __init__(self, keys: Sequence[str | ApiKey], clock: Clock = time.monotonic) -> None:
        """Accept `keys`, of which a string has no limits; without keys, every request is accepted."""
        self._clock = clock
        self._names: dict[bytes, str] = {}  # of all keys without an entry since the start
        self._by_name: dict[str, Key] = {}  # all since the start: a key that returns has its counters
        self.replace(keys)

    def replace(self, keys: Sequence[str | ApiKey]) -> None:
        """Accept `keys` instead. A key keeps its name, which no other key gets: cached prompts may belong to it."""
        self._keys: list[tuple[bytes, Key]] = []
        for key in keys:
            entry = key if isinstance(key, ApiKey) else None
            hashed = digest(key) if isinstance(key, str) else key.digest
            name = self._names.setdefault(hashed, f"key{len(self._names) + 1}") if entry is None else entry.name
            owner = f"sha256:{hashed.hex()}" if entry is None else name  # no name has a colon
            known = self._by_name.setdefault(name, Key(name, owner, self._clock))
            if entry is not None:
                known.configure(entry)
            self._keys.append((hashed, known))
        self.required = bool(self._keys)
        self._has_admin = any(key.is_admin for _, key in self._keys)

    def find(self, scope: Scope) -> Key | None:
        """The request's key: a bearer token, or the value of X-Api-Key; None without a valid key."""
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = [token] if scheme.lower() == "bearer" else []
        sent += headers.getlist("x-api-key")[:1]
        digests = [digest(key.strip()) for key in sent]
        # Compare with every key: stopping at the match would reveal its index.
        matches = [key for hashed in digests for known, key in self._keys if hmac.compare_digest(hashed, known)]
        return matches[0] if matches else None

    def check(self, method: str, path: str, key: Key | None) -> None:
        """Check that a request may be answered, if keys are required; `key` is the result of `find`.

        Raises:
            APIError: 401, it needs a key; 403, it needs a key of the role admin.
        """
        if _PUBLIC_PATHS.fullmatch(path):
            return
        if method == "OPTIONS":  # a CORS preflight carries no key, and no route answers it
            return
        if key is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "The API key is missing or invalid.", None, "invalid_api_key", headers)
        if self._has_admin and path in _ADMIN_PATHS and not key.is_admin:
            raise APIError(403, f"{path} needs an API key of the role admin.", None, "permission_denied")


def _exceeded(message: str, seconds: int) -> APIError:
    return APIError(429, message, None, "rate_limit_exceeded", {"Retry-After": str(seconds)})


def _duration(seconds: float) -> str:
    """A duration as in OpenAI's headers: "6m0s", "1s", "20ms"; rounded up to milliseconds."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
