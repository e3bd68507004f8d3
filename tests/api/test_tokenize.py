"""/tokenize, /detokenize and /tokenizer_info."""

from typing import Any

import pytest

from tests.support.fake_runner import MAX_MODEL_LEN
from tests.support.http_client import (
    BEGIN,
    END,
    TEMPLATE,
    TWIN,
    VOCAB_SIZE,
    Server,
    answered,
    chat_body,
    error_of,
)

SERVER_OPTIONS: dict[str, Any] = {"add_bos": True}


async def tokenized(server: Server, **fields: Any) -> Any:
    return answered(await server.post("/tokenize", fields))


async def test_tokenize_text_as_completions(server: Server) -> None:
    answer = await tokenized(server, prompt="Hié")
    assert answer == {
        "count": 5,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [BEGIN, *"Hié".encode()],
        "token_strs": None,
    }
    used = (await server.complete(prompt="Hié", return_token_ids=True))["choices"][0]["prompt_token_ids"]
    assert answer["tokens"] == used
    bare = await tokenized(server, prompt="Hi", add_special_tokens=False, return_token_strs=True, model="alias")
    assert (bare["tokens"], bare["token_strs"]) == (list(b"Hi"), ["H", "i"])
    assert (await tokenized(server, prompt="", add_special_tokens=False))["tokens"] == []
    assert (await tokenized(server, prompt="<end> ", return_token_strs=True))["token_strs"] == ["<begin>", "<end>", "Ġ"]


async def test_tokenize_chat_as_chat_completions(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"mark": "!"}}):
        answer = await tokenized(server, messages=messages, **fields)
        assert (
            answer["tokens"]
            == (await server.chat(messages=messages, **fields, return_token_ids=True))["prompt_token_ids"]
        )
        assert answer["count"] == len(answer["tokens"])


async def test_tokenize_round_trip(server: Server) -> None:
    ids = [BEGIN, *"né 😊".encode(), END]
    assert answered(await server.post("/detokenize", {"tokens": ids})) == {"prompt": "<begin>né 😊<end>"}
    assert answered(await server.post("/detokenize", {"tokens": []})) == {"prompt": ""}
    assert answered(await server.post("/detokenize", {"tokens": [0xF0]})) == {"prompt": "\ufffd"}


async def test_detokenize_token_bytes(server: Server) -> None:
    ids = [BEGIN, *"é".encode(), TWIN]
    answer = answered(await server.post("/detokenize", {"tokens": ids, "return_token_bytes": True}))
    assert answer == {"prompt": "<begin>é\\xff", "token_bytes": [[*b"<begin>"], [0xC3], [0xA9], [*b"\\xff"]]}


async def test_tokenizer_info(server: Server) -> None:
    info = answered(await server.client.get("/tokenizer_info"))
    assert info == {
        "bos_token": "<begin>",
        "eos_token": "<end>",
        "pad_token": None,
        "tokenizer_class": "GPT2TokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token_ids": [END],
        "special_token_ids": [BEGIN, END],
        "model_max_length": MAX_MODEL_LEN,
        "vocab_size": VOCAB_SIZE,
    }


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": 5}, "prompt", "invalid_type"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "invalid_type"),
        ("/tokenize", {"messages": []}, "messages", "empty_array"),
        ("/tokenize", {"messages": [{"role": "user", "content": "refuse"}]}, "messages", "invalid_value"),
        ("/tokenize", {"messages": [{"role": "user"}], "tools": [1]}, "tools[0]", "invalid_type"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs", "invalid_type"),
        ("/tokenize", b"[", None, "invalid_json"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": "ab"}, "tokens", "invalid_type"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]", "invalid_type"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "integer_below_min_value"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens", "invalid_value"),
    ],
)
async def test_tokenize_error_names_field(server: Server, path: str, body: Any, param: str | None, code: str) -> None:
    error = error_of(await server.post(path, body), 400)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_tokenize_unknown_model(server: Server, path: str) -> None:
    body = {"prompt": "a", "tokens": [1], "model": "gpt-9"}
    assert error_of(await server.post(path, body), 404)["param"] == "model"


async def test_tokenize_text_too_long(server: Server) -> None:
    text = "x" * ((4 << 20) + 1)
    for body, param in (
        ({"prompt": text}, "prompt"),
        (chat_body(messages=[{"role": "user", "content": text}]), "messages"),
    ):
        error = error_of(await server.post("/tokenize", body), 400)
        assert (error["param"], error["code"]) == (param, "string_above_max_length")


async def test_detokenize_too_many_ids(server: Server) -> None:
    error = error_of(await server.post("/detokenize", {"tokens": [1] * ((1 << 20) + 1)}), 400)
    assert (error["param"], error["code"]) == ("tokens", "array_above_max_length")
