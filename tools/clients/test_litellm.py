"""LiteLLM, by the example."""

from pathlib import Path

import pytest

from tools.clients.environments import python_environment, run
from tools.clients.printed import Expected, sections

pytestmark = pytest.mark.clients


def test_litellm_logprobs_of_all_endpoints(base_url: str, expected: Expected, tmp_path: Path) -> None:
    printed = run(
        "python",
        "examples/litellm_completion.py",
        base_url=base_url,
        home=tmp_path,
        programs=python_environment("litellm"),
        variables={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # or it asks for newer prices when it is imported
    )
    assert sections(printed) == {
        "chat": expected.chat,
        "stream": expected.chat,
        "completions": expected.completions,
    }
