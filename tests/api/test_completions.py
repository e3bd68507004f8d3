"""/v1/completions: response shape, several prompts, finish reasons."""

from typing import Any

import pytest

from serve.engine.request import SamplingParams
from tests.support.fake_runner import MAX_MODEL_LEN, expected_outcome
from tests.support.http_client import BEGIN, END, MODEL, Server, error_of, serving


async def choice_of(server: Server, **fields: Any) -> Any:
    """The only choice of an answer."""
    (choice,) = (await server.complete(**fields))["choices"]
    return choice


async def test_completions_answer_shape(server: Server) -> None:
    answer = await server.complete()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "text": "Hello",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "token_ids": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 6,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_completions_alias_and_fingerprint() -> None:
    async with serving(system_fingerprint="fp_1") as server:
        answer = await server.complete(model="alias")
        assert (answer["model"], answer["system_fingerprint"]) == ("alias", "fp_1")


async def test_completions_default_max_tokens_is_16(plain_server: Server) -> None:
    assert (await plain_server.complete())["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["Hi", [72, 105], ["Hi"], [[72, 105]]])
async def test_completions_prompt_forms(plain_server: Server, prompt: Any) -> None:
    choice = await choice_of(plain_server, prompt=prompt, echo=True, return_token_ids=True, max_tokens=3)
    expected = expected_outcome([72, 105], SamplingParams(3, temperature=0), max_model_len=MAX_MODEL_LEN)
    assert choice["prompt_token_ids"] == [72, 105]
    assert choice["token_ids"] == expected.tokens
    assert choice["text"] == "Hi" + bytes(expected.tokens).decode()


@pytest.mark.parametrize("seed", [0, 5, -7, 2**63 - 2])
async def test_completions_several_prompts_and_n(plain_server: Server, seed: int) -> None:
    """Choice i of a prompt uses seed + i; its index is n times the prompt's index plus i."""
    prompts = [[1, 2, 3], [4], [5, 6]]
    answer = await plain_server.complete(
        prompt=prompts, n=2, temperature=1, seed=seed, max_tokens=5, return_token_ids=True, logprobs=1
    )
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for choice in choices:
        which, number = divmod(choice["index"], 2)
        expected = expected_outcome(
            prompts[which], SamplingParams(5), seed=(seed + number) % 2**64, max_model_len=MAX_MODEL_LEN
        )
        assert choice["token_ids"] == expected.tokens
        assert choice["prompt_token_ids"] == prompts[which]
        assert choice["logprobs"]["token_logprobs"] == [row[0] for row in expected.logprobs]
    assert answer["usage"] == {
        "prompt_tokens": 6,  # each prompt once
        "completion_tokens": 30,
        "total_tokens": 36,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_completions_more_prompts_than_queue(server: Server) -> None:
    """Choices beyond the queue wait for others of the request."""
    choices = (await server.complete(prompt=["a"] * 100, max_tokens=1))["choices"]
    assert [choice["index"] for choice in choices] == list(range(100))
    assert {choice["text"] for choice in choices} == {"H"}


async def test_completions_n_with_greedy(server: Server) -> None:
    assert [choice["text"] for choice in (await server.complete(n=3))["choices"]] == ["Hello"] * 3


@pytest.mark.parametrize("temperature", [0, 1e-6])
async def test_completions_tiny_temperature_is_greedy(plain_server: Server, temperature: float) -> None:
    tokens = (await choice_of(plain_server, temperature=temperature, seed=9, return_token_ids=True))["token_ids"]
    assert tokens == expected_outcome([72, 105], SamplingParams(16, 0), max_model_len=MAX_MODEL_LEN).tokens


@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop", "tokens"),
    [
        ({}, "Hello", "stop", None, 6),
        ({"max_tokens": 5}, "Hello", "length", None, 5),
        ({"stop": "el"}, "H", "stop", "el", 3),
        ({"stop": ["xx", "lo", "llo"]}, "He", "stop", "llo", 5),
        ({"stop": "el", "include_stop_str_in_output": True}, "Hel", "stop", "el", 3),
        ({"stop": "lx"}, "Hello", "stop", None, 6),  # "l" is sent when "lx" can no longer follow
        ({"stop": "ox", "max_tokens": 5}, "Hello", "length", None, 5),
        ({"stop_token_ids": [101]}, "H", "stop", 101, 2),
        ({"stop_token_ids": [101], "include_stop_str_in_output": True}, "He", "stop", 101, 2),
        ({"stop_token_ids": [101], "stop": "Hx"}, "H", "stop", 101, 2),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "Hello<end>", "stop", None, 6),
        ({"ignore_eos": True, "max_tokens": 8}, "Hello", "length", None, 8),
        ({"ignore_eos": True, "stop_token_ids": [END]}, "Hello", "stop", END, 6),
    ],
)
async def test_completions_finish_reason(
    server: Server, fields: dict[str, Any], text: str, reason: str, stop: str | int | None, tokens: int
) -> None:
    answer = await server.complete(**fields, logprobs=1, return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, reason, stop)
    assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) == tokens
    assert answer["usage"]["completion_tokens"] == tokens
    assert choice["token_ids"] == [*b"Hello", END, END, END][:tokens]


async def test_completions_10000_stop_strings(server: Server) -> None:
    choice = await choice_of(server, stop=[chr(0x4E00 + i) for i in range(9_999)] + ["ll"])
    assert (choice["text"], choice["stop_reason"]) == ("He", "ll")


async def test_completions_min_tokens_forbids_stop_ids(plain_server: Server) -> None:
    prompt = [3, 5]  # the hidden state is 10, which is the first token
    fields = {"prompt": prompt, "stop_token_ids": [10], "return_token_ids": True}
    assert (await choice_of(plain_server, **fields))["token_ids"] == [10]
    choice = await choice_of(plain_server, **fields, min_tokens=3)
    params = SamplingParams(16, 0, min_tokens=3, stop_token_ids=frozenset((10, END)))
    expected = expected_outcome(prompt, params, max_model_len=MAX_MODEL_LEN)
    assert choice["token_ids"] == expected.tokens
    assert len(expected.tokens) > 3


async def test_completions_incomplete_character() -> None:
    async with serving("aé".encode()) as server:
        choice = await choice_of(server, max_tokens=2, logprobs=0)
    assert choice["text"] == "a\ufffd"
    assert choice["logprobs"]["tokens"] == ["a", "\\xc3"]


async def test_completions_empty_prompt_is_bos() -> None:
    async with serving(add_bos=True) as server:
        for prompt, count in (("", 1), (["", "Hi"], 2)):
            answer = await server.complete(prompt=prompt, return_token_ids=True, echo=True, logprobs=1)
            first, *others = answer["choices"]
            assert (first["prompt_token_ids"], first["text"]) == ([BEGIN], "Hello")
            assert first["logprobs"]["text_offset"][:2] == [0, 0]
            assert first["logprobs"]["token_logprobs"][0] is None
            assert len(others) == count - 1
        for empty, param in (("", "prompt"), ([], "prompt"), (["Hi", ""], "prompt[1]")):
            response = await server.post("/v1/completions", {"prompt": empty, "add_special_tokens": False})
            assert error_of(response, 400)["param"] == param
