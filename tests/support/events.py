"""Server-sent events with names, as Responses and Anthropic's Messages send them."""

import json
from typing import Any

import httpx2

from tests.support.http_client import parse_unique


def named_events(response: httpx2.Response) -> list[Any]:
    """The events of a stream, each of which must be named by its type."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    events = []
    for part in parts:
        name, data = part.split("\n")
        event = parse_unique(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def types_of(events: list[Any]) -> list[str]:
    """The types of events, consecutive equal ones once."""
    types = [event["type"] for event in events]
    return [kind for i, kind in enumerate(types) if types[i - 1 : i] != [kind]]


def without(value: Any, *names: str) -> Any:
    """A copy of JSON without the keys `names`, at any depth."""

    def drop(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: inner for key, inner in pairs if key not in names}

    return json.loads(json.dumps(value), object_pairs_hook=drop)
