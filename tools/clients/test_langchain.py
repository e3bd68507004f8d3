"""LangChain's ChatOpenAI, by the example."""

from pathlib import Path

import pytest

from tools.clients.environments import python_environment, run
from tools.clients.printed import Expected, Section, sections

pytestmark = pytest.mark.clients


def test_langchain_logprobs_in_message_and_stream(base_url: str, expected: Expected, tmp_path: Path) -> None:
    programs = python_environment("langchain")
    printed = run("python", "examples/langchain_chat.py", base_url=base_url, home=tmp_path, programs=programs)
    usage = f"tokens: {len(expected.prompt.tokens)} of the prompt, {len(expected.chat.tokens)} generated"
    section = Section(expected.chat.text, expected.chat.tokens, [usage])
    assert sections(printed) == {"chat": section, "stream": section}
