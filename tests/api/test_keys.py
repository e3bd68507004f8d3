"""Roles and limits of API keys."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
from openai import OpenAI, RateLimitError

from serve.api.errors import APIError
from serve.api.keys import RATE_HEADERS, ApiKeys, Key, RateLimit
from serve.api.middleware import AnswerRecord
from serve.config.api_keys import ApiKey
from tests.support.http_client import (
    COMPLETIONS,
    MODEL,
    Gate,
    Server,
    completion_body,
    error_of,
    serving,
    submitted,
)
from tests.support.listening import listening


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def keys_of(clock: Clock, **limits: Any) -> ApiKeys:
    """The key "a" of "alice" with `limits`, and "b", which has none."""
    return ApiKeys([ApiKey(name="alice", key="a", **limits), ApiKey(name="bob", key="b")], clock)


async def post(server: Server, key: str = "a", **fields: Any) -> httpx2.Response:
    return await server.post(COMPLETIONS, completion_body(**fields), **{"X-Api-Key": key})


def test_bucket_refills_within_a_minute(clock: Clock) -> None:
    limit = RateLimit("tokens", 120, clock)
    limit.take(100, "alice")
    with pytest.raises(APIError) as error:
        limit.take(50, "alice")
    assert (error.value.status, error.value.headers) == (429, {"Retry-After": "15"})
    clock.now += 14.9
    with pytest.raises(APIError):
        limit.take(50, "alice")
    clock.now += 0.1
    limit.take(50, "alice")
    clock.now += 3600
    limit.refund(1000)
    assert limit.headers["x-ratelimit-remaining-tokens"] == "120"  # never more than the limit


@pytest.mark.parametrize(
    ("used", "per_minute", "reset"),
    [(0, 10, "0s"), (10, 10, "1m0s"), (1, 10, "6s"), (1, 3000, "20ms"), (1, 40, "1.5s")],
)
def test_reset_has_openai_format(used: int, per_minute: int, reset: str, clock: Clock) -> None:
    limit = RateLimit("requests", per_minute, clock)
    limit.take(used, "alice")
    assert limit.headers == {
        "x-ratelimit-limit-requests": str(per_minute),
        "x-ratelimit-remaining-requests": str(per_minute - used),
        "x-ratelimit-reset-requests": reset,
    }


def test_replaced_limits_keep_what_was_used(clock: Clock) -> None:
    keys = keys_of(clock, requests_per_minute=10, tokens_per_minute=100)
    key = keys.find({"type": "http", "headers": [(b"x-api-key", b"a")]})
    assert key is not None
    with key.request():
        key.charge(60)
    # A key that is replaced under the same name is the same client.
    keys.replace([ApiKey(name="alice", key="new", requests_per_minute=20, tokens_per_minute=30)])
    assert keys.find({"type": "http", "headers": [(b"x-api-key", b"a")]}) is None
    key = keys.find({"type": "http", "headers": [(b"x-api-key", b"new")]})
    assert key is not None
    assert (key.headers["x-ratelimit-remaining-requests"], key.headers["x-ratelimit-remaining-tokens"]) == ("19", "0")
    assert key.headers["x-ratelimit-reset-tokens"] == "2m0s"
    keys.replace([ApiKey(name="alice", key="new")])
    assert key.headers == {}


@pytest.mark.parametrize("before", [None, 1000])
def test_tokens_are_returned_to_the_limit_that_was_charged(clock: Clock, before: int | None) -> None:
    keys = keys_of(clock, tokens_per_minute=before)
    key = keys.find({"type": "http", "headers": [(b"x-api-key", b"a")]})
    assert key is not None
    record = AnswerRecord("id", "POST", "/", api_key=key)
    record.charge(80)
    for limit in (None, 100):  # a new limit while the request runs
        keys.replace([ApiKey(name="alice", key="a", tokens_per_minute=limit)])
    key.charge(60)
    record.end("/")
    assert key.headers["x-ratelimit-remaining-tokens"] == "40"


@pytest.mark.parametrize(("roles", "status"), [(("user", "user"), 200), (("admin", "user"), 403)])
async def test_metrics_and_load_need_an_admin_key_if_there_is_one(roles: tuple[Any, Any], status: int) -> None:
    names = zip(("root", "alice"), roles, strict=True)
    async with serving(api_keys=ApiKeys([ApiKey(name=name, key=name, role=role) for name, role in names])) as server:
        for path in ("/metrics", "//load"):
            answers = [
                await server.client.get(f"http://test{path}", headers={"X-Api-Key": n}) for n in ("root", "alice")
            ]
            assert [answer.status_code for answer in answers] == [200, status]
            if status == 403:
                assert error_of(answers[1], 403)["code"] == "permission_denied"
        assert (await server.client.get("/v1/models", headers={"X-Api-Key": "alice"})).status_code == 200
        error_of(await server.client.get("/metrics"), 401)


async def test_path_with_a_line_break_is_not_found() -> None:
    """A route's regular expression matches "/metrics\\n", too, but checks of the path compare it with "/metrics"."""
    keys = ApiKeys(
        [ApiKey(name="root", key="root", role="admin"), ApiKey(name="alice", key="a", requests_per_minute=1)]
    )
    async with serving(api_keys=keys) as server:
        for path in ("/metrics", "/load", "/v1/models"):
            answer = await server.client.get(f"http://test{path}%0A", headers={"X-Api-Key": "a"})
            assert error_of(answer, 404)["code"] == "not_found"
        answer = await server.post(f"{COMPLETIONS}%0A", completion_body(), **{"X-Api-Key": "a"})
        error_of(answer, 404)
        assert (await post(server)).status_code == 200  # the first that counts


async def test_requests_per_minute(clock: Clock) -> None:
    async with serving(api_keys=keys_of(clock, requests_per_minute=2)) as server:
        for remaining in ("1", "0"):
            response = await post(server)
            assert response.status_code == 200
            assert response.headers["x-ratelimit-remaining-requests"] == remaining
        response = await post(server)
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_exceeded", "rate_limit_exceeded")
        assert "2 requests per minute of the key 'alice'" in error["message"]
        assert response.headers["retry-after"] == "30"
        assert response.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert (await server.post("/tokenize", {"prompt": "a"}, **{"X-Api-Key": "a"})).status_code == 429
        models = await server.client.get("/v1/models", headers={"X-Api-Key": "a"})  # does not count
        assert (models.status_code, models.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        other = await post(server, "b")
        assert other.status_code == 200
        assert not other.headers.keys() & set(RATE_HEADERS)
        clock.now += 30
        assert (await post(server)).status_code == 200


async def test_tokens_per_minute(clock: Clock) -> None:
    """The maximum counts until the answer has ended, then what was used."""
    async with serving(api_keys=keys_of(clock, tokens_per_minute=100)) as server:
        response = await post(server, prompt=[1] * 10, max_tokens=40, n=2)
        assert response.headers["x-ratelimit-remaining-tokens"] == "10"  # sent before the end
        assert response.json()["usage"]["total_tokens"] == 10 + 2 * 6
        response = await post(server, prompt=[1] * 10, max_tokens=69)
        error = error_of(response, 429)
        assert (error["code"], response.headers["retry-after"]) == ("rate_limit_exceeded", "1")
        assert response.headers["x-ratelimit-remaining-tokens"] == "78"
        assert (await post(server, prompt=[1] * 10, max_tokens=68)).status_code == 200


async def test_request_above_the_token_limit_never_passes(clock: Clock) -> None:
    async with serving(api_keys=keys_of(clock, tokens_per_minute=100)) as server:
        response = await post(server, prompt=[1] * 10, max_tokens=91)
        error = error_of(response, 400)  # clients do not retry it
        assert (error["code"], error["param"]) == ("tokens_above_rate_limit", "max_tokens")
        assert "101 tokens" in error["message"]
        assert response.headers["x-ratelimit-remaining-tokens"] == "100"


async def test_tokens_of_a_rejected_request_are_returned(clock: Clock) -> None:
    async with serving(api_keys=keys_of(clock, tokens_per_minute=100), max_waiting=1) as server:
        gate = server.runner.before_call = Gate("decode")
        first = asyncio.create_task(post(server, "b"))
        await gate.reached()
        assert error_of(await post(server, max_tokens=50), 429)["message"].startswith("Too many requests are waiting")
        gate.open()
        assert (await first).status_code == 200
        models = await server.client.get("/v1/models", headers={"X-Api-Key": "a"})
        assert models.headers["x-ratelimit-remaining-tokens"] == "100"


async def test_bodies_in_progress(clock: Clock) -> None:
    async with serving(api_keys=keys_of(clock, max_bodies=1)) as server:
        gate = server.runner.before_call = Gate("decode")
        first = asyncio.create_task(post(server))
        await gate.reached()
        response = await post(server)
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        assert response.headers["retry-after"] == "1"
        gate.open()
        assert (await first).status_code == 200
        assert (await post(server)).status_code == 200


async def test_priority_floor(clock: Clock) -> None:
    async with serving(api_keys=keys_of(clock, min_priority=5)) as server:
        requests = submitted(server)
        for key in ("a", "b"):
            for priority in (None, -3, 7):
                await post(server, key, priority=priority)
    assert [request.priority for request in requests] == [5, 5, 7, 0, -3, 7]


@pytest.fixture
def limited(clock: Clock) -> Iterator[str]:
    with listening(api_keys=keys_of(clock, requests_per_minute=1)) as (url, _):
        yield url


def test_openai_client_reads_the_limits(limited: str) -> None:
    with OpenAI(base_url=f"{limited}/v1", api_key="a", max_retries=0) as client:
        create = client.completions.with_raw_response.create
        assert create(model=MODEL, prompt="a").headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(RateLimitError) as error:
            create(model=MODEL, prompt="a")
    assert error.value.code == "rate_limit_exceeded"
    assert error.value.response.headers["retry-after"] == "60"


def test_failed_request_is_no_longer_in_progress(clock: Clock) -> None:
    key = Key("alice", "alice", clock)
    key.configure(ApiKey(name="alice", key="a", max_bodies=1))
    for _ in range(2):
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(RuntimeError))
            stack.enter_context(key.request())
            raise RuntimeError
