"""/v1/chat/completions: response shape, log-probs, templates, finish reasons."""

import json
from typing import Any

import pytest

from serve.engine.request import SamplingParams
from tests.support.fake_runner import MAX_MODEL_LEN, K, expected_outcome
from tests.support.http_client import END, MODEL, Server, chat_body, serving

PROMPT = "user:Hi;>"


async def prompt_of(server: Server, **fields: Any) -> str:
    """The text of a request's prompt."""
    return bytes((await server.chat(**fields, return_token_ids=True))["prompt_token_ids"]).decode()


async def test_chat_answer_shape(server: Server) -> None:
    answer = await server.chat()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 6,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "prompt_token_ids": None,
        "prompt_logprobs": None,
    }


async def test_chat_logprobs_values(server: Server) -> None:
    answer = await server.chat(
        logprobs=True, top_logprobs=2, prompt_logprobs=1, return_token_ids=True, max_completion_tokens=2
    )
    (choice,) = answer["choices"]
    h = {"token": "H", "logprob": -0.1, "bytes": [72], "token_id": 72, "rank": 2}
    e = {"token": "e", "logprob": -0.2, "bytes": [101], "token_id": 101, "rank": 2}
    before_h = {"token": "I", "logprob": -0.05, "bytes": [73], "token_id": 73, "rank": 1}
    before_e = {"token": "f", "logprob": -0.1, "bytes": [102], "token_id": 102, "rank": 1}
    assert choice["logprobs"] == {
        "content": [h | {"top_logprobs": [before_h, h]}, e | {"top_logprobs": [before_e, e]}],
        "refusal": None,
    }
    assert choice["token_ids"] == [72, 101]
    assert answer["prompt_token_ids"] == list(PROMPT.encode())
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] == 9
    # After u (117) the hidden state is 118; s is 115: -(233 mod 7) / 8, rank 1 + 233 mod 5; best is token 21.
    assert answer["prompt_logprobs"][:2] == [
        None,
        {
            "115": {"logprob": -0.25, "rank": 4, "decoded_token": "s"},
            "21": {"logprob": -1.0, "rank": 1, "decoded_token": "\x15"},
        },
    ]


@pytest.mark.parametrize("k", [None, 0, 1, K])
async def test_chat_top_logprobs_exactly_k_and_sorted(server: Server, k: int | None) -> None:
    for entry in (await server.chat(logprobs=True, top_logprobs=k))["choices"][0]["logprobs"]["content"]:
        tops = entry["top_logprobs"]
        assert len(tops) == (k or 0)
        assert [top["rank"] for top in tops] == list(range(1, len(tops) + 1))
        values = [top["logprob"] for top in tops]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("max_tokens", [0, 1, 6, None])
async def test_chat_logprobs_one_entry_per_token(server: Server, max_tokens: int | None) -> None:
    answer = await server.chat(logprobs=True, return_token_ids=True, max_tokens=max_tokens)
    (choice,) = answer["choices"]
    tokens = [*b"Hello", END][:max_tokens]
    assert choice["token_ids"] == tokens
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == tokens
    assert answer["usage"]["completion_tokens"] == len(tokens)
    assert choice["message"]["content"] == "Hello"[:max_tokens]


async def test_chat_logprobs_include_stop_token(server: Server) -> None:
    end = (await server.chat(logprobs=True))["choices"][0]["logprobs"]["content"][-1]
    assert (end["token"], end["bytes"], end["logprob"]) == ("<end>", list(b"<end>"), -0.6)


async def test_chat_logprobs_equal_text_everywhere(server: Server) -> None:
    response = await server.post("/v1/chat/completions", chat_body(logprobs=True, top_logprobs=K))
    content = json.loads(response.text, parse_float=str)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == ["-0.1", "-0.2", "-0.3", "-0.4", "-0.5", "-0.6"]
    assert [entry["top_logprobs"][1]["logprob"] for entry in content] == [entry["logprob"] for entry in content]
    assert {entry["top_logprobs"][2]["logprob"] for entry in content} == {"-9999.0"}


async def test_chat_joined_bytes_are_text() -> None:
    text = "né 😊 日本"
    async with serving(text.encode()) as server:
        (choice,) = (await server.chat(logprobs=True))["choices"]
    entries = choice["logprobs"]["content"][:-1]
    assert choice["message"]["content"] == text
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    assert entries[1]["token"] == "\\xc3"


async def test_chat_split_character_appears_with_last_token(server: Server) -> None:
    answer = await server.chat(messages=[{"role": "user", "content": "é😊"}], prompt_logprobs=0, max_tokens=0)
    names = [next(iter(entry.values()))["decoded_token"] for entry in answer["prompt_logprobs"][1:]]
    assert names == ["s", "e", "r", ":", "", "é", "", "", "", "😊", ";", ">"]


async def test_chat_return_tokens_as_token_ids(server: Server) -> None:
    answer = await server.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True, prompt_logprobs=0)
    entry = answer["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["token"]) == ("token_id:72", [72], "token_id:73")
    assert answer["prompt_logprobs"][1]["115"]["decoded_token"] == "s"


async def test_chat_n_choices_share_prompt() -> None:
    async with serving(None) as server:
        answer = await server.chat(
            n=3, seed=4, temperature=1, max_tokens=5, return_token_ids=True, prompt_logprobs=0, logprobs=True
        )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        expected = expected_outcome(
            list(PROMPT.encode()), SamplingParams(5), seed=4 + choice["index"], max_model_len=MAX_MODEL_LEN
        )
        assert choice["token_ids"] == expected.tokens
        assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [row[0] for row in expected.logprobs]
        assert [entry["rank"] for entry in choice["logprobs"]["content"]] == [row[1] for row in expected.logprobs]
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["usage"]["completion_tokens"] == 15
    assert len(answer["prompt_logprobs"]) == 9


async def test_chat_without_max_tokens_fills_context() -> None:
    async with serving(None) as server:
        answer = await server.chat()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_chat_max_completion_tokens_overrides_max_tokens(server: Server) -> None:
    assert (await server.chat(max_tokens=4, max_completion_tokens=2))["usage"]["completion_tokens"] == 2
    assert (await server.chat(max_tokens=4, max_completion_tokens=0))["usage"]["completion_tokens"] == 0


async def test_chat_seed_minus_one_is_random() -> None:
    async with serving(None) as server:
        texts = {
            tuple(
                (await server.chat(seed=-1, temperature=1, max_tokens=8, return_token_ids=True))["choices"][0][
                    "token_ids"
                ]
            )
            for _ in range(8)
        }
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop", "tokens"),
    [
        ({"stop": "el"}, "H", "stop", "el", 3),
        ({"stop": ["el"], "include_stop_str_in_output": True}, "Hel", "stop", "el", 3),
        ({"stop": "lx"}, "Hello", "stop", None, 6),
        ({"stop_token_ids": [101]}, "H", "stop", 101, 2),
        ({"stop_token_ids": [101], "include_stop_str_in_output": True}, "He", "stop", 101, 2),
        ({"ignore_eos": True, "max_tokens": 8}, "Hello", "length", None, 8),
        ({"ignore_eos": True, "max_tokens": 7, "skip_special_tokens": False}, "Hello<end><end>", "length", None, 7),
    ],
)
async def test_chat_finish_reason(
    server: Server, fields: dict[str, Any], text: str, reason: str, stop: str | int | None, tokens: int
) -> None:
    answer = await server.chat(**fields, logprobs=True, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == text
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop)
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == tokens
    assert answer["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
async def test_chat_accepts_role(server: Server, role: str) -> None:
    assert await prompt_of(server, messages=[{"role": role, "content": "x"}]) == f"{role}:x;>"


async def test_chat_developer_rendered_as_system_and_logged(
    fresh_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert await prompt_of(fresh_server, messages=[{"role": "developer", "content": "x"}]) == "system:x;>"
    assert [record.getMessage()[:36] for record in caplog.records] == ["messages of the role developer are r"]


async def test_chat_history_with_tools_as_openai_writes_it() -> None:
    """An answer of a server, as a client returns it; a template that needs text, and arguments as an object."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% if 'tool_calls' in m %}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    spoken = {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        spoken | {"tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": None},
        spoken | {"tool_calls": []},
        spoken | {"refusal": "No."},
    ]
    expected = 'user:x;assistant:{"a": 1};tool:;assistant:;assistant:;'
    async with serving(chat_template=template, trust_request_chat_template=True) as server:
        assert await prompt_of(server, messages=history) == expected
        assert await prompt_of(server, messages=history, chat_template=template) == expected
        response = await server.post("/tokenize", {"messages": history})
        assert bytes(response.json()["tokens"]).decode() == expected


async def test_chat_message_parts_joined_and_extra_fields_passed(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert await prompt_of(server, messages=[{"role": "user", "content": parts, "name": "me"}]) == "user:a\nb;>"
    assert await prompt_of(server, messages=[{"role": "user", "content": ""}]) == "user:;>"


async def test_chat_template_variables(server: Server) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert await prompt_of(server, messages=messages) == "user:a;assistant:b;>"
    assert await prompt_of(server, messages=messages, add_generation_prompt=False) == "user:a;assistant:b;"
    assert await prompt_of(server, messages=messages, continue_final_message=True) == "user:a;assistant:b"
    assert await prompt_of(server, messages=messages, chat_template_kwargs={"mark": "|"}) == "user:a|assistant:b|>"


async def test_chat_template_of_server_overrides_model() -> None:
    async with serving(chat_template="{{ messages[0].content }}!") as server:
        assert await prompt_of(server) == "Hi!"


async def test_chat_add_special_tokens() -> None:
    async with serving(add_bos=True) as server:
        assert (await server.chat())["usage"]["prompt_tokens"] == 9
        assert (await server.chat(add_special_tokens=True))["usage"]["prompt_tokens"] == 10


async def test_chat_template_error_in_message(server: Server) -> None:
    body = chat_body(messages=[{"role": "user", "content": "refuse"}])
    response = await server.post("/v1/chat/completions", body)
    assert response.json()["error"]["message"] == "The chat template refused the messages: It is refused."


async def test_chat_empty_prompt_is_error() -> None:
    async with serving(chat_template="") as server:
        response = await server.post("/v1/chat/completions", chat_body())
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
