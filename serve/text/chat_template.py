"""Chat templates: messages to prompt text, in the sandboxed Jinja environment of `transformers`.

That environment keeps a template away from Python's internals, but does not bound its time or memory: `'a' * 10**10`
is enough to exhaust either, and a thread that renders it cannot be stopped. So `TemplateSandbox` renders templates that
come from requests in a process, forked from one that has finished its imports, under limits of time, memory and output.
"""

import json
import math
import multiprocessing
import os
import re
import resource
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

# Variables that the renderer sets itself; `tools` and `documents` may come from the request.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "messages",
        "return_assistant_tokens_mask",
        "self",
    }
)
_TESTS_NONE = re.compile(r"content\b['\"]?\]?\s+is\s+(?:not\s+)?none\b")
_LOOPS_OVER_PARTS = re.compile(r"\bin\s+\w+(\.content|\[['\"]content['\"]\])\s*%")
_MAX_ERROR = 300  # characters: some errors quote the entire chat
_MAX_PROCESSES = 2  # each blocks one of the threads that read requests
_START_SECONDS = 30.0  # the first process imports modules
_MAX_JSON_BYTES = 12  # of one character: two \uXXXX escapes


class ChatTemplateError(ValueError):
    """The messages cannot be rendered. The message is that of the template's `raise_exception`, if it called it."""


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Render a chat as `apply_chat_template(tokenize=False)` of `transformers` does.

    Args:
        template: Jinja source; compiled templates are cached by `transformers`.
        messages: dicts with "role" and usually "content", in OpenAI's form; see `_template_message`.
        special_tokens: variables of the template, such as {"bos_token": "<s>"}; `template_kwargs` override them.
        add_generation_prompt: end the text with the header of a new assistant message.
        continue_final_message: end the text inside the last message, without its end marker.

    Raises:
        ChatTemplateError: the template refuses the messages or is broken, or the arguments contradict each other.
    """
    if not messages:
        raise ChatTemplateError("messages is empty")
    if add_generation_prompt and continue_final_message:
        raise ChatTemplateError("add_generation_prompt and continue_final_message cannot both be true")
    if reserved := sorted(_RESERVED.intersection(template_kwargs or ())):
        raise ChatTemplateError(f"chat_template_kwargs may not set {reserved[0]!r}")
    variables = {**special_tokens, **(template_kwargs or {})}
    has_calls = any(message.get("tool_calls") for message in messages)
    form = _call_form(template, variables) if has_calls else _CallForm()
    chat = [_template_message(message, form) for message in messages]
    if _LOOPS_OVER_PARTS.search(template) and _reads_only_parts(template, variables):
        chat = [_with_parts(message) for message in chat]
    try:
        rendered, _ = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
    except TemplateError as error:
        raise ChatTemplateError(error.message or type(error).__name__) from error
    except Exception as error:
        # A template is a program compiled to Python: it may raise anything, MemoryError included.
        reason = str(error) or type(error).__name__
        raise ChatTemplateError(f"the chat template failed: {reason[:_MAX_ERROR]}") from error
    return str(rendered[0])


@dataclass(frozen=True, slots=True)
class _CallForm:
    """The form in which a template expects messages with calls."""

    as_text: bool = False  # arguments are JSON, not objects
    content: str | None = ""  # in place of None


def _template_message(message: Mapping[str, Any], expected: _CallForm) -> dict[str, Any]:
    """A message as templates expect it. OpenAI's form differs, and clients return its answers as they are.

    Keys whose value is None are dropped, and `tool_calls` without a call. The content of an assistant or a tool is ""
    instead of None, unless the template recognizes calls by that.
    """
    form = dict(message)
    calls = form.get("tool_calls")
    if isinstance(calls, list):
        form["tool_calls"] = [_tool_call(call, expected.as_text) for call in calls] or None
    form = {key: value for key, value in form.items() if value is not None}
    reasoning = form.get("reasoning_content", form.get("reasoning"))
    if reasoning is not None:  # templates read either name
        form |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if "content" not in form and form.get("role") in ("assistant", "tool"):
        form["content"] = expected.content if "tool_calls" in form else ""
    return form


def _tool_call(call: Any, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _tool_call(call["function"], as_text)}
    return {**call, "arguments": _arguments(call.get("arguments") or {}, as_text)}


def _arguments(value: Any, as_text: bool) -> Any:
    """Arguments as an object or as its JSON; other JSON and invalid JSON stay a string."""
    if as_text:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _reads_only_parts(template: str, variables: Mapping[str, Any]) -> bool:
    """Whether a template omits contents that are strings, as those of some multimodal models do."""

    def shows(message: dict[str, Any]) -> bool:
        with suppress(Exception):  # a template may raise anything
            texts, _ = render_jinja_template(conversations=[[message]], chat_template=template, **variables)
            return "needle" in texts[0]
        return False

    message = {"role": "user", "content": "needle"}
    return not shows(message) and shows(_with_parts(message))


def _call_form(template: str, variables: Mapping[str, Any]) -> _CallForm:
    """The form in which the template shows a call.

    Some templates, as DeepSeek's, write arguments as they are, instead of with `tojson` or one by one. Then an object
    causes an error, or is written as Python's.
    """
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": '{"needle": "x"}'}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]

    def rendered(form: _CallForm) -> str:
        chat = [_template_message(message, form) for message in messages]
        with suppress(Exception):  # a template may raise anything
            return str(render_jinja_template(conversations=[chat], chat_template=template, **variables)[0][0])
        return ""

    contents: tuple[str | None, ...] = (None, "") if _TESTS_NONE.search(template) else ("",)
    forms = [_CallForm(as_text, content) for content in contents for as_text in (False, True)]
    shown = {form: text for form in forms if "needle" in (text := rendered(form))}
    as_objects = next((form for form, text in shown.items() if not form.as_text and "'needle'" not in text), None)
    return as_objects or next((form for form in shown if form.as_text), forms[0])


class TemplateBusyError(Exception):
    """The maximum number of templates is being rendered; try again later."""


class TemplateSandbox:
    """Renders chats in processes. Thread-safe."""

    def __init__(self, *, seconds: float = 2.0, max_bytes: int = 256 << 20, max_characters: int = 4 << 20) -> None:
        """Set the limits of one template: run time, additional memory, length of the output."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._limits = {"seconds": seconds, "max_bytes": max_bytes, "max_characters": max_characters}
        self._max_result_bytes = _MAX_JSON_BYTES * max_characters + 1024
        self._processes = threading.BoundedSemaphore(_MAX_PROCESSES)

    def render(self, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
        """Render a chat. `options` are the keyword arguments of `render_chat`.

        Raises:
            ChatTemplateError: as `render_chat`, or a limit was reached.
            TemplateBusyError: the maximum number of templates is being rendered. Raised at once: a waiting thread would
                be missing elsewhere.
        """
        arguments = json.dumps([template, messages, options])
        if not self._processes.acquire(blocking=False):
            raise TemplateBusyError
        try:
            receiver, sender = self._context.Pipe(duplex=False)
            with receiver:
                with sender:
                    values = (sender, arguments, self._limits)
                    process = self._context.Process(target=_render_process, args=values, daemon=True)
                    process.start()
                try:
                    return self._result(receiver)
                finally:
                    process.kill()
                    process.join()
                    process.close()
        finally:
            self._processes.release()

    def _result(self, pipe: Connection) -> str:
        try:
            if not pipe.poll(_START_SECONDS) or pipe.recv_bytes(8) != b"started":
                raise ChatTemplateError("the chat template could not be rendered")
            if not pipe.poll(self._limits["seconds"]):
                raise ChatTemplateError(f"the chat template took more than {self._limits['seconds']:g} s")
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
    os.closerange(0, 3)  # no terminal, and below no environment of the server
    os.environ.clear()
    sys.argv.clear()
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGESIZE")
    for resource_limit, value in (
        (resource.RLIMIT_AS, size + int(limits["max_bytes"])),
        (resource.RLIMIT_CPU, math.ceil(limits["seconds"]) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # open files stay open
    ):
        resource.setrlimit(resource_limit, (value, value))
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
