"""The source files that a chat request passes before the engine has it: few enough to read in one sitting."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from serve.engine.client import RequestHandle
from serve.engine.request import Request
from tests.support.http_client import Server

_SERVE = Path(__file__).parents[2] / "serve"
_FOLDERS = ("api", "text")
_MAX_FILES = 12


@contextmanager
def started_functions() -> Iterator[set[tuple[str, str]]]:
    """File and name of every function of the folders that any thread starts, until the block ends."""
    monitoring, tool = sys.monitoring, sys.monitoring.PROFILER_ID
    functions: set[tuple[str, str]] = set()

    def started(code: CodeType, _: int) -> Any:
        path = Path(code.co_filename)
        if any(path.is_relative_to(_SERVE / folder) for folder in _FOLDERS):
            functions.add((str(path.relative_to(_SERVE)), code.co_qualname))
        return monitoring.DISABLE  # one call of each is enough

    monitoring.use_tool_id(tool, __name__)
    monitoring.register_callback(tool, monitoring.events.PY_START, started)
    monitoring.set_events(tool, monitoring.events.PY_START)
    monitoring.restart_events()
    try:
        yield functions
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


@pytest.mark.parametrize("stream", [False, True])
async def test_request_path_of_chat_passes_few_files(
    fresh_server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "prompt_logprobs": 1, "stop": ["x"], "stream": stream}
    chat = fresh_server.chat_stream if stream else fresh_server.chat
    await chat()  # imports and caches of a first request
    passed: set[tuple[str, str]] = set()
    admit = fresh_server.engine.admit

    def admitted(request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        passed.update(functions)
        return admit(request, bypass_limits=bypass_limits)

    monkeypatch.setattr(fresh_server.engine, "admit", admitted)
    with started_functions() as functions:
        await chat(**{name: value for name, value in fields.items() if name != "stream"})
    files = sorted({path for path, _ in passed})
    assert "api/middleware.py" in files
    assert "text/tokenizer.py" in files
    assert len(files) <= _MAX_FILES, "\n".join(f"{path}: {name}" for path, name in sorted(passed))
