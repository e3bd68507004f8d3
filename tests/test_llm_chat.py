"""LLM.chat with tools and reasoning, and chat completions: the same calls, spans of tokens and log-probs."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import pytest

from model.kv_cache import PAGE_SIZE
from serve import llm as llm_module
from serve.config.engine_config import EngineConfig
from serve.jobs.chat import ChatKeywords
from serve.jobs.output import Output
from serve.jobs.results import CallArgument, ToolCall
from serve.llm import LLM
from serve.server.console import Reporter
from serve.server.startup import Loaded
from serve.text.chat import PromptError
from serve.text.output_parts import TextPart
from tests.support.http_client import ScriptedRunner, byte_tokenizer, serving
from tests.support.scoring import fake_load

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
CHAT_CONTEXT = 2048
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
THOUGHT = "<think>Hm.</think>"
PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "string"}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": PROPERTIES}}}
SHOUT = {"type": "custom", "custom": {"name": "shout", "format": {"type": "text"}}}
CHAT_TEMPLATE = (
    "{{ tools | tojson }}<tool_call></think>{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
)


@contextlib.contextmanager
def chatting(script: str) -> Iterator[LLM]:
    """An LLM whose model generates `script`, with a template of tools and reasoning."""
    runner = ScriptedRunner(script.encode(), pages=64, pages_per_row=CHAT_CONTEXT // PAGE_SIZE)
    load = fake_load(runner, context=CHAT_CONTEXT)

    def load_with_template(config: EngineConfig, reporter: Reporter) -> Loaded:
        return dataclasses.replace(load(config, reporter), tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_module, "load", load_with_template)
        with LLM() as llm:
            yield llm


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (f"{THOUGHT}Sure.\n{CALL}", {"tools": [ADD, SHOUT]}),
        (f"{CALL}\n{CALL}", {"tools": [ADD], "parallel_tool_calls": False}),
        (CALL, {"tools": [ADD, SHOUT], "tool_choice": "required"}),
        (CALL, {"tools": [ADD], "tool_choice": "none"}),
        (CALL[:40], {"tools": [ADD]}),
        ('<tool_call>\n{"name": "shout", "arguments": {"input": "Hey"}}\n</tool_call>', {"tools": [ADD, SHOUT]}),
        ("<think>abcdefghijklmnopqrst", {"thinking_token_budget": 2, "max_tokens": 22}),
        ("Yes.", {"reasoning_effort": "none"}),
        (f"{THOUGHT}Yes.", {"separate_reasoning": False}),
    ],
)
async def test_chat_divides_outputs_as_the_server(script: str, fields: dict[str, Any]) -> None:
    async with serving(script.encode(), chat_template=CHAT_TEMPLATE, max_model_len=CHAT_CONTEXT) as server:
        answer = await server.chat(messages=[USER], logprobs=True, **fields)
    (choice,) = answer["choices"]
    message = choice["message"]
    with chatting(script) as llm:
        [output] = await asyncio.to_thread(llm.chat, [USER], **fields)
        parts = Output()
        async for delta in llm.stream_chat([USER], **cast("ChatKeywords", fields)):
            parts.add(delta)
    assert answer["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
    entries = choice["logprobs"]["content"]
    assert [entry["token_id"] for entry in entries] == output.token_ids == parts.token_ids
    assert [entry["logprob"] for entry in entries] == pytest.approx(output.logprobs.tolist())
    assert (output.content or None, output.reasoning) == (message["content"] or None, message.get("reasoning"))
    assert (output.finish_reason, output.answer_start) == (choice["finish_reason"], choice.get("answer_start"))
    content = "".join(part.text for part in parts.parts if isinstance(part, TextPart) and part.kind == "content")
    assert content == output.content
    calls = message.get("tool_calls", [])
    assert [call.type for call in output.tool_calls] == [call["type"] for call in calls]
    for made, call in zip(output.tool_calls, calls, strict=True):
        inner = call[made.type]
        assert (made.name, made.arguments) == (inner["name"], inner.get("arguments", inner.get("input")))
        assert (made.tokens is None) == ("logprobs" not in call)
        if made.tokens is not None:
            spans = [{"name": item.name, **span(item)} for item in made.argument_logprobs]
            assert span(made) | {"arguments": spans} == call["logprobs"]


def span(item: ToolCall | CallArgument) -> dict[str, Any]:
    assert item.tokens is not None
    return {"start": item.tokens.start, "end": item.tokens.stop, "logprob": item.logprob}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": []}, "`tools` must contain at least one tool"),
        ({"tool_choice": "required"}, "`tool_choice` needs `tools`"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            r"^tools\[0\].function.name: String should match",
        ),
        ({"tools": [ADD], "ignore_eos": True, "tool_choice": "required"}, "`ignore_eos` cannot be combined with tools"),
        ({"tools": [ADD], "structured_outputs": {"regex": "a"}}, "`structured_outputs.regex` cannot be combined"),
        ({"thinking_token_budget": "3"}, "thinking_token_budget: Input should be a valid integer"),
    ],
)
def test_error_of_tools_and_reasoning(options: Any, message: str) -> None:
    with chatting("") as llm, pytest.raises(ValueError, match=message):
        llm.chat([USER], max_tokens=1, **options)


def test_error_of_a_tools_schema_names_it() -> None:
    bad = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}},
    }
    with chatting("") as llm, pytest.raises(PromptError) as raised:
        llm.chat([USER], tools=[ADD, bad], tool_choice="required")
    assert raised.value.param == "tools[1].function.parameters"
