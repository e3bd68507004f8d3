"""Sampling fields, priority and cache salt, for both endpoints."""

from typing import Any

import pytest

from serve.api.errors import APIError
from serve.api.sampling_params import bad_word_ids
from serve.engine.request import SamplingParams
from tests.support.fake_runner import MAX_MODEL_LEN, expected_outcome
from tests.support.http_client import (
    BEGIN,
    END,
    VOCAB_SIZE,
    Server,
    body_of,
    byte_tokenizer,
    chat_body,
    chunks_of,
    error_of,
    serving,
    submitted,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
STREAMS = pytest.mark.parametrize("stream", [False, True])
ALL_IDS = list(range(VOCAB_SIZE))


async def tokens_of(server: Server, path: str, *, stream: bool, **fields: Any) -> list[int]:
    """The tokens of an answer of one choice."""
    response = await server.post(path, body_of(path, **fields, stream=stream, return_token_ids=True))
    if stream:
        choices = [choice for chunk in chunks_of(response) for choice in chunk["choices"]]
        return [token for choice in choices for token in choice.get("token_ids", [])]
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"presence_penalty": -2}, "presence_penalty", -2.0),
        ({"presence_penalty": 2}, "presence_penalty", 2.0),
        ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
        ({"repetition_penalty": 1.25}, "repetition_penalty", 1.25),
        ({"logit_bias": {"0": -100, "259": 100}}, "logit_bias", ((0, -100.0), (259, 100.0))),
        ({"logit_bias": {}}, "logit_bias", ()),
        ({"allowed_token_ids": [72, 72, 259]}, "allowed_token_ids", {72, 259}),
        ({"bad_words": ["ab", " c", "ab"]}, "bad_words", ((97, 98), (99,))),
        ({"bad_words": []}, "bad_words", ()),
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"stop_token_ids": ALL_IDS[:200], "min_tokens": 1}, "stop_token_ids", {*range(200), END}),
    ],
)
@PATHS
@STREAMS
async def test_sampling_field_reaches_engine(
    fresh_server: Server, path: str, stream: bool, fields: dict[str, Any], attribute: str, value: Any
) -> None:
    requests = submitted(fresh_server)
    await fresh_server.post(path, body_of(path, **fields, stream=stream, n=2))
    assert [getattr(request.params, attribute) for request in requests] == [value, value]


@PATHS
@STREAMS
async def test_priority_and_salt_shared_by_choices(fresh_server: Server, path: str, stream: bool) -> None:
    requests = submitted(fresh_server)
    await fresh_server.post(path, body_of(path, priority=-(2**31), cache_salt="ä" * 128, n=3, stream=stream))
    await fresh_server.post(path, body_of(path, stream=stream))
    assert [(request.priority, request.cache_salt) for request in requests] == [(-(2**31), "ä" * 128)] * 3 + [(0, "")]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1},
        {"repetition_penalty": 2},
        {"logit_bias": {"3": 2.5, "4": 4}},
        {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 3, "logit_bias": {"5": 1}},
    ],
)
@STREAMS
async def test_penalties_and_bias_change_choice(plain_server: Server, fields: dict[str, Any], stream: bool) -> None:
    bias = {"logit_bias": tuple((int(key), float(value)) for key, value in fields.get("logit_bias", {}).items())}
    prompt = [3, 5, 3]
    params = SamplingParams(8, temperature=0, **fields | bias)
    expected = expected_outcome(prompt, params, max_model_len=MAX_MODEL_LEN).tokens
    plain = expected_outcome(prompt, SamplingParams(8, temperature=0), max_model_len=MAX_MODEL_LEN).tokens
    assert expected != plain
    body = fields | {"prompt": prompt, "max_tokens": 8}
    assert await tokens_of(plain_server, COMPLETIONS, stream=stream, **body) == expected


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"allowed_token_ids": [*b"Hlz", END]}, [*b"Hlllz", END]),
        ({"bad_words": ["e"]}, [*b"Hfllo", END]),
        ({"bad_words": ["ll"]}, [*b"Helmo", END]),
        ({"bad_words": ["Hel"]}, [*b"Hemlo", END]),
        ({"bad_words": ["lle"]}, [*b"Hello", END]),
        ({"min_tokens": 7, "max_tokens": 7}, [*b"Hello", END + 1, END + 1]),
        ({"allowed_token_ids": [END], "max_tokens": 3}, [END]),
    ],
)
@PATHS
@STREAMS
async def test_forbidden_tokens_not_chosen(
    server: Server, path: str, stream: bool, fields: dict[str, Any], tokens: list[int]
) -> None:
    assert await tokens_of(server, path, stream=stream, **fields) == tokens


@pytest.mark.parametrize(
    ("min_tokens", "text", "stop", "tokens"),
    [(0, "H", "e", 2), (1, "H", "e", 2), (2, "He", "l", 3), (3, "Hel", "l", 4), (4, "Hello", None, 6)],
)
@PATHS
async def test_min_tokens_hold_stop_strings_back(
    server: Server, path: str, min_tokens: int, text: str, stop: str | None, tokens: int
) -> None:
    fields: dict[str, Any] = {"stop": ["e", "l"], "min_tokens": min_tokens, "return_token_ids": True}
    (choice,) = (await server.post(path, body_of(path, **fields))).json()["choices"]
    shown = choice["message"]["content"] if path == CHAT else choice["text"]
    assert (shown, choice["stop_reason"], choice["token_ids"]) == (text, stop, [*b"Hello", END][:tokens])
    assert len(await tokens_of(server, path, stream=True, stop=["e", "l"], min_tokens=min_tokens)) == tokens


async def test_logit_bias_names_every_bad_key(server: Server) -> None:
    for bias, keys in (
        ({"x": 1, "5": 1, "260": 1, "01": 1}, "keys that are not token ids below 260: 'x', '260', '01'."),
        ({"5": "1", "6": None, "7": 1}, "values that are not numbers for the keys: '5', '6'."),
        ({"5": 101, "6": -1e9, "7": 1}, "values out of the range from -100 to 100 for the keys: '5', '6'."),
    ):
        error = error_of(await server.post(COMPLETIONS, body_of(COMPLETIONS, logit_bias=bias)), 400)
        assert error["message"] == f"`logit_bias` has {keys}"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty", "decimal_above_max_value"),
        ({"presence_penalty": "1"}, "presence_penalty", "invalid_type"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "decimal_below_min_value"),
        ({"frequency_penalty": True}, "frequency_penalty", "invalid_type"),
        ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
        ({"repetition_penalty": -1}, "repetition_penalty", "decimal_below_min_value"),
        ({"repetition_penalty": 1e39}, "repetition_penalty", "decimal_above_max_value"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty", "decimal_below_min_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"260": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"01": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {" 1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": -100.5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": True}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"1": None}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"1": "2"}}, "logit_bias", "invalid_type"),
        ({"logit_bias": dict.fromkeys(map(str, range(VOCAB_SIZE + 1)), 1)}, "logit_bias", "invalid_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty_array"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "integer_below_min_value"),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids[0]", "invalid_type"),
        ({"allowed_token_ids": 5}, "allowed_token_ids", "invalid_type"),
        ({"allowed_token_ids": [END], "min_tokens": 1}, "allowed_token_ids", "invalid_value"),
        (
            {"allowed_token_ids": [1, END], "stop_token_ids": [1], "min_tokens": 1},
            "allowed_token_ids",
            "invalid_value",
        ),
        ({"allowed_token_ids": [97, 98], "bad_words": ["a", "b"]}, "allowed_token_ids", "invalid_value"),
        (
            {"allowed_token_ids": [97, END], "bad_words": ["a"], "min_tokens": 1},
            "allowed_token_ids",
            "invalid_value",
        ),
        ({"allowed_token_ids": [97, 98], "bad_words": ["aa", "bb", "ab"]}, "allowed_token_ids", "invalid_value"),
        ({"stop_token_ids": ALL_IDS, "min_tokens": 1}, "stop_token_ids", "invalid_value"),
        ({"bad_words": "a"}, "bad_words", "invalid_type"),
        ({"bad_words": ["a", 1]}, "bad_words[1]", "invalid_type"),
        ({"bad_words": ["a", ""]}, "bad_words", "invalid_value"),
        ({"bad_words": [" "]}, "bad_words", "invalid_value"),
        ({"bad_words": ["x"] * 1001}, "bad_words", "array_above_max_length"),
        ({"bad_words": ["x" * 5001, "y" * 5000]}, "bad_words", "array_above_max_length"),
        ({"bad_words": ["x" * 100_001]}, "bad_words", "string_above_max_length"),
        ({"priority": 2**31}, "priority", "integer_above_max_value"),
        ({"priority": -(2**31) - 1}, "priority", "integer_below_min_value"),
        ({"priority": 1.0}, "priority", "invalid_type"),
        ({"cache_salt": ""}, "cache_salt", "invalid_value"),
        ({"cache_salt": "x" * 129}, "cache_salt", "invalid_value"),
        ({"cache_salt": "a@b"}, "cache_salt", "invalid_value"),
        ({"cache_salt": "a/b"}, "cache_salt", "invalid_value"),
        ({"cache_salt": "a\\b"}, "cache_salt", "invalid_value"),
        ({"cache_salt": "a\0b"}, "cache_salt", "invalid_value"),
        ({"cache_salt": 5}, "cache_salt", "invalid_type"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"best_of": True}, "best_of", "invalid_type"),
    ],
)
@PATHS
@STREAMS
async def test_sampling_invalid_value(
    fresh_server: Server, path: str, stream: bool, fields: dict[str, Any], param: str, code: str
) -> None:
    error = error_of(await fresh_server.post(path, body_of(path, **fields, stream=stream)), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert fresh_server.runner.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"logit_bias": {}, "bad_words": [], "priority": 0},
        {"allowed_token_ids": ALL_IDS},
        {"stop_token_ids": ALL_IDS[:72]},
        {"cache_salt": "salt\n", "best_of": 1},
    ],
)
async def test_sampling_values_without_effect(server: Server, fields: dict[str, Any]) -> None:
    assert await tokens_of(server, COMPLETIONS, stream=False, **fields) == [*b"Hello", END]


async def test_prompt_larger_than_cache_is_error() -> None:
    """Two pages of 64 tokens are less than the context."""
    async with serving(pages=3) as server:
        for path, param in ((CHAT, "messages"), (COMPLETIONS, "prompt")):
            error = error_of(await server.post(path, body_of(path, max_tokens=127)), 400)
            assert (error["param"], error["code"]) == (param, "context_length_exceeded")
            assert "--kv-cache-memory" in error["message"]
            assert "128" in error["message"]
            error = error_of(await server.post(path, body_of(path, max_tokens=MAX_MODEL_LEN)), 400)
            assert "--kv-cache-memory" not in error["message"]
        answer = await server.complete(max_tokens=126, ignore_eos=True)
        assert answer["usage"]["total_tokens"] == 128


async def test_chat_without_max_tokens_fills_smaller_cache() -> None:
    async with serving(None, pages=3) as server:
        assert (await server.chat())["usage"]["total_tokens"] == 128
        long = {"messages": [{"role": "user", "content": "x" * 122}]}  # with its frame, 129 tokens
        error = error_of(await server.post(CHAT, chat_body(**long)), 400)
        assert "--kv-cache-memory" in error["message"]


@PATHS
async def test_usage_cached_tokens(server: Server, path: str) -> None:
    """All tokens of a prompt but its last are shared. Salts do not share."""
    text, known = "x" * 100, 106 if path == CHAT else 99
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}

    async def cached(**fields: Any) -> int:
        response = await server.post(path, body_of(path, **prompt, **fields))
        count: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert [await cached(), await cached(), await cached(max_tokens=1)] == [0, known, known]
    assert [await cached(cache_salt="a"), await cached(cache_salt="b"), await cached(cache_salt="a")] == [0, 0, known]


async def test_usage_cached_tokens_counts_prompt_once(server: Server) -> None:
    fields: dict[str, Any] = {"prompt": ["x" * 100, "y" * 130, "z"], "n": 2, "max_tokens": 1}
    await server.complete(**fields)
    assert (await server.complete(**fields))["usage"]["prompt_tokens_details"] == {"cached_tokens": 99 + 128}
    options = {"include_usage": True}
    chunks = await server.complete_stream(**fields, stream_options=options)
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 99 + 128}


@PATHS
async def test_usage_cached_tokens_in_first_chunk(server: Server, path: str) -> None:
    text, known = "x" * 100, 106 if path == CHAT else 99
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = body_of(path, **prompt, n=2, stream=True, stream_options=options)
    await server.post(path, body)
    chunks = chunks_of(await server.post(path, body))
    assert [chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in chunks] == [known] * len(chunks)


class Words:
    """A tokenizer of a few texts."""

    def __init__(self, **texts: list[int]) -> None:
        self.texts = {text.replace("_", " "): ids for text, ids in texts.items()}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.texts[text]


@pytest.mark.parametrize("word", ["cat", " cat", "\n cat"])
@pytest.mark.parametrize(
    ("bare", "spaced", "runs"),
    [
        ([1], [2], ((1,), (2,))),
        ([1, 2], [3, 2], ((1, 2), (3, 2))),
        ([1, 2], [1, 3], ((1, 2),)),  # the space is no part of the first token
        ([1], [4, 1], ((1,),)),
        ([1, 2], [3], ((1, 2),)),
    ],
)
def test_bad_words_after_space(
    word: str, bare: list[int], spaced: list[int], runs: tuple[tuple[int, ...], ...]
) -> None:
    """vLLM's rule; leading spaces of the word itself are ignored."""
    tokenizer: Any = Words(cat=bare, _cat=spaced)
    assert bad_word_ids([word, "cat"], tokenizer) == runs


def test_bad_words_special_token() -> None:
    assert bad_word_ids(["<begin>"], byte_tokenizer()) == ((BEGIN,),)


def test_bad_words_without_tokens_is_error() -> None:
    tokenizer: Any = Words(cat=[], _cat=[])
    with pytest.raises(APIError, match="without tokens"):
        bad_word_ids(["cat"], tokenizer)
