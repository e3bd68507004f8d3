"""The real server that all tests share, as clients call it."""

import pytest

from tests.clients.printed import Expected, ask
from tests.serve.server_process import ServerProcess

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def base_url(server: ServerProcess) -> str:
    """What clients call the base URL: the address with /v1."""
    return f"{server.url}/v1"


@pytest.fixture(scope="session")
def expected(base_url: str) -> Expected:
    """What the examples must print."""
    return ask(base_url, MODEL)
