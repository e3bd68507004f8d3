"""The real server that all tests share, as clients call it."""

import pytest

from tests.support.server_process import ServerProcess
from tools.clients.printed import Expected, ask

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def base_url(server: ServerProcess) -> str:
    """What clients call the base URL: the address with /v1."""
    return f"{server.url}/v1"


@pytest.fixture(scope="session")
def expected(base_url: str) -> Expected:
    """What the examples must print."""
    return ask(base_url, MODEL)
