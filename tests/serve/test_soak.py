"""The soak: every check of it can fail, and a short one passes against a real server."""

import asyncio
import copy
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from serve.own_server import OwnServer, own_server
from serve.soak.__main__ import _complaints, main
from serve.soak.again import (
    Comparison,
    Original,
    Pool,
    Sample,
    ask_to_repeat,
    ask_to_score,
    compare_replies,
    compare_scores,
)
from serve.soak.answers import Reply, Scored
from serve.soak.ask import CHAT, COMPLETIONS, Ask, Manner, ServerFacts
from serve.soak.bad_bodies import BadBodies
from serve.soak.checks import check_scored, check_status, checked_reply
from serve.soak.client import Answer, connect, send
from serve.soak.idle import Idle
from serve.soak.memory import Resident, growth
from serve.soak.prompts import Prompts
from serve.soak.report import judge, markdown, sections
from serve.soak.soak import Settings, Soak
from serve.soak.tally import Tally, quantile
from serve.soak.traffic import Traffic
from tests.serve.fake_runner import MAX_MODEL_LEN, K
from tests.serve.http_client import MODEL, VOCAB_SIZE, serving
from tests.serve.server_process import ServerProcess

ID = "soak-1-7"
FACTS = ServerFacts("m", 2048, 20, 1000, "fp_jax0.12_cpu_bfloat16", "0.2.0")
SETTINGS = Settings("http://s", 1, 60.0, None, 2, 4, None, 10.0, None)

CHAT_ASK = Ask(
    "chat",
    CHAT,
    {
        "messages": [{"role": "user", "content": "a secret"}],
        "temperature": 0,
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "prompt_logprobs": 1,
        "stop": ["stop"],
    },
)
TEXT_ASK = Ask(
    "completion", COMPLETIONS, {"prompt": [[5, 6], [7]], "seed": 1, "max_tokens": 1, "logprobs": 2, "echo": True}
)


def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"token": "x", "logprob": logprob, "bytes": [120], "token_id": token_id, "rank": rank}


def chat_entry(token_id: int) -> dict[str, Any]:
    return entry(token_id, -0.5, 1) | {"top_logprobs": [entry(token_id, -0.5, 1), entry(token_id + 1, -1.5, 2)]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    told = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return told | {"prompt_tokens_details": {"cached_tokens": 0}}


def prompt_entries(ids: list[int]) -> list[dict[str, Any] | None]:
    """The best is token 3; the rank of others is above what is shown."""
    best = {"3": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}}
    return [None, *({str(token): {"logprob": -4.0, "rank": 9, "decoded_token": "x"}} | best for token in ids[1:])]


def chat_answer() -> dict[str, Any]:
    """What CHAT_ASK may be told."""
    return {
        "id": f"chatcmpl-{ID}",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": FACTS.fingerprint,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "xx", "refusal": None},
                "logprobs": {"content": [chat_entry(11), chat_entry(12)], "refusal": None},
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": [11, 12],
            }
        ],
        "usage": usage(3, 2),
        "prompt_token_ids": [5, 6, 7],
        "prompt_logprobs": prompt_entries([5, 6, 7]),
    }


def text_choice(index: int, prompt: list[int]) -> dict[str, Any]:
    best = {"x": -4.0, "y": -0.1, "z": -2.5}
    own = {"a": -0.5, "b": -1.5}
    later = len(prompt) - 1
    return {
        "index": index,
        "text": "xx",
        "logprobs": {
            "tokens": [*("x" for _ in prompt), "a"],
            "token_logprobs": [None, *(-4.0 for _ in range(later)), -0.5],
            "top_logprobs": [None, *(best for _ in range(later)), own],
            "top_token_ids": [None, *([3, 4] for _ in range(later)), [11, 12]],
            "text_offset": list(range(len(prompt) + 1)),
        },
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_token_ids": prompt,
        "token_ids": [11],
        "prompt_logprobs": [
            entry and entry | {"4": {"logprob": -2.5, "rank": 2, "decoded_token": "x"}}
            for entry in prompt_entries(prompt)
        ],
    }


def text_answer() -> dict[str, Any]:
    """What TEXT_ASK may be told."""
    header = {"id": f"cmpl-{ID}", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": "f"}
    return header | {"choices": [text_choice(0, [5, 6]), text_choice(1, [7])], "usage": usage(3, 2)}


def answer_of(payload: object, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """An answer as a client keeps it."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    told = {"x-request-id": ID, "content-type": "application/json", **headers}
    return Answer(ID, 0.0, status, told, [(1.0, body)])


def wrong_with(ask: Ask, payload: object) -> list[str]:
    return checked_reply(ask, answer_of(payload))[1]


def changed(payload: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The payload with another value at a path such as "choices.0.text"."""
    copied = copy.deepcopy(payload)
    at: Any = copied
    *steps, last = path.split(".")
    for step in steps:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[int(last) if isinstance(at, list) else last] = value
    return copied


def test_right_answers_have_nothing_wrong() -> None:
    assert wrong_with(CHAT_ASK, chat_answer()) == []
    assert wrong_with(TEXT_ASK, text_answer()) == []


CONTENT = "choices.0.logprobs.content"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("id", "chatcmpl-other", "id is not the request's"),
        ("usage", usage(3, 3), "usage tells"),
        ("usage", usage(3, 2) | {"prompt_tokens_details": {"cached_tokens": 4}}, "4 of 3 prompt tokens"),
        ("usage", None, "another shape: usage"),
        ("choices", [], "the choices are [], not 1"),
        ("prompt_token_ids", [], "prompt's ids are missing"),
        ("choices.0.token_ids", [11], "2 log-probs of 1 tokens"),
        ("choices.0.token_ids", [11, 13], "log-probs of 2 tokens, or of others"),
        ("choices.0.finish_reason", "eos", "another shape: choices.0.finish_reason"),
        ("choices.0.message.content", "x stop x", "holds a stop string"),
        ("choices.0.stop_reason", "end", "none of the stop strings"),
        (f"{CONTENT}.1.logprob", 0.5, "another shape"),
        (f"{CONTENT}.1.logprob", None, "another shape"),
        (f"{CONTENT}.1.rank", 0, "another shape"),
        (f"{CONTENT}.1.rank", 2, "temperature 0 has chosen rank 2"),
        (f"{CONTENT}.1.logprob", -0.6, "among the alternatives (-0.5, 1)"),
        (f"{CONTENT}.1.top_logprobs", [entry(12, -0.5, 1)], "1 alternatives instead of 2"),
        (f"{CONTENT}.1.top_logprobs.1", entry(12, -1.5, 2), "2 alternatives instead of 2, or others"),
        (f"{CONTENT}.1.top_logprobs.1", entry(13, -0.4, 2), "rank 1 has log-prob -0.5, rank 2 has -0.4"),
        (f"{CONTENT}.1.top_logprobs.1", entry(13, -0.6, 2), "a probability above 1"),
        (f"{CONTENT}.1.top_logprobs.1", entry(13, -1.5, 3), "not 1, 2, 3"),
        ("prompt_logprobs", None, "prompt_logprobs are missing"),
        ("prompt_logprobs", prompt_entries([5, 6]), "2 prompt_logprobs of 3 tokens"),
        ("prompt_logprobs", prompt_entries([5, 6, 8]), "of 3 tokens, or of others"),
        ("prompt_logprobs.1.6", {"logprob": -0.05, "rank": 9, "decoded_token": "x"}, "prompt token 1: rank 1 has"),
        ("prompt_logprobs.1.6", {"logprob": -4.0, "rank": 1, "decoded_token": "x"}, "or a rank twice"),
        ("prompt_logprobs.2.3.rank", 2, "not 1, 2, 3"),
    ],
)
def test_what_is_wrong_with_a_chat_is_told(path: str, value: object, told: str) -> None:
    wrong = wrong_with(CHAT_ASK, changed(chat_answer(), path, value))
    assert any(told in each for each in wrong), wrong
    assert "secret" not in str(wrong)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("choices.1.index", 2, "the choices are [0, 2], not 2"),
        ("choices.0.logprobs", None, "log-probs of 3 tokens"),
        ("choices.0.logprobs.tokens", ["x"], "several lengths"),
        ("choices.0.logprobs.text_offset", [0, 2, 1], "text_offset goes back"),
        ("choices.0.logprobs.token_logprobs.2", -0.6, "among the alternatives (-0.5, 1)"),
        ("choices.0.logprobs.token_logprobs.1", -4.5, "an echo and prompt_logprobs tell different numbers"),
        ("choices.0.logprobs.top_logprobs.2", {"a": -0.5, "b": -0.4}, "rank 1 has log-prob -0.5, rank 2 has -0.4"),
        ("choices.0.token_ids", [], "logprobs hold 3 tokens, of 2"),
        ("choices.0.finish_reason", None, "another shape"),
    ],
)
def test_what_is_wrong_with_a_completion_is_told(path: str, value: object, told: str) -> None:
    wrong = wrong_with(TEXT_ASK, changed(text_answer(), path, value))
    assert any(told in each for each in wrong), wrong


def test_a_token_after_the_best_is_less_likely_than_they() -> None:
    top = ((1, -1.0, 1), (2, -2.0, 2))
    assert list(check_scored(Scored(3, -2.0, 3, top), 2, ())) == []
    assert list(check_scored(Scored(3, -1.5, 3, top), 2, ())) == ["rank 2 has log-prob -2.0, rank 3 has -1.5"]
    assert list(check_scored(Scored(3, -1.5, None, top), 2, ())) == ["rank 2 has log-prob -2.0, rank 3 has -1.5"]
    assert list(check_scored(Scored(3, -9999.0, 40, top), 2, ())) == []
    named = ((7, -5.0, 30), (2, -2.0, 2))
    assert list(check_scored(Scored(3, -1.5, 1, named), 2, (7, 2))) == []
    assert list(check_scored(Scored(3, -2.5, 1, named), 2, (7, 2))) == ["rank 1 has log-prob -2.5, rank 2 has -2.0"]
    assert list(check_scored(Scored(3, -1.5, 1, named), 2, (2, 7))) == ["2 alternatives instead of 2, or others"]


def chunks() -> list[dict[str, Any]]:
    """Events of a stream that tells what `chat_answer` does."""
    whole = chat_answer()
    header = {name: whole[name] for name in ("id", "created", "model", "system_fingerprint")}
    header["object"] = "chat.completion.chunk"
    told = {name: whole[name] for name in ("prompt_token_ids", "prompt_logprobs")}

    def choice(content: str, number: int | None, **more: object) -> dict[str, Any]:
        logprobs = None if number is None else {"content": [chat_entry(number)], "refusal": None}
        fields = {"index": 0, "delta": {"content": content}, "logprobs": logprobs, "finish_reason": None}
        return fields | ({} if number is None else {"token_ids": [number]}) | more

    return [
        header | told | {"choices": [choice("", None, delta={"role": "assistant", "content": ""})]},
        header | {"choices": [choice("x", 11)]},
        header | {"choices": [choice("x", 12, finish_reason="length", stop_reason=None)]},
        header | {"choices": [], "usage": whole["usage"]},
    ]


STREAM_ASK = replace(
    CHAT_ASK,
    body=dict(CHAT_ASK.body or (), stream=True, stream_options={"include_usage": True}),  # type: ignore[arg-type]
)


def stream_of(events: Iterable[object], end: bytes = b"data: [DONE]\n\n", kind: str = "text/event-stream") -> Answer:
    """An answer that came in pieces of seven bytes."""
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + end
    pieces = [(float(at), body[at : at + 7]) for at in range(0, len(body), 7)]
    return Answer(ID, 0.0, 200, {"x-request-id": ID, "content-type": kind}, pieces)


def test_a_stream_tells_what_a_whole_answer_does() -> None:
    whole, wrong = checked_reply(CHAT_ASK, answer_of(chat_answer()))
    streamed, also = checked_reply(STREAM_ASK, stream_of(chunks()))
    assert wrong == also == []
    assert whole is not None
    assert streamed is not None
    assert streamed.choices == whole.choices
    assert len(streamed.arrivals) == 2
    assert all(before < after for before, after in pairwise(streamed.arrivals))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (stream_of(chunks(), end=b""), "ends without [DONE]"),
        (stream_of(chunks(), end=b"data: [DONE]"), "ends without [DONE]"),
        (stream_of(chunks(), end=b"data: [DONE]\n\ndata: {}\n\n"), "goes on after [DONE]"),
        (stream_of(chunks(), end=b": a comment\n\ndata: [DONE]\n\n"), "no event"),
        (stream_of([{"error": {"code": "engine_error"}}]), "a stream has failed"),
        (stream_of(chunks(), kind="application/json"), "another content type"),
        (stream_of([*chunks()[:3], chunks()[2]]), "goes on after its finish_reason"),
        (stream_of([chunks()[0] | {"id": "another"}, *chunks()[1:]]), "2 ids"),
        (stream_of(chunks()[:3]), "usage is missing"),
        (stream_of([*chunks()[:2], chunks()[3]]), "no finish_reason"),
        (stream_of([{"choices": 5}]), "another shape"),
        (stream_of([*chunks()[:1], *chunks()[2:]]), "1 tokens of at most 2, ended by length"),
    ],
)
def test_what_is_wrong_with_a_stream_is_told(answer: Answer, told: str) -> None:
    wrong = checked_reply(STREAM_ASK, answer)[1]
    assert any(told in each for each in wrong), wrong


ERROR = {"error": {"message": "Too long.", "type": "invalid_request_error", "param": "prompt", "code": "x"}}


@pytest.mark.parametrize(
    ("ask", "answer", "told"),
    [
        (CHAT_ASK, answer_of(ERROR, 500), "the status is 500, not 200: x: Too long."),
        (CHAT_ASK, answer_of(ERROR, 400), "the status is 400, not 200"),
        (replace(CHAT_ASK, status=400), answer_of({}), "the status is 200, not 400"),
        (replace(CHAT_ASK, status=400), answer_of({"detail": "x"}, 400), "not in OpenAI's envelope: error"),
        (replace(CHAT_ASK, status=400), answer_of(b"<html>", 400), "not in OpenAI's envelope"),
        (replace(CHAT_ASK, status=400), answer_of(ERROR, 429, {"retry-after": "1"}), "the status is 429, not 400"),
        (CHAT_ASK, answer_of(ERROR, 429), "no Retry-After"),
        (CHAT_ASK, answer_of({}, headers={"x-request-id": "other"}), "does not bear the request's id"),
        (CHAT_ASK, answer_of(b'{"choices": ['), "is not JSON"),
        (CHAT_ASK, Answer(ID, 0.0, failure="ReadError: gone"), "ReadError: gone"),
        (replace(CHAT_ASK, manner=Manner.LEAVES_READING), replace(answer_of(ERROR, 500), left=True), "status is 500"),
    ],
)
def test_a_wrong_status_is_told(ask: Ask, answer: Answer, told: str) -> None:
    assert any(told in each for each in check_status(ask, answer))


def test_what_may_come_is_no_violation() -> None:
    assert list(check_status(CHAT_ASK, answer_of(ERROR, 429, {"retry-after": "1"}))) == []
    assert list(check_status(replace(CHAT_ASK, status=400), answer_of(ERROR, 400))) == []
    assert list(check_status(replace(CHAT_ASK, manner=Manner.LEAVES_WAITING), Answer(ID, 0.0, left=True))) == []


def reply_to(ask: Ask, payload: dict[str, Any]) -> Reply:
    reply = checked_reply(ask, answer_of(payload))[0]
    assert reply is not None
    return reply


def kept(ask: Ask, payload: dict[str, Any]) -> Sample:
    """What the pool keeps of an answer."""
    pool, rng = Pool(tolerance=0), random.Random(1)
    pool.keep(rng, 7, ask, reply_to(ask, payload))
    sample = pool.draw_sample(rng)
    assert sample is not None
    assert pool.draw_sample(rng) is None
    return sample


def test_an_answer_is_scored_again_with_its_prompt() -> None:
    sample = kept(CHAT_ASK, chat_answer())
    assert sample.token_ids == [5, 6, 7, 11, 12]
    assert sorted(sample.rows) == [1, 2, 3, 4]
    again = ask_to_score(random.Random(1), sample, "m")
    assert isinstance(again.body, dict)
    assert again.body["prompt"] == [5, 6, 7, 11, 12]
    assert again.body["max_tokens"] == 0
    processed = replace(CHAT_ASK, body=dict(CHAT_ASK.body or (), logprobs_mode="processed_logprobs"))  # type: ignore[arg-type]
    assert sorted(kept(processed, chat_answer()).rows) == [1, 2]  # the prompt's are raw, whatever is asked


@pytest.mark.parametrize(("tolerance", "differences", "ranks"), [(0.0, 2, 0), (1e-3, 0, 1)])
def test_the_last_bit_counts_where_nothing_is_tolerated(tolerance: float, differences: int, ranks: int) -> None:
    before = Scored(12, -0.5, 1, ((12, -0.5, 1),))
    sample = Sample(7, [5, 12], {1: before})
    found = compare_scores(sample, told_again(before), tolerance)
    assert (found.tokens, found.differ, found.ranks_off) == (1, [], 0)
    next_float = float(np.nextafter(np.float32(-0.5), np.float32(0)))
    found = compare_scores(sample, told_again(replace(before, logprob=next_float, rank=2)), tolerance)
    assert (len(found.differ), found.ranks_off) == (differences, ranks)
    for other in (Scored(13, -0.5, 1, None), replace(before, logprob=float("nan")), None):
        assert len(compare_scores(sample, told_again(other), tolerance).differ) == 1
    found = compare_scores(sample, told_again(replace(before, top=((13, -0.5, 1),))), tolerance)
    assert len(found.differ) == (0 if tolerance else 1)


def told_again(row: Scored | None) -> Reply:
    reply = Reply("x")
    reply.choice(0).prompt_numbers = [None, row]
    return reply


def test_a_request_that_comes_again_is_answered_alike() -> None:
    reply = reply_to(TEXT_ASK, text_answer())
    original = Original(7, TEXT_ASK, reply.choices)
    again = ask_to_repeat(original)
    assert again.streams
    assert not ask_to_repeat(replace(original, ask=again)).streams
    assert compare_replies(original, reply) == Comparison(tokens=4)
    for path, value in (
        ("choices.1.text", "xy"),
        ("choices.1.finish_reason", "stop"),
        ("choices.0.logprobs.top_logprobs.2", {"a": -0.5, "b": -1.25}),
        ("choices.0.prompt_logprobs.1.6.logprob", -4.5),
    ):
        other = checked_reply(TEXT_ASK, answer_of(changed(text_answer(), path, value)))[0]
        assert other is not None
        assert len(compare_replies(original, other).differ) == 1, path


def line(*megabytes: float, minutes: float = 2.0, begin: float = 10.0) -> list[Resident]:
    return [Resident(60 * (begin + minutes * i), 1e6 * each, 10.0) for i, each in enumerate(megabytes)]


def test_the_slope_of_memory() -> None:
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


def test_a_leak_is_sure_fast_and_large() -> None:
    def leaks(*megabytes: float, minutes: float = 2.0, most: float = 50.0) -> bool:
        found = growth(line(*megabytes, minutes=minutes))
        assert found is not None
        return found.leaks(most)

    steady = [1000 + 4.0 * i for i in range(12)]  # 120 MB/h, for 22 minutes
    assert leaks(*steady)
    assert not leaks(*steady, most=200)
    assert not leaks(*steady[:6])  # 20 MB in all
    assert not leaks(*(1000 + 100.0 * (i % 2) for i in range(12)))  # up and down
    assert not leaks(*(1000.0 for _ in range(12)))
    assert not leaks(*(1000 + 1.0 * i for i in range(60)))  # 30 MB/h, and 59 MB in all


def test_the_warm_up_is_left_out() -> None:
    warm = line(*(500 - 50.0 * i for i in range(5)), minutes=1, begin=0)  # which take the first four minutes
    found = growth([*warm[:4], *line(1000, 1000, 1000, begin=4)])
    assert found is not None
    assert (found.mb_per_hour, found.samples) == (0, 3)
    assert growth(warm) is None


def metrics_of(**values: float) -> str:
    names = ("num_requests_running", "num_requests_waiting", "num_requests_held", "kv_cache_usage_perc")
    told = dict.fromkeys((f"logprobd:{name}" for name in names), 0.0)
    told |= {"process_resident_memory_bytes": 1e9, "process_open_fds": 16, "process_start_time_seconds": 5}
    told |= {name if name.startswith("process") else f"logprobd:{name}": value for name, value in values.items()}
    return "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in told.items())


async def look(idle: Idle, load: float = 0, **values: float) -> tuple[list[str], list[str]]:
    def server(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/load":
            return httpx2.Response(200, json={"server_load": load})
        return httpx2.Response(200, text=metrics_of(**values))

    async with httpx2.AsyncClient(base_url="http://s", transport=httpx2.MockTransport(server)) as http:
        return await idle.look(http, 1.0)


async def test_what_is_not_idle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.soak.idle._SECONDS", 0.0)
    idle = Idle()
    assert await look(idle) == ([], [])
    assert idle.samples == [Resident(1.0, 1e9, 16)]
    assert await look(idle, process_open_fds=20) == ([], [])
    for values, told in (
        ({"num_requests_running": 1.0}, "num_requests_running is 1 after"),
        ({"num_requests_held": 2.0}, "num_requests_held is 2 after"),
        ({"kv_cache_usage_perc": 0.01}, "kv_cache_usage_perc is 0.01 after"),
        ({"process_open_fds": 40.0}, "40 files are open, 16 were"),
        ({"process_start_time_seconds": 6.0}, "another than at the beginning"),
    ):
        (wrong,), _ = await look(idle, **values)
        assert told in wrong
    assert "/load is 3" in (await look(idle, load=3))[0][0]


async def test_failures_of_the_engine_are_told_once() -> None:
    idle = Idle()
    assert await look(idle, engine_failures=0) == ([], [])
    assert await look(idle, engine_failures=2) == ([], ["the engine has counted 2 failures"])
    assert await look(idle, engine_failures=2) == ([], [])


async def test_what_breaks_on_its_way_is_a_failure() -> None:
    async def never(_: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(60)
        return httpx2.Response(200)

    def gone(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("gone")

    for handler, timeout, failure in ((never, 0.01, "it hangs: no end after 0 s"), (gone, 9, "ReadError: gone")):
        async with httpx2.AsyncClient(base_url="http://s", transport=httpx2.MockTransport(handler)) as http:
            assert (await send(http, CHAT_ASK, ID, timeout)).failure == failure
    async with httpx2.AsyncClient(base_url="http://s", transport=httpx2.MockTransport(never)) as http:
        answer = await send(http, replace(CHAT_ASK, manner=Manner.LEAVES_WAITING, patience=0.01), ID, 9)
    assert (answer.left, answer.failure, answer.status) == (True, None, None)


async def test_wrong_requests_get_what_is_said() -> None:
    facts = ServerFacts(MODEL, MAX_MODEL_LEN, K, VOCAB_SIZE, "", "")
    bodies = BadBodies(facts, Prompts(1, facts, MAX_MODEL_LEN))
    async with serving() as server:
        for number in range(300):
            ask = bodies.draw(random.Random(number))
            answer = await send(server.client, ask, ID, 20)
            assert list(check_status(ask, answer)) == [], ask
        await server.assert_idle()


def test_a_request_is_drawn_from_the_seed_and_its_number() -> None:
    traffic, other, third = (Traffic(seed, FACTS, longest=2048, burst=50) for seed in (1, 1, 2))
    asks = [traffic.draw(number) for number in range(2000)]
    assert [ask.body for ask in asks] == [other.draw(number).body for number in range(2000)]
    assert asks[5].body != third.draw(5).body
    assert len({ask.kind for ask in asks}) == 19
    assert {ask.manner for ask in asks} == set(Manner)
    assert {ask.times for ask in asks} == {1, 50}
    for ask in asks:
        if ask.generates and isinstance(ask.body, dict) and "prompt" in ask.body:
            prompts = ask.body["prompt"] if isinstance(ask.body["prompt"][0], list) else [ask.body["prompt"]]
            assert all(isinstance(each, str) or len(each) + ask.body["max_tokens"] <= 2048 for each in prompts)


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(range(100), 0.99) == 99
    assert quantile(range(101), 0.99) == 99


def soak_of(tally: Tally, *samples: Resident, max_p99_ms: float | None = None) -> Soak:
    soak = Soak(replace(SETTINGS, max_p99_ms=max_p99_ms), FACTS)
    soak.tally, soak.idle.samples = tally, list(samples)
    return soak


def test_the_report() -> None:
    tally = Tally()
    tally.count(CHAT_ASK, answer_of(chat_answer()))
    tally.count(CHAT_ASK, answer_of(ERROR, 429))
    tally.check("answers and their numbers", "chat, request 7", [f"wrong | {i}" for i in range(30)])
    tally.tokens(STREAM_ASK, stream_of(chunks()), reply_of_stream())
    tally.compared("scored again", Comparison(5, 0, ["x"]))
    soak = soak_of(tally, *line(*(1000 + 10.0 * i for i in range(12))), max_p99_ms=1.0)
    judge(soak)
    text = markdown(list(sections(soak)))
    assert "| result | failed: 32 violations |" in text
    assert "| chat | 1 | 1 | 2 |" in text
    assert "| answers and their numbers | 1 | 30 |" in text
    assert "| memory | 12 | 1 |" in text
    assert "| latency | 1 | 1 |" in text
    assert "| differences, scored again | 1 |" in text
    assert "Violations, 20 of 32" in text
    assert text.count("wrong \\| ") == 20
    assert "secret" not in text


def reply_of_stream() -> Reply:
    reply = checked_reply(STREAM_ASK, stream_of(chunks()))[0]
    assert reply is not None
    return reply


def test_speed_is_judged_on_demand_only() -> None:
    tally = Tally()
    tally.between_tokens.extend([100.0] * 10)
    judge(soak_of(tally))
    assert not tally.violations
    judge(soak_of(tally, max_p99_ms=1e6))
    assert not tally.violations
    judge(soak_of(tally, max_p99_ms=1e3))
    assert [each.check for each in tally.violations] == ["latency"]
    silent = Tally()
    judge(soak_of(silent, max_p99_ms=1e3))
    assert [each.what for each in silent.violations] == ["there were no streams; 1000 ms are allowed"]


def test_what_a_server_says_at_its_end() -> None:
    assert list(_complaints(OwnServer("x", ["12:00 INFO serve: fine\n"], 0))) == []
    log = ["12:00 ERROR serve.engine.engine: a step failed\n", "Traceback (most recent call last):\n", "  x\n"]
    assert len(list(_complaints(OwnServer("x", log, 1)))) == 3


def test_a_server_that_does_not_come_up_ends_the_soak(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), own_server(["--no-such-flag"]):
        pass
    assert "--no-such-flag" in capfd.readouterr().err


def test_flags_that_have_no_part_in_it_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--url", "http://s", "--dtype", "float32"])
    assert "--dtype float32 has no part in it" in capsys.readouterr().err


def test_no_server_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def failing_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of any: it tells what it is, is idle, and answers each request of a soak with 500."""
    pages: dict[str, object] = {
        "/v1/models": {"data": [{"id": "m", "max_model_len": 2048, "max_logprobs": 20}]},
        "/tokenizer_info": {"vocab_size": 1000},
        "/version": {"version": "0"},
        "/load": {"server_load": 0},
    }

    def failing(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/metrics":
            return httpx2.Response(200, text=metrics_of())
        if "x-request-id" in request.headers:
            return httpx2.Response(500, json=ERROR)
        return httpx2.Response(200, json=pages.get(request.url.path, {"system_fingerprint": "fp"}))

    def connect(url: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=url, transport=httpx2.MockTransport(failing))

    monkeypatch.setattr("serve.soak.soak.connect", connect)


def test_a_server_that_fails_ends_the_soak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    failing_server(monkeypatch)
    assert main(["--url", "http://s", "--report", str(tmp_path / "soak.md")]) == 1
    shown, written = capsys.readouterr().out, (tmp_path / "soak.md").read_text("utf-8")
    for report in (shown, written):
        assert "the status is 500" in report
        assert "failed: " in report
    failed = re.search(r"failed: (\d+) violations", written)
    assert failed is not None
    assert 200 <= int(failed[1]) < 1000  # it ends after two hundred, and what was on its way


def test_ctrl_c_ends_in_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    failing_server(monkeypatch)
    monkeypatch.setattr(Soak, "run", interrupted)
    assert main(["--url", "http://s"]) == 130
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "result"), [(0, 0), (-9, 1)])
def test_a_server_of_its_own_gets_the_other_flags_and_has_to_end_well(
    monkeypatch: pytest.MonkeyPatch, code: int, result: int
) -> None:
    started: list[str] = []

    @contextmanager
    def own(arguments: Sequence[str]) -> Iterator[OwnServer]:
        started.extend(arguments)
        server = OwnServer("http://s")
        yield server
        server.exit_code = code

    async def nothing(*_: object) -> None:
        pass

    failing_server(monkeypatch)
    monkeypatch.setattr("serve.soak.__main__.own_server", own)
    monkeypatch.setattr(Soak, "run", nothing)
    assert main(["--model", "org/m", "--minutes", "1", "--max-num-seqs", "4", "--dtype", "float32"]) == result
    assert started[0] == "org/m"
    assert started[-4:] == ["--max-num-seqs", "4", "--dtype", "float32"]  # after ours, so that they stand over them


async def test_clients_leave_and_dawdle(server: ServerProcess) -> None:
    body = {"prompt": "A long story:", "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 5}
    ask = Ask("any", COMPLETIONS, body)
    async with connect(server.url) as http:
        for manner, patience in ((Manner.LEAVES_WAITING, 0.005), (Manner.LEAVES_SENDING, 0.5)):
            answer = await send(http, replace(ask, manner=manner, patience=patience), ID, 20)
            assert (answer.left, answer.failure, answer.status) == (True, None, None)
        answer = await send(http, replace(ask, manner=Manner.LEAVES_READING, patience=3), ID, 20)
        assert (answer.left, answer.failure, answer.status, len(answer.pieces)) == (True, None, 200, 3)
        dawdling = replace(ask, manner=Manner.READS_SLOWLY, patience=0.1, body=body | {"max_tokens": 5})
        answer = await send(http, dawdling, ID, 20)
        assert answer.body.endswith(b"data: [DONE]\n\n")
        times = [at for at, _ in answer.pieces]
        assert all(after - before >= 0.09 for before, after in pairwise(times))
    async with connect(server.url) as http:
        assert await Idle().look(http, 0.0) == ([], [])


def test_a_short_soak_of_a_real_server(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Of this seed, so few requests are of almost every kind.
    flags = ["--requests", "36", "--clients", "8", "--longest", "128", "--burst", "16", "--seed", "1045"]
    assert main(["--url", server.url, *flags, "--report", str(tmp_path / "soak.md")]) == 0
    report = (tmp_path / "soak.md").read_text("utf-8")
    assert "| result | passed |" in report
    assert "to the last bit" in report
    assert "tokens compared, scored again" in report
    assert "| idle when nothing is asked | 4 | 0 |" in report
    assert "passed" in capsys.readouterr().out
