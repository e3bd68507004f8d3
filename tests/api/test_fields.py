"""Fields beyond OpenAI's that change the prompt or the answer, and the server's defaults, for both endpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.config.generation_config import DefaultsError, GenerationDefaults, defaults_of
from tests.support.fake_runner import MAX_MODEL_LEN
from tests.support.http_client import (
    VOCAB_SIZE,
    Server,
    answered,
    chat_body,
    chunks_of,
    completion_body,
    error_of,
    serving,
    submitted,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
TEXT = list(b"user:Hi;>")
MESSAGES = [{"role": "user", "content": "Hi"}]


async def answer_of(server: Server, path: str, **fields: Any) -> Any:
    return await (server.chat if path == CHAT else server.complete)(**fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 4}, TEXT[-4:]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, TEXT[-4:]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, TEXT[:4]),
        ({"truncate_prompt_tokens": 100}, TEXT),
        ({"truncate_prompt_tokens": -1, "max_tokens": MAX_MODEL_LEN - 3}, TEXT[-3:]),
        ({"truncation_side": "right"}, TEXT),
    ],
)
@pytest.mark.parametrize("ids", [False, True])
async def test_truncate_prompt_tokens(server: Server, fields: dict[str, Any], expected: list[int], ids: bool) -> None:
    fields = {"max_tokens": 1, "return_token_ids": True, "prompt_logprobs": 0} | fields
    chat = await server.chat(**fields)
    assert chat["prompt_token_ids"] == expected
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"] == len(expected)
    prompt = TEXT if ids else bytes(TEXT).decode()
    answer = await server.complete(prompt=prompt, echo=True, logprobs=0, **fields)
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == expected
    assert choice["text"].startswith(bytes(expected).decode() + "H")
    assert len(choice["prompt_logprobs"]) == len(expected)
    assert choice["logprobs"]["text_offset"][: len(expected)] == list(range(len(expected)))


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_echo_repeats_last_assistant_message(server: Server, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh, "}]
    for given, expected in ((messages, "Oh, Hello"), (messages[:1], "Hello")):
        fields = {"messages": given, "echo": True, "continue_final_message": given is messages}
        if stream:
            chunks = await server.chat_stream(**fields)
            text = "".join(choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"])
        else:
            answer = await server.chat(**fields)
            text = answer["choices"][0]["message"]["content"]
            assert answer["prompt_logprobs"] is None
        assert text == expected


async def test_return_prompt_text(server: Server) -> None:
    assert (await server.chat(return_prompt_text=True))["prompt_text"] == "user:Hi;>"
    first, *others = await server.chat_stream(return_prompt_text=True)
    assert first["prompt_text"] == "user:Hi;>"
    assert not any("prompt_text" in chunk for chunk in others)
    assert "prompt_text" not in await server.chat()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("messages", [{}, {"messages": None}, {"messages": []}, {"messages": MESSAGES}])
async def test_prompt_token_ids_override_messages(server: Server, messages: dict[str, Any], stream: bool) -> None:
    fields = {"prompt_token_ids": [*b"Oh, ", 257], "return_token_ids": True, "return_prompt_text": True}
    body = {"temperature": 0, "prompt_logprobs": 0, "stream": stream} | fields | messages
    response = await server.post(CHAT, body)
    answer = chunks_of(response)[0] if stream else answered(response)
    assert answer["prompt_token_ids"] == fields["prompt_token_ids"]
    assert answer["prompt_text"] == "Oh, <end>"
    assert [list(entry) for entry in answer["prompt_logprobs"][1:]] == [["104"], ["44"], ["32"], ["257"]]


async def test_prompt_token_ids_truncated_and_echoed(server: Server) -> None:
    ids = {"prompt_token_ids": TEXT, "return_token_ids": True}
    assert (await server.chat(**ids, truncate_prompt_tokens=3))["prompt_token_ids"] == TEXT[-3:]
    spoken = [{"role": "assistant", "content": "Oh, "}]
    for messages, text in ((spoken, "Oh, Hello"), ([], "Hello")):
        answer = await server.chat(**ids, messages=messages, echo=True)
        assert answer["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("stream", [False, True])
async def test_invocations_chat_or_completion(server: Server, stream: bool) -> None:
    for body, kind in (
        (chat_body(), "chat.completion"),
        ({"prompt_token_ids": TEXT}, "chat.completion"),
        (completion_body(), "text_completion"),
    ):
        response = await server.post("/invocations", body | {"stream": stream})
        answer = chunks_of(response)[0] if stream else answered(response)
        assert answer["object"].removesuffix(".chunk") == kind
    assert error_of(await server.post("/invocations", {}), 400)["param"] == "messages"


async def test_chat_template_of_request_if_trusted() -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ documents[0].title }}{{ reasoning_effort }}"
    async with serving(trust_request_chat_template=True) as server:
        fields: dict[str, Any] = {"chat_template": template, "documents": [{"title": "T"}], "reasoning_effort": "low"}
        assert (await server.chat(**fields, return_prompt_text=True))["prompt_text"] == "<Hi>Tlow"
        fields["chat_template_kwargs"] = {"reasoning_effort": "high"}
        assert (await server.chat(**fields, return_prompt_text=True))["prompt_text"] == "<Hi>Thigh"
        broken = await server.post(CHAT, chat_body(chat_template="{{ messages[5].content.x }}"))
        assert error_of(broken, 400)["param"] == "messages"


@PATHS
async def test_request_id_in_body_is_answer_id(server: Server, path: str) -> None:
    answer = await answer_of(server, path, request_id="mine-7")
    assert answer["id"].endswith("-mine-7")


@PATHS
async def test_logprobs_mode_of_request(fresh_server: Server, path: str) -> None:
    requests = submitted(fresh_server)
    for mode in ("raw_logprobs", "processed_logprobs"):
        assert (await answer_of(fresh_server, path, logprobs_mode=mode))["logprobs_mode"] == mode
    assert "logprobs_mode" not in await answer_of(fresh_server, path)
    assert [request.params.processed for request in requests] == [False, True, False]
    chunks = await (fresh_server.chat_stream if path == CHAT else fresh_server.complete_stream)(
        logprobs_mode="processed_logprobs"
    )
    assert {chunk["logprobs_mode"] for chunk in chunks} == {"processed_logprobs"}


async def test_logprobs_mode_and_token_names_of_server() -> None:
    async with serving(logprobs_mode="processed_logprobs", return_tokens_as_token_ids=True) as server:
        requests = submitted(server)
        answer = await server.complete(logprobs=0, max_tokens=1)
        assert answer["logprobs_mode"] == "processed_logprobs"
        assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:72"]
        answer = await server.complete(
            logprobs=0, max_tokens=1, return_tokens_as_token_ids=False, logprobs_mode="raw_logprobs"
        )
        assert answer["choices"][0]["logprobs"]["tokens"] == ["H"]
        assert [request.params.processed for request in requests] == [True, False]


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"continuous_usage_stats": False}])
async def test_stream_usage_forced_by_server_in_every_chunk(options: dict[str, Any] | None) -> None:
    async with serving(enable_force_include_usage=True) as server:
        for stream, prompt_tokens in ((server.chat_stream, 9), (server.complete_stream, 2)):
            chunks = await stream(stream_options=options)
            assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {prompt_tokens}
            generated = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert generated == sorted(generated)
            assert generated[-1] == 6
            assert [bool(chunk["choices"]) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


async def test_response_role() -> None:
    async with serving(response_role="bard") as server:
        assert (await server.chat())["choices"][0]["message"]["role"] == "bard"
        assert (await server.chat_stream())[0]["choices"][0]["delta"]["role"] == "bard"


def columns_of(entries: list[dict[str, Any] | None], ids: list[int], start: int, k: int) -> dict[str, Any]:
    """The columns expected for these entries; the first of each entry is the token itself."""
    rows = [list(entry.items()) for entry in entries[start:] if entry is not None]
    actual = [row[0][1] for row in rows]
    tops = [sorted(row, key=lambda item: item[1]["rank"]) for row in rows]
    assert all(len(row) >= k for row in tops)
    return {
        "start": start,
        "token_ids": ids[start:],
        "logprobs": [entry["logprob"] for entry in actual],
        "ranks": [entry["rank"] for entry in actual],
    }


@PATHS
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("k", [0, 2])
async def test_prompt_logprobs_columns_equal_entries(path: str, start: int, k: int) -> None:
    async with serving(None) as server:
        fields: dict[str, Any] = {
            "prompt_logprobs": k,
            "return_token_ids": True,
            "max_tokens": 1,
            "prompt_logprobs_start": start,
        }
        fields |= {"prompt": "abcde"} if path == COMPLETIONS else {}
        entries = await answer_of(server, path, **fields)
        columns = await answer_of(server, path, **fields, prompt_logprobs_format="columns")
        if path == COMPLETIONS:
            (entries,), (columns,) = entries["choices"], columns["choices"]
        assert columns["prompt_logprobs"] is None
        actual = columns["prompt_logprobs_columns"]
        ids = entries["prompt_token_ids"]
        rest = columns_of(entries["prompt_logprobs"], ids, max(1, start), k)
        assert {name: actual[name] for name in rest} == rest
        assert [len(row) for row in actual["top_token_ids"]] == [k] * len(actual["token_ids"])
        for i, entry in enumerate(entries["prompt_logprobs"][max(1, start) :]):
            for j, token in enumerate(actual["top_token_ids"][i]):
                if token != actual["token_ids"][i]:
                    assert entry[str(token)]["logprob"] == actual["top_logprobs"][i][j]
                    assert entry[str(token)]["rank"] == actual["top_ranks"][i][j]
        stream = await (server.chat_stream if path == CHAT else server.complete_stream)(
            **fields, prompt_logprobs_format="columns"
        )
        opening = stream[0] if path == CHAT else stream[0]["choices"][0]
        assert opening["prompt_logprobs_columns"] == actual


async def test_prompt_logprobs_columns_per_prompt_and_choice() -> None:
    async with serving(None) as server:
        answer = await server.complete(
            prompt=["abc", "de"], n=2, prompt_logprob_token_ids=[5, 9], prompt_logprobs_format="columns", max_tokens=1
        )
        columns = [choice["prompt_logprobs_columns"] for choice in answer["choices"]]
        assert columns[0] == columns[1]
        assert columns[2] == columns[3]
        assert [row["token_ids"] for row in columns[::2]] == [list(b"bc"), list(b"e")]
        assert columns[0]["top_token_ids"] == [[5, 9], [5, 9]]


async def test_prompt_logprobs_columns_refuse_full_vocabulary() -> None:
    async with serving(None, full_vocab=True) as server:
        body = completion_body(prompt_logprobs=-1, prompt_logprobs_format="columns")
        assert error_of(await server.post(COMPLETIONS, body), 400)["param"] == "prompt_logprobs_format"


DEFAULTS = GenerationDefaults(
    temperature=0.7, top_p=0.8, top_k=20, min_p=0.1, repetition_penalty=1.1, frequency_penalty=0.5, max_new_tokens=3
)


@PATHS
async def test_generation_defaults_fill_unset_fields(path: str) -> None:
    async with serving(defaults=DEFAULTS) as server:
        requests = submitted(server)
        body = chat_body() if path == CHAT else completion_body()
        await server.post(path, body | {"temperature": None})
        await server.post(
            path, body | {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1.0, "min_p": 0}
        )
        default, explicit = (request.params for request in requests)
        assert (default.temperature, default.top_p, default.top_k, default.min_p) == (0.7, 0.8, 20, 0.1)
        assert (default.repetition_penalty, default.frequency_penalty) == (1.1, 0.5)
        assert (explicit.temperature, explicit.top_p, explicit.top_k, explicit.min_p, explicit.repetition_penalty) == (
            0,
            1,
            0,
            0,
            1,
        )
        assert default.max_tokens == (3 if path == CHAT else 16)
        await server.post(path, body | {"max_tokens": 9})
        assert requests[-1].params.max_tokens == 9


def test_generation_defaults_sources(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert defaults_of("auto", "{}", tmp_path) == GenerationDefaults()
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 50, "do_sample": True, "eos_token_id": [1, 2]}))
    assert defaults_of("auto", "{}", tmp_path).as_dict() == {"temperature": 0.6, "top_k": 50}
    assert defaults_of("vllm", "{}", tmp_path).as_dict() == {}
    for source in (str(tmp_path), str(file)):
        assert defaults_of(source, '{"top_k": 5}', tmp_path / "m.gguf").as_dict() == {"temperature": 0.6, "top_k": 5}


@pytest.mark.parametrize(
    ("source", "override", "text", "message"),
    [
        ("auto", "{}", "{", "not JSON"),
        ("auto", "{}", "[" * 200_000, "not JSON"),
        ("auto", "{}", "[]", "must be a JSON object"),
        ("auto", "{}", '{"temperature": 3}', "generation_config.json: temperature: Input should be less than"),
        ("auto", "{}", '{"top_k": "5"}', "top_k: Input should be a valid integer"),
        ("auto", "[1]", "{}", "--override-generation-config: must be a JSON object"),
        ("auto", "{", "{}", "--override-generation-config: not JSON"),
        ("auto", '{"min_p": 2}', "{}", "--override-generation-config: min_p"),
        ("nowhere", "{}", "{}", "--generation-config: .*nowhere: No such file"),
    ],
)
def test_generation_defaults_errors(tmp_path: Path, source: str, override: str, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(DefaultsError, match=message):
        defaults_of(source, override, tmp_path)


async def test_prompt_token_ids_outside_vocabulary(server: Server) -> None:
    body = completion_body(prompt=[VOCAB_SIZE], truncate_prompt_tokens=1)
    assert error_of(await server.post(COMPLETIONS, body), 400)["param"] == "prompt[0]"


@PATHS
async def test_request_log_if_enabled(path: str, caplog: pytest.LogCaptureFixture) -> None:
    for enabled in (True, False):
        caplog.clear()
        async with serving(enable_log_requests=enabled, max_log_len=3) as server:
            await answer_of(server, path, request_id="id-1", top_k=7)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == enabled
        if enabled:
            text = "use" if path == CHAT else "Hi"
            assert f"id-1: prompts ['{text}'], fields" in lines[0]
            assert "'top_k': 7" in lines[0]


async def test_request_log_truncates_prompt_of_ids(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(enable_log_requests=True, max_log_len=3) as server:
        await server.chat(prompt_token_ids=TEXT, request_id="id-1")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "id-1: prompts ['use'], fields" in line
    assert "prompt_token_ids" not in line


async def test_request_log_leaves_out_texts_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(enable_log_requests=True, max_log_len=0) as server:
        await server.chat(documents=[{"text": "secret"}], chat_template_kwargs={"name": "secret"})
    assert caplog.records
    assert "secret" not in caplog.text


async def test_cors_settings() -> None:
    async with serving(allowed_origins=("https://a",), allow_credentials=True) as server:
        for origin, allowed in (("https://a", "https://a"), ("https://b", None)):
            response = await server.client.get("/health", headers={"origin": origin})
            assert response.headers.get("access-control-allow-origin") == allowed
        assert response.headers["access-control-allow-credentials"] == "true"
