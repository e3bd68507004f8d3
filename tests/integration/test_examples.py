"""Examples without a server, or without the package that they show, end with one line."""

import os
import subprocess
import sys

import pytest

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


HIDE = "import runpy, sys; sys.modules[sys.argv[1]] = None; runpy.run_path(sys.argv[2], run_name='__main__')"


@pytest.mark.parametrize(
    ("file", "module", "package"),
    [
        ("langchain_chat", "langchain_core", "langchain-openai"),
        ("litellm_completion", "litellm", "litellm"),
        ("online_chat_completion_logprobs", "openai", "openai"),
        ("responses_logprobs", "openai", "openai"),
    ],
)
def test_example_without_its_package(file: str, module: str, package: str) -> None:
    command = [sys.executable, "-c", HIDE, module, f"examples/{file}.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"{package} is not installed: pip install {package}\n"
