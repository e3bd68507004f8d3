"""Fields that no request model declares: those of other servers, of the other endpoint, misspelt and unknown ones."""

from typing import Any

import pytest

from serve.api.requests import ChatCompletionRequest, CompletionRequest
from serve.api.unsupported_fields import UNSUPPORTED, WITHOUT_EFFECT
from tests.support.http_client import CHAT, COMPLETIONS, Server, body_of, chat_body, completion_body, error_of

OWN_FIELDS = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
# A value of every known field that would change the answer if it were honoured.
OTHERS: dict[str, Any] = {"length_penalty": 2, "suffix": "x"}


async def refused(server: Server, path: str, body: Any) -> tuple[str | None, str | None]:
    """The param and code of a 400; also checks that the server still answers."""
    error = error_of(await server.post(path, body), 400)
    assert (await server.complete())["choices"][0]["text"] == "Hello"
    return error["param"], error["code"]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
async def test_error_unsupported_field(server: Server, name: str) -> None:
    body = completion_body(**{name: OTHERS.get(name, {"some": "value"})})
    assert await refused(server, COMPLETIONS, body) == (name, "unsupported_parameter")
    assert await refused(server, CHAT, chat_body(**{name: 0.5})) == (name, "unsupported_parameter")


async def test_unsupported_field_without_effect_accepted(server: Server) -> None:
    plain = await server.complete()
    neutral = {name: values[0] for name, values in UNSUPPORTED.items() if values}
    assert len(neutral) >= 10
    for fields in (neutral, dict.fromkeys(UNSUPPORTED)):
        assert (await server.complete(**fields))["choices"] == plain["choices"]
        await server.chat(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("stop_regex", "a+"), ("stop_regex", ["a+"]), ("min_new_tokens", 3)),
        *(("max_new_tokens", 3), ("n_predict", 3), ("n_predict", -1), ("lora_path", "a"), ("lora", [{"id": 0}])),
        *(("custom_logit_processor", "a"), ("watermarking", True), ("dry_multiplier", 0.8), ("xtc_probability", 0.5)),
        *(("mirostat", 2), ("typical_p", 0.9), ("top_n_sigma", 1), ("dynatemp_range", 0.2), ("repeat_penalty", 1.1)),
        *(("samplers", ["top_k"]), ("do_sample", False), ("watermark", True), ("adapter_id", "a"), ("truncate", 5)),
        ("functions", [{"name": "f"}]),
        *(("use_beam_search", True), ("stream_reasoning", False), ("system", "Be brief."), ("stop_sequences", ["a"])),
        *(
            ("verbosity", "low"),
            ("verbosity", "high"),
            ("options", {"num_predict": 3}),
            ("num_predict", 3),
            ("top_a", 0.2),
        ),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_error_field_of_other_servers(server: Server, path: str, field: str, value: Any) -> None:
    assert await refused(server, path, body_of(path, **{field: value})) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": []},
        {"dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "mirostat": 0, "mirostat_tau": 5.0},
        {"xtc_probability": 0.0, "xtc_threshold": 0.1, "typical_p": 1.0, "cache_prompt": False},
        {"watermarking": False, "regex": None, "stop_regex": [], "grammar": ""},
    ],
)
async def test_field_that_is_off_changes_nothing(server: Server, fields: dict[str, Any]) -> None:
    assert (await server.complete(**fields))["choices"] == (await server.complete())["choices"]
    assert (await server.chat(**fields))["choices"] == (await server.chat())["choices"]
    messages = chat_body()["messages"]
    for body in ({"prompt": "Hi"}, {"messages": messages}):
        plain, same = [(await server.post("/tokenize", body | extra)).json() for extra in ({}, fields)]
        assert same == plain


def test_field_is_in_one_table() -> None:
    assert not UNSUPPORTED.keys() & OWN_FIELDS
    assert not UNSUPPORTED.keys() & WITHOUT_EFFECT
    assert not WITHOUT_EFFECT & OWN_FIELDS


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *((CHAT, "prompt", "Hi"), (COMPLETIONS, "messages", []), (COMPLETIONS, "top_logprobs", 2)),
        *((COMPLETIONS, "max_completion_tokens", 2), (COMPLETIONS, "chat_template_kwargs", {})),
    ],
)
async def test_error_field_of_other_endpoint(server: Server, path: str, field: str, value: Any) -> None:
    assert await refused(server, path, body_of(path, **{field: value})) == (field, "unsupported_parameter")
    assert (await server.post(path, body_of(path, **{field: None}))).status_code == 200


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        *((CHAT, "temprature", "temperature"), (CHAT, "max_token", "max_tokens"), (CHAT, "maxTokens", "max_tokens")),
        *((COMPLETIONS, "topP", "top_p"), (COMPLETIONS, "stop_tokens_ids", "stop_token_ids")),
        *((COMPLETIONS, "frequency-penalty", "frequency_penalty"), (COMPLETIONS, "SEED", "seed")),
        *((CHAT, "logprob", "logprobs"), ("/tokenize", "add_special_token", "add_special_tokens")),
    ],
)
async def test_error_misspelt_field_suggests_ours(server: Server, path: str, wrong: str, right: str) -> None:
    body = {"prompt": "Hi"} if path == "/tokenize" else body_of(path)
    error = error_of(await server.post(path, body | {wrong: 1}), 400)
    assert (error["param"], error["code"]) == (wrong, "unsupported_parameter")
    assert f"did you mean `{right}`?" in error["message"]
    assert (await server.post(path, body | {wrong: None})).status_code == 200


async def test_unknown_fields_accepted_and_logged_once(fresh_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        await fresh_server.complete(flavour="mint", user="me", metadata={"a": "b"})
    assert [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()] == [
        "unknown request field 'flavour' is ignored"
    ]


async def test_unknown_fields_that_are_no_misspellings(server: Server) -> None:
    names = ("x", "id", "session", "trace_id", "model_name", "prompt_id", "token", "é", "\0", "", "x" * 10_000)
    await server.complete(**dict.fromkeys(names, 1))
    await server.complete(**{f"field {i} of many": 1 for i in range(10_000)})


def part(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "Hi", **fields}]}]


async def test_unknown_fields_of_nested_objects_are_logged_once(
    fresh_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    plain = await fresh_server.chat(messages=part())
    for _ in range(2):
        same = await fresh_server.chat(messages=part(flavour="mint", cache_control={"type": "ephemeral"}))
        assert same["choices"] == plain["choices"]
        await fresh_server.chat_stream(stream_options={"include_usage": True, "flavour": "mint", "n": None})
    assert [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()] == [
        "unknown request field 'messages[].content[].flavour' is ignored",
        "unknown request field 'stream_options.flavour' is ignored",
        "unknown request field 'stream_options.n' is ignored",
    ]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("wrong", ["include_usages", "includeUsage", "continuous_usage_stat"])
async def test_error_misspelt_field_of_stream_options(server: Server, path: str, wrong: str) -> None:
    body = body_of(path, stream=True, stream_options={wrong: True})
    assert await refused(server, path, body) == (f"stream_options.{wrong}", "unsupported_parameter")
    body["stream_options"] = {wrong: None}
    assert (await server.post(path, body)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        *(("audio", {"id": "a"}, None), ("function_call", {"name": "f"}, None), ("images", ["aGk="], [])),
        *(("partial", True, False), ("prefix", True, False)),
    ],
)
async def test_error_field_of_a_message_that_other_servers_read(
    server: Server, field: str, value: Any, neutral: Any
) -> None:
    message = {"role": "assistant", "content": "Hello"}
    body = chat_body(messages=[message | {field: value}])
    assert await refused(server, CHAT, body) == (f"messages[0].{field}", "unsupported_parameter")
    await server.chat(messages=[message | {field: neutral}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thinking", {"type": "disabled", "x": 1}),
        ("logit_bias", {"x": 1}),
    ],
)
async def test_error_unknown_field_of_an_object_that_is_refused(server: Server, field: str, value: Any) -> None:
    assert (await refused(server, CHAT, chat_body(**{field: value})))[0] == field
