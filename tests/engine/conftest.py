"""Fixtures of the engine tests: a core that a test steps by hand, and engines with a thread."""

from collections.abc import AsyncIterator

import pytest

from serve.engine.engine import Engine
from tests.support.engines import endless_runner, running_engine
from tests.support.fake_runner import CoreBench, FakeRunner


@pytest.fixture
def bench() -> CoreBench:
    """A core with a fake runner."""
    return CoreBench()


@pytest.fixture
def runner() -> FakeRunner:
    """The runner of `engine`."""
    return FakeRunner()


@pytest.fixture
async def engine(runner: FakeRunner) -> AsyncIterator[Engine]:
    """An engine for short requests."""
    async with running_engine(runner) as engine:
        yield engine


@pytest.fixture
async def endless_engine() -> AsyncIterator[Engine]:
    """An engine for ENDLESS requests, two at once."""
    async with running_engine(endless_runner()) as engine:
        yield engine
