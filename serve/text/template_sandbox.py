"""TemplateSandbox: renders chat templates that come from requests, each in its own process.

Jinja's sandbox keeps a template away from Python's internals, but does not bound its time or memory: `'a' * 10**10` is
enough to exhaust either, and a thread that renders it cannot be stopped. So a process, forked from one that has
finished its imports, renders the template under limits of time, memory and output, and cannot open files.
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

_MAX_PROCESSES = 2  # each blocks one of the threads that read requests
_START_SECONDS = 30.0  # the first process imports modules
_MAX_JSON_BYTES = 12  # of one character: two \uXXXX escapes


class TemplateBusyError(Exception):
    """The maximum number of templates is being rendered; try again later."""


class TemplateSandbox:
    """Renders as `serve.text.chat_template.render_chat` does. Thread-safe."""

    def __init__(self, *, seconds: float = 2.0, max_bytes: int = 256 << 20, max_characters: int = 4 << 20) -> None:
        """Set the limits of one template: run time, additional memory, length of the output."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._limits = {"seconds": seconds, "max_bytes": max_bytes, "max_characters": max_characters}
        self._seconds = seconds
        self._max_result_bytes = _MAX_JSON_BYTES * max_characters + 1024
        self._processes = threading.BoundedSemaphore(_MAX_PROCESSES)

    def render(self, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
        """Render a chat. `options` are the keyword arguments of `render_chat`.

        Raises:
            ChatTemplateError: as `render_chat`, or a limit was reached.
            TemplateBusyError: the maximum number of templates is being rendered. Raised at once: a waiting thread would
                be missing elsewhere.
        """
        arguments = json.dumps([template, messages, options | {"special_tokens": dict(options["special_tokens"])}])
        if not self._processes.acquire(blocking=False):
            raise TemplateBusyError
        try:
            return self._render(arguments)
        finally:
            self._processes.release()

    def _render(self, arguments: str) -> str:
        receiver, sender = self._context.Pipe(duplex=False)
        with receiver:
            with sender:
                process = self._context.Process(
                    target=_render_process, args=(sender, arguments, self._limits), daemon=True
                )
                process.start()
            try:
                return self._result(receiver)
            finally:
                process.kill()
                process.join()
                process.close()

    def _result(self, pipe: Connection) -> str:
        try:
            if not pipe.poll(_START_SECONDS) or pipe.recv_bytes(8) != b"started":
                raise ChatTemplateError("the chat template could not be rendered")
            if not pipe.poll(self._seconds):
                raise ChatTemplateError(f"the chat template took more than {self._seconds:g} s")
            kind, text = json.loads(pipe.recv_bytes(self._max_result_bytes))
        except (EOFError, OSError):
            raise ChatTemplateError("the chat template could not be rendered within its memory") from None
        if kind != "text":
            raise ChatTemplateError(text)
        return str(text)


def _render_process(pipe: Connection, arguments: str, limits: Mapping[str, float]) -> None:
    template, messages, options = json.loads(arguments)
    with suppress(ChatTemplateError):  # trigger the imports of error handling while files can still be opened
        render_chat("{% if messages %}{{ raise_exception('no') }}{% endif %}", messages, **options)
    _limit(int(limits["max_bytes"]), math.ceil(limits["seconds"]) + 1)
    pipe.send_bytes(b"started")
    try:
        text = render_chat(template, messages, **options)
        result = ["text", text]
        if len(text) > limits["max_characters"]:
            result = ["error", f"the chat template wrote more than {limits['max_characters']} characters"]
    except ChatTemplateError as error:
        out_of_memory = isinstance(error.__cause__, MemoryError)
        result = ["error", "the chat template reached its memory limit" if out_of_memory else str(error)]
    pipe.send_bytes(json.dumps(result).encode())


def _limit(more_bytes: int, seconds: int) -> None:
    os.closerange(0, 3)  # no terminal, and below no environment of the server
    os.environ.clear()
    sys.argv.clear()
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGESIZE")
    for resource_limit, value in (
        (resource.RLIMIT_AS, size + more_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # open files stay open
    ):
        resource.setrlimit(resource_limit, (value, value))
