"""Servers for the tests of the API: one per module, and fresh ones for tests that change its state.

A module may define SERVER_OPTIONS, the arguments of `serving`.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.http_client import Server, serving, shared_server


def _options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return getattr(request.module, "SERVER_OPTIONS", {})


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for all tests of a module that leave no trace in it."""
    with shared_server(**_options(request)) as server:
        yield server


@pytest.fixture(scope="module")
def plain_server() -> Iterator[Server]:
    """The same, with a model that computes its tokens from the prompt."""
    with shared_server(None) as server:
        yield server


@pytest.fixture
async def fresh_server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """A server for one test."""
    async with serving(**_options(request)) as server:
        yield server


@pytest.fixture
async def fresh_plain_server() -> AsyncIterator[Server]:
    """The same, with a model that computes its tokens from the prompt."""
    async with serving(None) as server:
        yield server
