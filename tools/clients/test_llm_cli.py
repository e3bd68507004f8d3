"""The command `llm`, by the example: models of extra-openai-models.yaml."""

import json
import re
from pathlib import Path

import pytest

from tools.clients.conftest import MODEL
from tools.clients.environments import python_environment, run
from tools.clients.printed import PROMPT, Expected

pytestmark = pytest.mark.clients


def test_llm_texts_and_logged_logprobs(base_url: str, expected: Expected, tmp_path: Path) -> None:
    programs = python_environment("llm")
    printed = run("examples/llm_cli.sh", base_url=base_url, home=tmp_path, programs=programs)
    parts = dict(re.findall(r"^== (\w+)\n(.*?)(?=^== |\Z)", printed, re.MULTILINE | re.DOTALL))
    assert set(parts) == {"chat", "stream", "completions", "logged"}
    assert parts["chat"] == parts["stream"] == f"{expected.chat.text}\n"
    assert expected.completions.text is not None
    generated = expected.completions.text.removeprefix(PROMPT)
    assert parts["completions"] == f"{generated}\n"
    (entry,) = json.loads(parts["logged"])
    logged = entry["response_json"]
    assert (logged["model"], logged["content"]) == (MODEL, generated)
    # The chosen token is the first of each position's; this client keeps no others' numbers.
    chosen = [next(iter(best.items())) for chunk in logged["logprobs"] for best in chunk["top_logprobs"]]
    assert chosen == expected.completions.tokens[-len(chosen) :]
    assert len(chosen) == logged["usage"]["completion_tokens"] == 4
