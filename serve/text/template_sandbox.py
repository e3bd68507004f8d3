"""TemplateJail: renders chat templates that come from requests, each in a process of its own that can be ended.

Jinja's sandbox keeps a template from Python's insides, but not from running for ever, nor from filling the memory: one
`'a' * 10**10` is enough. No thread could be stopped in it. So a process renders, forked from one that has all imports
ready, with limits of time, memory and output, and without the right to open a file.
"""

import json
import math
import multiprocessing
import os
import resource
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serve.text.chat_template import ChatTemplateError, render_chat

_AT_ONCE = 2  # processes: each holds a thread of those that read requests
_START_SECONDS = 30.0  # for the first one, which imports
_ESCAPED = 12  # bytes of a character in JSON at most


class TemplateBusyError(Exception):
    """As many templates are being rendered as may be; try again later."""


class TemplateJail:
    """Renders as `serve.text.chat_template.render_chat` does. Any thread may call it."""

    def __init__(self, *, seconds: float = 2.0, max_bytes: int = 256 << 20, max_characters: int = 4 << 20) -> None:
        """Limits of one template: its time, its memory, its output."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._limits = {"seconds": seconds, "max_bytes": max_bytes, "max_characters": max_characters}
        self._seconds = seconds
        self._most = _ESCAPED * max_characters + 1024
        self._places = threading.BoundedSemaphore(_AT_ONCE)

    def render(self, template: str, messages: list[dict[str, Any]], **others: Any) -> str:
        """The text. `others` are the keywords of `render_chat`.

        Raises:
            ChatTemplateError: as `render_chat` does, or a limit was reached.
            TemplateBusyError: others are being rendered. Nobody waits: a thread that does is not there for others.
        """
        arguments = json.dumps([template, messages, others | {"special_tokens": dict(others["special_tokens"])}])
        if not self._places.acquire(blocking=False):
            raise TemplateBusyError
        try:
            return self._rendered(arguments)
        finally:
            self._places.release()

    def _rendered(self, arguments: str) -> str:
        ours, theirs = self._context.Pipe(duplex=False)
        with ours:
            with theirs:
                process = self._context.Process(target=_render, args=(theirs, arguments, self._limits), daemon=True)
                process.start()
            try:
                return self._result(ours)
            finally:
                process.kill()
                process.join()
                process.close()

    def _result(self, pipe: Connection) -> str:
        try:
            if not pipe.poll(_START_SECONDS) or pipe.recv_bytes(8) != b"begun":
                raise ChatTemplateError("the chat template could not be rendered")
            if not pipe.poll(self._seconds):
                raise ChatTemplateError(f"the chat template took more than {self._seconds:g} s")
            kind, text = json.loads(pipe.recv_bytes(self._most))
        except (EOFError, OSError):
            raise ChatTemplateError("the chat template could not be rendered within its memory") from None
        if kind != "text":
            raise ChatTemplateError(text)
        return str(text)


def _render(pipe: Connection, arguments: str, limits: Mapping[str, float]) -> None:
    """What the process does."""
    template, messages, others = json.loads(arguments)
    with suppress(ChatTemplateError):  # what is imported at a first error, as long as files can be opened
        render_chat("{% if messages %}{{ raise_exception('no') }}{% endif %}", messages, **others)
    _limit(int(limits["max_bytes"]), math.ceil(limits["seconds"]) + 1)
    pipe.send_bytes(b"begun")
    try:
        text = render_chat(template, messages, **others)
        result = ["text", text]
        if len(text) > limits["max_characters"]:
            result = ["error", f"the chat template wrote more than {limits['max_characters']} characters"]
    except ChatTemplateError as error:
        starved = isinstance(error.__cause__, MemoryError)
        result = ["error", "the chat template reached its limit of memory" if starved else str(error)]
    pipe.send_bytes(json.dumps(result).encode())


def _limit(more_bytes: int, seconds: int) -> None:
    os.closerange(0, 3)  # there is nobody to talk to, and nothing to know of the server
    os.environ.clear()
    sys.argv.clear()
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGESIZE")
    for what, most in (
        (resource.RLIMIT_AS, size + more_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # those that are open stay so
    ):
        resource.setrlimit(what, (most, most))
