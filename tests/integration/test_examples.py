"""Examples without a server end with one line."""

import os
import subprocess
import sys

from tests.support.server_process import ROOT


def test_openai_example_without_a_server() -> None:
    run = subprocess.run(
        [sys.executable, "examples/online_chat_completion_logprobs.py"],
        cwd=ROOT,
        env={**os.environ, "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "no server at http://127.0.0.1:1/v1/: start one with `make serve` or set OPENAI_BASE_URL\n"
