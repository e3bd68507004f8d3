"""`return_routed_experts`: the experts of each token of prompt and output, in answers and streams."""

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.api.responses import RoutedExperts
from serve.engine.request import TokenEvent
from tests.api.test_tool_calls import CALL, TEMPLATE, TOOLS
from tests.support.fake_runner import ROUTING, experts_after
from tests.support.http_client import CHAT, COMPLETIONS, PATHS, Server, alter_events, body_of, error_of, serving

SERVER_OPTIONS = {"script": None, "routing": ROUTING}
PROMPT = [5, 17, 40, 3, 8]


def decoded(field: Any, start: int = 0) -> NDArray[np.int16]:
    """Ids [n, L, k] of a field that starts at a token."""
    assert RoutedExperts.model_validate(field).start == start
    assert next(iter(field)) == "data"  # clients search for it
    return np.frombuffer(base64.b64decode(field["data"]), "<i2").reshape(field["shape"])


def expected(tokens: list[int], start: int = 0) -> NDArray[np.int16]:
    """Those of all tokens but the last, which is not computed."""
    return experts_after(np.cumsum(np.asarray(tokens) + 1))[start:-1]


def fields(**others: Any) -> dict[str, Any]:
    return {"return_routed_experts": True, "return_token_ids": True, "max_tokens": 4} | others


async def test_experts_of_every_choice(server: Server) -> None:
    prompts = [PROMPT, [9] * 70]
    answer = await server.complete(**fields(prompt=prompts, n=2, temperature=1.0, seed=3))
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        prompt = prompts[choice["index"] // 2]
        tokens = [*prompt, *choice["token_ids"]]
        assert len(tokens) == len(prompt) + 4
        np.testing.assert_array_equal(decoded(choice["routed_experts"]), expected(tokens))


async def test_experts_of_a_chat(server: Server) -> None:
    answer = await server.chat(**fields())
    (choice,) = answer["choices"]
    tokens = [*answer["prompt_token_ids"], *choice["token_ids"]]
    np.testing.assert_array_equal(decoded(choice["routed_experts"]), expected(tokens))


@PATHS
async def test_streamed_experts_follow_one_another(server: Server, path: str) -> None:
    body = body_of(path, **fields(n=2))
    del body["temperature"]
    send, stream = (server.chat, server.chat_stream) if path == CHAT else (server.complete, server.complete_stream)
    whole = {choice["index"]: choice for choice in (await send(**body, seed=1))["choices"]}
    parts: dict[int, list[NDArray[np.int16]]] = {0: [], 1: []}
    for chunk in await stream(**body, seed=1):
        for choice in chunk["choices"]:
            if "routed_experts" in choice:
                own = parts[choice["index"]]
                own.append(decoded(choice["routed_experts"], sum(map(len, own))))
    for index, own in parts.items():
        assert len(own) == 4
        np.testing.assert_array_equal(np.concatenate(own), decoded(whole[index]["routed_experts"]))


async def test_streamed_experts_of_a_call() -> None:
    """Tokens that give no text have chunks, too."""
    async with serving(CALL.encode(), routing=ROUTING, chat_template=TEMPLATE) as server:
        body = {"tools": TOOLS, "return_routed_experts": True, "max_tokens": 100}
        (choice,) = (await server.chat(**body))["choices"]
        assert choice["message"]["tool_calls"]
        parts: list[NDArray[np.int16]] = []
        for chunk in await server.chat_stream(**body):
            if "routed_experts" in (streamed := chunk["choices"][0]):
                parts.append(decoded(streamed["routed_experts"], sum(map(len, parts))))
        np.testing.assert_array_equal(np.concatenate(parts), decoded(choice["routed_experts"]))


async def test_experts_end_with_the_tokens_of_a_stop_string() -> None:
    async with serving(b"Hello", routing=ROUTING) as server:
        (choice,) = (await server.complete(**fields(prompt=PROMPT, stop="ll", max_tokens=9)))["choices"]
        assert choice["token_ids"] == [*b"Hell"]
        np.testing.assert_array_equal(decoded(choice["routed_experts"]), expected([*PROMPT, *b"Hell"]))


@pytest.mark.parametrize("start", [0, 2, 4])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_experts_from_a_prompt_token_on(server: Server, start: int, max_tokens: int) -> None:
    body = fields(prompt=PROMPT, routed_experts_prompt_start=start, max_tokens=max_tokens)
    (choice,) = (await server.complete(**body))["choices"]
    if start == 4 and not max_tokens:
        assert "routed_experts" not in choice  # no token with experts is left
        return
    tokens = [*PROMPT, *choice["token_ids"]]
    np.testing.assert_array_equal(decoded(choice["routed_experts"], start), expected(tokens, start))


async def test_no_experts_unless_requested(server: Server) -> None:
    (choice,) = (await server.complete(return_routed_experts=False, routed_experts_prompt_start=0))["choices"]
    assert "routed_experts" not in choice


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"return_routed_experts": True, "routed_experts_prompt_start": 5}, "routed_experts_prompt_start", "has 5 tok"),
        ({"routed_experts_prompt_start": 1}, "routed_experts_prompt_start", "needs `return_routed_experts`"),
        ({"return_routed_experts": 1}, "return_routed_experts", "boolean"),
    ],
)
async def test_bad_fields(server: Server, body: dict[str, Any], param: str, part: str) -> None:
    error = error_of(await server.post(COMPLETIONS, {"prompt": PROMPT} | body), 400)
    assert error["param"] == param
    assert part in error["message"]


@PATHS
async def test_a_model_without_experts_refuses_the_field(plain_server: Server, path: str) -> None:
    error = error_of(await plain_server.post(path, body_of(path, return_routed_experts=True)), 400)
    assert error["param"] == "return_routed_experts"
    assert "no experts" in error["message"]


async def test_other_endpoints_refuse_the_field(server: Server) -> None:
    error = error_of(await server.post("/v1/responses", {"input": "Hi", "return_routed_experts": True}), 400)
    assert error["param"] == "return_routed_experts"


async def test_missing_experts_are_an_error(fresh_server: Server) -> None:
    def without_last(event: TokenEvent) -> TokenEvent:
        return event if event.experts is None else replace(event, experts=event.experts[:-1])

    alter_events(fresh_server, without_last)
    response = await fresh_server.post(COMPLETIONS, {"prompt": PROMPT} | fields())
    assert response.status_code == 500
    assert "experts" in response.json()["error"]["message"]
