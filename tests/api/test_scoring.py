"""POST /v1/score and /generative_scoring, with a model whose log-probs can be computed by hand."""

import asyncio
import math
import time
from typing import Any

import pytest

from compiled.state import MAX_REQUESTED_IDS
from serve.api.keys import ApiKeys
from serve.api.middleware import AnswerRecord
from serve.api.responses import GenerativeScoringAnswer, ScoreAnswer
from serve.config.api_keys import ApiKey
from tests.support.fake_runner import InjectedError, hidden_after
from tests.support.http_client import (
    BEGIN,
    MODEL,
    Gate,
    Server,
    alter_events,
    answered,
    error_of,
    serving,
    submitted,
)

SERVER_OPTIONS: dict[str, Any] = {"script": None}
SCORE, GENERATIVE = "/v1/score", "/generative_scoring"
BOTH = pytest.mark.parametrize("path", [SCORE, GENERATIVE])
QUERY, ITEMS, LABELS = "Is it? ", ["Yes it is", "No"], [65, 66, 70]


def body_of(**fields: Any) -> dict[str, Any]:
    return {"query": QUERY, "items": ITEMS, "label_token_ids": LABELS} | fields


def logprobs(text: str | list[int], labels: list[int]) -> list[float]:
    hidden = hidden_after(list(text.encode()) if isinstance(text, str) else text)
    return [-((label + hidden) % 7) / 8 for label in labels]


def probabilities(text: str | list[int], labels: list[int], temperature: float | None = None) -> list[float]:
    """Without a temperature, of the full vocabulary."""
    weights = [math.exp(value / (temperature or 1)) for value in logprobs(text, labels)]
    return weights if temperature is None else [weight / sum(weights) for weight in weights]


async def score(server: Server, path: str = SCORE, **fields: Any) -> Any:
    answer = answered(await server.post(path, body_of(**fields)))
    kind = ScoreAnswer if path == SCORE else GenerativeScoringAnswer
    kind.model_validate(answer)
    return answer


async def refused(server: Server, path: str, status: int = 400, **fields: Any) -> tuple[str | None, str | None]:
    error = error_of(await server.post(path, body_of(**fields)), status)
    return error["param"], error["code"]


async def test_score_is_of_the_full_vocabulary(server: Server) -> None:
    answer = await score(server)
    expected = [pytest.approx(probabilities(QUERY + item, LABELS)) for item in ITEMS]
    assert answer["scores"] == expected
    tokens = sum(len(QUERY + item) for item in ITEMS)
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert answer == {
        "object": "scoring",
        "scores": expected,
        "token_logprobs": None,
        "model": MODEL,
        "usage": usage | {"prompt_tokens_details": {"cached_tokens": 0}},
    }


@pytest.mark.parametrize("temperature", [1, 0.25, 3])
async def test_score_softmax(server: Server, temperature: float) -> None:
    answer = await score(server, apply_softmax=True, temperature=temperature, return_token_logprobs=True)
    assert answer["scores"] == [pytest.approx(probabilities(QUERY + item, LABELS, temperature)) for item in ITEMS]
    assert [sum(scores) for scores in answer["scores"]] == pytest.approx([1, 1])
    assert answer["token_logprobs"] == [logprobs(QUERY + item, LABELS) for item in ITEMS]


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"item_first": True}, [item + QUERY for item in ITEMS]),
        ({"items": "one"}, [QUERY + "one"]),
        ({"query": None}, ITEMS),
        ({"query": [1, 2], "items": [[3], []]}, [[1, 2, 3], [1, 2]]),
        ({"query": None, "items": [[3], [4, 5]]}, [[3], [4, 5]]),
        ({"query": [1], "items": [[2], [3]], "item_first": True}, [[2, 1], [3, 1]]),
        ({"items": []}, []),
    ],
)
async def test_score_prompts(server: Server, fields: dict[str, Any], prompts: list[str | list[int]]) -> None:
    answer = await score(server, **fields)
    assert answer["scores"] == [pytest.approx(probabilities(prompt, LABELS)) for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_score_labels_of_each_item(server: Server) -> None:
    answer = await score(server, label_token_ids=[[65], [66, 70]])
    expected = [probabilities(QUERY + item, ids) for item, ids in zip(ITEMS, ([65], [66, 70]), strict=True)]
    assert answer["scores"] == [pytest.approx(values) for values in expected]


async def test_generative_scoring_has_the_first_label(server: Server) -> None:
    answer = await score(server, GENERATIVE, request_id="r1")
    values = [probabilities(QUERY + item, LABELS, 1) for item in ITEMS]
    data = [{"index": i, "object": "score", "score": pytest.approx(value[0])} for i, value in enumerate(values)]
    assert answer["data"] == data
    assert (answer["id"], answer["object"], answer["model"]) == ("generative-scoring-r1", "list", MODEL)
    full = await score(server, GENERATIVE, apply_softmax=False, return_token_logprobs=True)
    for item, entry in zip(ITEMS, full["data"], strict=True):
        assert entry["probabilities"] == pytest.approx(probabilities(QUERY + item, LABELS))
        assert (entry["score"], entry["token_logprobs"]) == (entry["probabilities"][0], logprobs(QUERY + item, LABELS))


async def test_generative_scoring_temperature(server: Server) -> None:
    answer = await score(server, GENERATIVE, temperature=0.25)
    expected = [probabilities(QUERY + item, LABELS, 0.25)[0] for item in ITEMS]
    assert [entry["score"] for entry in answer["data"]] == [pytest.approx(value) for value in expected]


async def test_special_tokens_begin_the_text_or_the_query() -> None:
    async with serving(None, add_bos=True) as server:
        requests = submitted(server)
        for path, fields in (
            (SCORE, {"item_first": True}),
            (GENERATIVE, {}),
            (GENERATIVE, {"add_special_tokens": False}),
            (GENERATIVE, {"query": [1]}),
        ):
            await score(server, path, **({"items": ["a"], "query": "b"} | fields))
        prompts = [request.prompt_token_ids[:-1] for request in requests]
        assert prompts == [[BEGIN, 97, 98], [BEGIN, 98, 97], [98, 97], [1, 97]]


async def test_labels_above_the_engines_limit_are_split(fresh_server: Server) -> None:
    labels = [*range(100, 256), *range(100)]
    requests = submitted(fresh_server)
    answer = await score(fresh_server, label_token_ids=labels, items=["a"], return_token_logprobs=True)
    assert answer["token_logprobs"] == [logprobs(QUERY + "a", labels)]
    assert [len(request.params.prompt.requested_ids) for request in requests if request.params.prompt] == [
        MAX_REQUESTED_IDS,
        len(labels) - MAX_REQUESTED_IDS,
    ]
    assert answer["usage"]["prompt_tokens"] == len(QUERY) + 1


async def test_prompt_of_the_longest_length_and_one_more(server: Server) -> None:
    answer = await score(server, query=None, items=["x" * 511])
    assert answer["scores"] == [pytest.approx(probabilities("x" * 511, LABELS))]
    for path in (SCORE, GENERATIVE):
        error = error_of(await server.post(path, body_of(query="", items=["a", "x" * 512])), 400)
        assert (error["param"], error["code"]) == ("items[1]", "context_length_exceeded")
        assert "512 tokens" in error["message"]
        assert "511" in error["message"]


@BOTH
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"items": None}, ("items", "invalid_type")),
        ({"items": [1]}, ("items[0]", "invalid_type")),
        ({"items": ["a", [1]]}, ("items[1]", "invalid_type")),
        ({"items": ["a"] * 4097}, ("items", "array_above_max_length")),
        ({"query": 1}, ("query", "invalid_type")),
        ({"query": [-1]}, ("query[0]", "integer_below_min_value")),
        ({"query": "", "items": ["a", ""]}, ("items[1]", "invalid_value")),
        ({"query": [1], "items": [[2], [260]]}, ("items[1]", "invalid_value")),
        ({"label_token_ids": None}, ("label_token_ids", "invalid_type")),
        ({"label_token_ids": []}, ("label_token_ids", "empty_array")),
        ({"label_token_ids": [1, 1]}, ("label_token_ids", "invalid_value")),
        ({"label_token_ids": [260]}, ("label_token_ids", "invalid_value")),
        ({"cache_salt": "a/b"}, ("cache_salt", "invalid_value")),
        ({"apply_softmax": 1}, ("apply_softmax", "invalid_type")),
        ({"priority": "1"}, ("priority", "invalid_type")),
        ({"timeout": 0}, ("timeout", "decimal_below_min_value")),
        ({"score_extraction_token": "x"}, ("score_extraction_token", "unsupported_parameter")),
        ({"item_frist": True}, ("item_frist", "unsupported_parameter")),
        ({"query": "x" * ((4 << 20) + 1)}, ("items[0]", "context_length_exceeded")),
    ],
)
async def test_error_names_the_field(server: Server, path: str, fields: dict[str, Any], error: tuple[str, str]) -> None:
    param, code = await refused(server, path, **fields)
    if path == GENERATIVE and "query" in fields and isinstance(fields["query"], str) and len(fields["query"]) > 1000:
        error = ("query", error[1])
    assert (param, code) == error


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"label_token_ids": [[65]]}, ("label_token_ids", "invalid_value")),
        ({"label_token_ids": [[65], []]}, ("label_token_ids[1]", "empty_array")),
        ({"label_token_ids": [[65], [66, 66]]}, ("label_token_ids[1]", "invalid_value")),
        ({"query": [1]}, ("items", "invalid_type")),
        ({"items": [[1]]}, ("items", "invalid_type")),
        ({"temperature": 0}, ("temperature", "decimal_below_min_value")),
        ({"temperature": 2}, ("temperature", "invalid_value")),
        ({"temperature": 2, "apply_softmax": False}, ("temperature", "invalid_value")),
    ],
)
async def test_error_of_score(server: Server, fields: dict[str, Any], error: tuple[str, str]) -> None:
    assert await refused(server, SCORE, **fields) == error


async def test_error_too_many_scores_or_prompt_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.scoring._MAX_SCORES", 5)
    assert await refused(server, SCORE) == ("label_token_ids", "too_many_logprobs")
    assert (await score(server, items=["a"]))["scores"]
    monkeypatch.setattr("serve.api.scoring._MAX_PROMPT_TOKENS", 0)  # two contexts are always accepted
    fields: dict[str, Any] = {"query": "", "label_token_ids": [1]}
    assert (await score(server, **fields, items=["x" * 511] * 2))["scores"]
    assert await refused(server, SCORE, **fields, items=["x" * 511] * 3) == ("items", "array_above_max_length")


@BOTH
async def test_error_unknown_model(server: Server, path: str) -> None:
    assert await refused(server, path, 404, model="gpt-9") == ("model", "model_not_found")


async def test_cached_query_counts_in_usage(fresh_server: Server) -> None:
    query = "q" * 130  # two pages
    await score(fresh_server, query=query, items=["a"])
    answer = await score(fresh_server, query=query, items=["b", "c"])
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * 128
    other = await score(fresh_server, query=query, items=["b"], cache_salt="s")
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_requests_have_priority_salt_and_deadline_of_the_body() -> None:
    keys = ApiKeys([ApiKey(name="alice", key="a", min_priority=3)])
    async with serving(None, api_keys=keys, api_key=("a",), prefix_cache_per_key=True, request_timeout=60) as server:
        requests = submitted(server)
        fields = {"priority": 1, "cache_salt": "s", "timeout": 30}
        response = await server.post(SCORE, body_of(**fields), **{"X-Api-Key": "a"})
        assert response.status_code == 200
        assert {(request.priority, request.cache_salt) for request in requests} == {(3, "alice/s")}
        (deadline,) = {request.deadline for request in requests}
        assert 0 < deadline - time.monotonic() <= 30


async def test_tokens_are_charged_and_unused_ones_refunded() -> None:
    keys = ApiKeys([ApiKey(name="alice", key="a", tokens_per_minute=1000)], clock=lambda: 0.0)
    async with serving(None, api_keys=keys, api_key=("a",)) as server:
        sent = {"X-Api-Key": "a"}
        response = await server.post(SCORE, body_of(query="", items=["x" * 300]), **sent)
        assert response.headers["x-ratelimit-remaining-tokens"] == "700"
        assert error_of(await server.post(SCORE, body_of(query="", items=["x" * 400] * 2), **sent), 429)
        error = error_of(await server.post(SCORE, body_of(query="", items=["x" * 400] * 3), **sent), 400)
        assert (error["param"], error["code"]) == (None, "tokens_above_rate_limit")
        server.engine.stop()
        assert error_of(await server.post(SCORE, body_of(query="", items=["x" * 300]), **sent), 503)
        response = await server.client.get("/v1/models", headers=sent)
        assert response.headers["x-ratelimit-remaining-tokens"] == "700"


async def test_access_record_has_the_engines_work() -> None:
    records: list[AnswerRecord] = []
    async with serving(None, on_answer=records.append) as server:
        await score(server)
        error_of(await server.post(SCORE, body_of(model="x")), 404)
    work = records[0].work
    assert work is not None
    assert (records[0].handler, work.prompt_tokens, work.completion_tokens) == (SCORE, 2 * len(QUERY) + 11, 0)
    assert work.queue_seconds is not None
    assert work.prefill_seconds is not None
    assert (records[1].work, records[1].error) == (None, "model_not_found")


async def test_full_queue_refuses_only_the_first_item() -> None:
    async with serving(None, max_waiting=3) as server:
        answer = await score(server, items=[f"item {i}" for i in range(40)])
        assert len(answer["scores"]) == 40
        gate = Gate("prefill")
        server.runner.before_call = gate
        held = [asyncio.create_task(server.complete(prompt=f"held {i}", max_tokens=1)) for i in range(3)]
        await gate.reached()
        while server.engine.num_requests < 3:
            await asyncio.sleep(0)
        assert await refused(server, SCORE, 429) == (None, "rate_limit_exceeded")
        gate.open()
        await asyncio.gather(*held)
        await server.assert_idle()


async def test_items_wait_while_others_fill_the_queue() -> None:
    """A request that has started is finished, even if the queue is full of others' requests."""
    async with serving(None, max_waiting=2) as server:
        gate = Gate("score")
        server.runner.before_call = gate
        requests = submitted(server)
        scoring = asyncio.create_task(score(server, items=["a", "b", "c"]))
        await gate.reached()
        assert len(requests) == 2  # the third waits
        gate.open()
        assert len((await scoring)["scores"]) == 3
        await server.assert_idle()


async def test_disconnect_frees_the_engine(fresh_plain_server: Server) -> None:
    server, gate = fresh_plain_server, Gate("prefill")
    server.runner.before_call = gate
    task = asyncio.create_task(score(server, items=[f"item {i}" for i in range(300)]))
    await gate.reached()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.open()
    while server.engine.num_requests:
        await asyncio.sleep(0)
    await server.assert_idle()


async def test_error_of_the_engine(fresh_plain_server: Server) -> None:
    fresh_plain_server.runner.fail_once("score")
    error = error_of(await fresh_plain_server.post(SCORE, body_of()), 500)
    assert error["code"] == "engine_error"
    assert str(InjectedError("score")) not in error["message"].replace("scoring", "")
    assert (await score(fresh_plain_server))["scores"]


async def test_nan_is_an_error(fresh_plain_server: Server) -> None:
    def spoil(event: Any) -> Any:
        event.prompt_logprobs.top_logprobs[-1, 1] = math.nan
        return event

    alter_events(fresh_plain_server, spoil)
    assert error_of(await fresh_plain_server.post(SCORE, body_of()), 500)["code"] == "engine_error"


async def test_answer_above_the_memory_of_unsent_answers() -> None:
    async with serving(None, max_unsent_bytes=1 << 20) as server:
        labels = [*range(256)]
        fields: dict[str, Any] = {"items": ["a"] * 200, "label_token_ids": labels}
        assert await refused(server, SCORE, **fields) == (None, "answer_too_large")
        assert len((await score(server, **fields | {"items": ["a"] * 20}))["scores"]) == 20


async def test_models_have_cards_of_both_apis(server: Server) -> None:
    answer = answered(await server.client.get("/v1/models"))
    assert (answer["object"], [card["id"] for card in answer["data"]]) == ("list", [MODEL, "alias"])
    assert [card["name"] for card in answer["models"]] == [MODEL, "alias"]
    for card in answer["models"]:
        assert card["description"]
        assert [len(part) for part in card["release_date"].split("-")] == [4, 2, 2]
