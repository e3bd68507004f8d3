"""openai-node, by the example: JSON.parse and the package's own reading of streams."""

import shutil
from pathlib import Path

import pytest

from tests.support.server_process import ROOT
from tools.clients.conftest import MODEL
from tools.clients.environments import node_environment, run
from tools.clients.printed import Expected, sections

pytestmark = pytest.mark.clients


def test_node_example_prints_the_servers_logprobs(base_url: str, expected: Expected, tmp_path: Path) -> None:
    # node looks for packages from where the script lies.
    script = shutil.copy(ROOT / "examples" / "openai_node.mjs", node_environment("openai_node"))
    printed = run("node", str(script), base_url=base_url, home=tmp_path)
    assert printed.startswith(f"Using model: {MODEL}\n")
    assert sections(printed) == {
        "chat": expected.chat,
        "prompt": expected.prompt,
        "stream": expected.chat,
        "completions": expected.completions,
    }
