"""The soak's memory and idle checks, its traffic and its report."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import MODEL, VOCAB_SIZE, serving
from tools.soak.bad_bodies import BadBodies
from tools.soak.checks import check_status
from tools.soak.client import send
from tools.soak.fake_answers import (
    CHAT_REQUEST,
    ERROR,
    FACTS,
    ID,
    SETTINGS,
    STREAM_REQUEST,
    answer_of,
    chat_answer,
    chunks,
    metrics_of,
    reply_of_stream,
    stream_of,
)
from tools.soak.idle import IdleChecks
from tools.soak.memory import MemorySample, growth
from tools.soak.prompts import Prompts
from tools.soak.replay import (
    Comparison,
)
from tools.soak.report import add_final_checks, markdown, sections
from tools.soak.request import ClientBehavior, ServerFacts
from tools.soak.results import Results, quantile
from tools.soak.soak import MAX_P99_MS, Soak
from tools.soak.traffic import Traffic


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for fake servers to return memory."""
    monkeypatch.setattr("tools.soak.idle._SETTLE_SECONDS", 0.0)


def line(*megabytes: float, minutes: float = 2.0, begin: float = 10.0) -> list[MemorySample]:
    return [MemorySample(60 * (begin + minutes * i), 1e6 * each, 10.0) for i, each in enumerate(megabytes)]


def test_growth_fits_a_line() -> None:
    found = growth(line(100, 104, 108, 112))
    assert found is not None
    assert found.mb_per_hour == pytest.approx(120)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.hours == pytest.approx(0.1)
    found = growth(line(0, 2, 1, 3))  # by hand: slope 0.8 of a sample, rest 1.8, spread 5
    assert found is not None
    assert found.mb_per_hour == pytest.approx(0.8 * 30)
    assert found.error == pytest.approx((1.8 / 2 / 5) ** 0.5 * 30)
    assert found.lowest == pytest.approx(found.mb_per_hour - 4.30 * found.error)
    assert growth([]) is None
    assert growth(line(1, 2)) is None


def test_leaks_needs_a_significant_fast_and_large_growth() -> None:
    def leaks(*megabytes: float, minutes: float = 2.0, limit: float = 50.0) -> bool:
        found = growth(line(*megabytes, minutes=minutes))
        assert found is not None
        return found.leaks(limit)

    steady = [1000 + 4.0 * i for i in range(12)]  # 120 MB/h, for 22 minutes
    assert leaks(*steady)
    assert not leaks(*steady, limit=200)
    assert not leaks(*steady[:6])  # 20 MB in all
    assert not leaks(*(1000 + 100.0 * (i % 2) for i in range(12)))  # up and down
    assert not leaks(*(1000.0 for _ in range(12)))
    assert not leaks(*(1000 + 1.0 * i for i in range(60)))  # 30 MB/h, and 59 MB in all


def test_growth_leaves_out_the_warm_up() -> None:
    warm = line(*(500 - 50.0 * i for i in range(5)), minutes=1, begin=0)  # which take the first four minutes
    found = growth([*warm[:4], *line(1000, 1000, 1000, begin=4)])
    assert found is not None
    assert (found.mb_per_hour, found.samples) == (0, 3)
    assert growth(warm) is None


async def check(idle: IdleChecks, *, load: float = 0, counted: str = "", **values: Any) -> tuple[list[str], list[str]]:
    def server(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/load":
            return httpx2.Response(200, json={"server_load": load})
        return httpx2.Response(200, text=metrics_of(**values) + counted)

    async with httpx2.AsyncClient(base_url="http://s", transport=httpx2.MockTransport(server)) as http:
        return await idle.check(http, 1.0)


async def test_idle_checks_report_a_busy_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.soak.idle._SECONDS", 0.0)
    idle = IdleChecks()
    assert await check(idle) == ([], [])
    assert idle.samples == [MemorySample(1.0, 1e9, 16)]
    assert await check(idle, process_open_fds=20) == ([], [])
    seen: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_requests_running": 1.0}, "num_requests_running is 1 after"),
        ({"num_requests_held": 2.0}, "num_requests_held is 2 after"),
        ({"kv_cache_usage_perc": 0.01}, "kv_cache_usage_perc is 0.01 after"),
        ({"process_open_fds": 40.0}, "40 files are open, 16 before"),
        ({"process_start_time_seconds": 6.0}, "has been restarted"),
    )
    for values, message in seen:
        (wrong,), _ = await check(idle, **values)
        assert message in wrong
    assert "/load is 3" in (await check(idle, load=3))[0][0]


HTTP = "# TYPE http_requests_total counter\nhttp_requests_total"
ERRORS = "# TYPE logprobd:request_errors_total counter\nlogprobd:request_errors_total"


@pytest.mark.parametrize(
    ("fine", "failed", "name"),
    [
        (
            "",
            '# TYPE logprobd:engine_failures_total counter\nlogprobd:engine_failures_total{kind="step"} 2',
            "engine_fail",
        ),
        (HTTP + '{handler="/",status="200"} 9', HTTP + '{handler="/",status="500"} 2', "status 5xx"),
        (ERRORS + '{code="client_gone"} 9', ERRORS + '{code="engine_error"} 2', "engine errors"),
    ],
)
async def test_idle_checks_report_new_failures_once(fine: str, failed: str, name: str) -> None:
    idle = IdleChecks()
    assert await check(idle, counted=fine + "\n") == ([], [])
    wrong, (failure,) = await check(idle, counted=failed + "\n")
    assert not wrong
    assert failure.startswith("the server counted 2 more ")
    assert name in failure
    assert await check(idle, counted=failed + "\n") == ([], [])


async def test_send_reports_a_broken_connection() -> None:
    async def never(_: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(60)
        return httpx2.Response(200)

    def gone(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("gone")

    for handler, timeout, failure in ((never, 0.01, "no end after 0 s"), (gone, 9, "ReadError: gone")):
        async with httpx2.AsyncClient(base_url="http://s", transport=httpx2.MockTransport(handler)) as http:
            assert (await send(http, CHAT_REQUEST, ID, timeout)).failure == failure
    async with httpx2.AsyncClient(base_url="http://s", transport=httpx2.MockTransport(never)) as http:
        answer = await send(http, replace(CHAT_REQUEST, behavior=ClientBehavior.LEAVES_WAITING, patience=0.01), ID, 9)
    assert (answer.left, answer.failure, answer.status) == (True, None, None)


async def test_bad_bodies_get_their_status() -> None:
    facts = ServerFacts(MODEL, MAX_MODEL_LEN, K, VOCAB_SIZE, "", "")
    bodies = BadBodies(facts, Prompts(1, facts, MAX_MODEL_LEN))
    async with serving() as server:
        for number in range(300):
            request = bodies.draw(random.Random(number))
            answer = await send(server.client, request, ID, 20)
            assert list(check_status(request, answer)) == [], request
        await server.assert_idle()


def test_traffic_depends_on_seed_and_number() -> None:
    traffic, other, third = (Traffic(seed, FACTS, longest=2048, burst=50) for seed in (1, 1, 2))
    requests = [traffic.draw(number) for number in range(2000)]
    assert [request.body for request in requests] == [other.draw(number).body for number in range(2000)]
    assert requests[5].body != third.draw(5).body
    assert len({request.kind for request in requests}) == 20
    assert {request.behavior for request in requests} == set(ClientBehavior)
    assert {request.times for request in requests} == {1, 50}
    for request in requests:
        if request.generates and isinstance(request.body, dict) and "prompt" in request.body:
            prompts = (
                request.body["prompt"] if isinstance(request.body["prompt"][0], list) else [request.body["prompt"]]
            )
            assert all(isinstance(each, str) or len(each) + request.body["max_tokens"] <= 2048 for each in prompts)


def test_quantile() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(range(100), 0.99) == 99
    assert quantile(range(101), 0.99) == 99


def soak_of(results: Results, *samples: MemorySample, max_p99_ms: float = MAX_P99_MS) -> Soak:
    soak = Soak(replace(SETTINGS, max_p99_ms=max_p99_ms), FACTS)
    soak.results, soak.idle.samples = results, list(samples)
    return soak


def test_report_as_markdown() -> None:
    results = Results()
    results.count(CHAT_REQUEST, answer_of(chat_answer()))
    results.count(CHAT_REQUEST, answer_of(ERROR, 429))
    results.check("answers and log-probs", "chat, request 7", [f"wrong | {i}" for i in range(30)])
    results.tokens(STREAM_REQUEST, stream_of(chunks()), reply_of_stream())
    results.compared("scored again", Comparison(5, 0, ["x"]))
    soak = soak_of(results, *line(*(1000 + 10.0 * i for i in range(12))), max_p99_ms=1.0)
    add_final_checks(soak)
    text = markdown(list(sections(soak)))
    assert "| result | failed: 32 violations |" in text
    assert "| chat | 1 | 1 | 2 |" in text
    assert "| answers and log-probs | 1 | 30 |" in text
    assert "| memory | 12 | 1 |" in text
    assert "| latency | 1 | 1 |" in text
    assert "| differences, scored again | 1 |" in text
    assert "Violations, 20 of 32" in text
    assert text.count("wrong \\| ") == 20
    assert "secret" not in text


def test_final_checks_judge_latency() -> None:
    results = Results()
    results.between_tokens.extend([4.9] * 100 + [100.0])
    add_final_checks(soak_of(results))
    assert not results.violations
    results.between_tokens.append(5.1)  # of 102, the last but one is the p99
    add_final_checks(soak_of(results))
    assert [each.check for each in results.violations] == ["latency"]
    add_final_checks(soak_of(results, max_p99_ms=1e4))
    assert len(results.violations) == 1
    silent = Results()
    add_final_checks(soak_of(silent))
    assert not silent.violations
