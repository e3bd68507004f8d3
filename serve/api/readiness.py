"""Readiness: whether requests are taken. Whoever ends the process changes it; the app looks at it."""

from dataclasses import dataclass

from serve.api.errors import APIError

# Asked for again and again, by machines: they are answered while the server drains, and not waited for.
PROBES = ("/health", "/ping", "/metrics", "/load")


@dataclass(slots=True)
class Readiness:
    """One for each app."""

    draining: bool = False  # what runs may end, what comes is sent away
    running: int = 0  # requests that were let in and have not ended
    ended: int = 0  # those that have

    def refusal(self) -> APIError | None:
        """The error for a request that comes now."""
        return stopped() if self.draining else None


def stopped() -> APIError:
    """503 for a request that comes to an engine that is ending: another server may take it, or this one's successor."""
    return APIError(503, "The server is shutting down.", None, "engine_stopped", {"Retry-After": "2"})
