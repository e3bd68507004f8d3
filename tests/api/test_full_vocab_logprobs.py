"""prompt_logprobs of -1 or above --max-logprobs: full rows, written one at a time."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.token_logprobs import TokenLogprobs
from serve.api.errors import APIError
from serve.api.json_stream import Placeholder, make_body
from serve.api.prompt_logprobs import RowWriter
from serve.engine.client import RequestHandle
from serve.engine.request import (
    QueueFullError,
    Request,
)
from tests.support.fake_runner import K, hidden_after
from tests.support.http_client import (
    VOCAB_SIZE,
    Connection,
    ExactRunner,
    Gate,
    Server,
    byte_tokenizer,
    chat_body,
    chunks_of,
    completion_body,
    error_of,
    events_of,
    serving,
    submitted,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
STREAMS = pytest.mark.parametrize("stream", [False, True])
PROMPTS = {CHAT: b"user:Hi;>", COMPLETIONS: b"Hi there, all of you"}


SERVER_OPTIONS: dict[str, Any] = {"runner": ExactRunner, "full_vocab": True}


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    return chat_body(**fields) if path == CHAT else completion_body(prompt=PROMPTS[path].decode(), **fields)


async def answer_of(server: Server, path: str, *, stream: bool = False, **fields: Any) -> Any:
    """The object that has prompt_logprobs: chat response, choice of a completion, or first chunk."""
    response = await server.post(path, body_of(path, **fields, stream=stream))
    if stream:
        first, *others = chunks_of(response)
        assert not any("prompt_logprobs" in part for chunk in others for part in (chunk, *chunk["choices"]))
        return first if path == CHAT else first["choices"][0]
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json() if path == CHAT else response.json()["choices"][0]


def row_of(server: Server, prompt: bytes, index: int) -> NDArray[np.float32]:
    """Log-probs [V] of the tokens that may follow the one at `index`."""
    assert isinstance(server.runner, ExactRunner)
    return server.runner.row(hidden_after(prompt[: index + 1]))


def expected_entry(row: NDArray[np.float32], actual: int, k: int) -> list[tuple[int, float, int]]:
    """Id, log-prob and rank of the token itself, then of the k best without it."""
    order = sorted(range(VOCAB_SIZE), key=lambda token: (-row[token], token))
    ranked = [(token, max(-9999.0, float(row[token])), rank) for rank, token in enumerate(order, 1)]
    first = ranked[order.index(actual)]
    return [first, *(row for row in ranked[:k] if row != first)]


def rows_of(entry: dict[str, Any]) -> list[tuple[int, float, int]]:
    return [(int(key), value["logprob"], value["rank"]) for key, value in entry.items()]


@pytest.mark.parametrize("k", [-1, K + 1, 100, VOCAB_SIZE, VOCAB_SIZE + 1])
@pytest.mark.parametrize("max_tokens", [0, 2])
@PATHS
@STREAMS
async def test_full_vocab_contain_vocabulary(
    fresh_server: Server, path: str, stream: bool, k: int, max_tokens: int
) -> None:
    prompt = PROMPTS[path]
    answer = await answer_of(fresh_server, path, stream=stream, prompt_logprobs=k, max_tokens=max_tokens)
    entries = answer["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(prompt)
    for index, entry in enumerate(entries[1:]):
        count = VOCAB_SIZE if k == -1 else k
        assert rows_of(entry) == expected_entry(row_of(fresh_server, prompt, index), prompt[index + 1], count)
    names = {key: value["decoded_token"] for key, value in entries[1].items()}
    if k == -1:
        assert (names["65"], names["34"], names["256"], names["200"], names["259"]) == ("A", '"', "<begin>", "", "\0\1")
    await fresh_server.assert_idle()


@PATHS
async def test_full_vocab_equal_for_every_k(server: Server, path: str) -> None:
    few = (await answer_of(server, path, prompt_logprobs=K))["prompt_logprobs"]
    full = (await answer_of(server, path, prompt_logprobs=-1))["prompt_logprobs"]
    for small, large in zip(few[1:], full[1:], strict=True):
        assert list(small) == list(large)[: len(small)]
        assert all(small[key]["logprob"] == large[key]["logprob"] for key in small)
        assert all(small[key]["rank"] == large[key]["rank"] for key in small)


@pytest.mark.parametrize("start", [1, 2, 8])
@PATHS
@STREAMS
async def test_full_vocab_start(fresh_server: Server, path: str, stream: bool, start: int) -> None:
    plain = (await answer_of(fresh_server, path, prompt_logprobs=-1))["prompt_logprobs"]
    fresh_server.runner.calls.clear()
    answer = await answer_of(fresh_server, path, stream=stream, prompt_logprobs=-1, prompt_logprobs_start=start)
    assert answer["prompt_logprobs"] == [None] * start + plain[start:]
    assert sum(live for name, live in fresh_server.runner.calls if name == "vocabulary") == len(plain) - start


async def test_full_vocab_of_one_token(server: Server) -> None:
    answer = await server.complete(prompt=[5], prompt_logprobs=-1)
    assert answer["choices"][0]["prompt_logprobs"] == [None]


@STREAMS
async def test_full_vocab_in_first_choice_only(fresh_server: Server, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": ["abc", "de"], "n": 2, "prompt_logprobs": -1, "max_tokens": 1}
    if stream:
        choices = [choice for chunk in await fresh_server.complete_stream(**fields) for choice in chunk["choices"]]
        entries_of = {choice["index"]: choice["prompt_logprobs"] for choice in choices if "prompt_logprobs" in choice}
    else:
        choices = (await fresh_server.complete(**fields))["choices"]
        entries_of = {choice["index"]: choice["prompt_logprobs"] for choice in choices if choice["prompt_logprobs"]}
    assert {index: [entry and len(entry) for entry in entries] for index, entries in entries_of.items()} == {
        0: [None, VOCAB_SIZE, VOCAB_SIZE],
        2: [None, VOCAB_SIZE],
    }
    await fresh_server.assert_idle()


@STREAMS
async def test_full_vocab_echo_keeps_its_k(server: Server, stream: bool) -> None:
    choice = await answer_of(
        server, COMPLETIONS, stream=stream, echo=True, logprobs=2, prompt_logprobs=-1, max_tokens=0
    )
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [VOCAB_SIZE] * 19
    columns = choice["logprobs"]
    assert [len(ids) for ids in columns["top_token_ids"][1:]] == [2] * 19
    prompt = PROMPTS[COMPLETIONS]
    assert columns["token_logprobs"][1:] == [
        entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]


async def test_full_vocab_share_salt_and_priority(fresh_server: Server) -> None:
    requests = submitted(fresh_server)
    await fresh_server.complete(prompt="abc", prompt_logprobs=-1, cache_salt="a", priority=3, max_tokens=1)
    assert [(request.cache_salt, request.priority) for request in requests] == [("a", 3)] * 2
    assert [request.params.max_tokens for request in requests] == [1, 0]


@PATHS
@STREAMS
async def test_full_vocab_are_sent_one_by_one(fresh_server: Server, path: str, stream: bool) -> None:
    """Only one block of rows is in memory: the first block is sent before the engine computes the next."""
    gate = fresh_server.runner.before_call = Gate("vocabulary", after=2)  # two calls are one block of eight rows
    connection = Connection(path, body_of(path, prompt_logprobs=-1, max_tokens=1, stream=stream))
    run = asyncio.create_task(connection.run(fresh_server.app))
    if path == CHAT:  # its prompt has eight rows: one block
        gate.open()
    else:
        await gate.reached()
    pieces = [await connection.data() for _ in range(8)]
    rows = b"".join(pieces).count(b'"65":')
    assert rows == 8
    gate.open()
    await run


@PATHS
@STREAMS
@pytest.mark.parametrize("after", [0, 2])
async def test_full_vocab_disconnect(fresh_server: Server, path: str, stream: bool, after: int) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 40}]} if path == CHAT else {"prompt": "x" * 40}
    gate = fresh_server.runner.before_call = Gate("vocabulary", after=after)
    body = (chat_body if path == CHAT else completion_body)(**long, prompt_logprobs=-1, n=2, stream=stream)
    connection = Connection(path, body)
    run = asyncio.create_task(connection.run(fresh_server.app))
    await gate.reached()
    connection.leave()
    await run
    gate.open()
    await fresh_server.assert_idle()


@PATHS
@STREAMS
async def test_full_vocab_engine_fails_before_first(fresh_server: Server, path: str, stream: bool) -> None:
    fresh_server.runner.fail_once("vocabulary")
    response = await fresh_server.post(path, body_of(path, prompt_logprobs=-1, max_tokens=1, stream=stream))
    assert error_of(response, 500)["code"] == "engine_error"
    await fresh_server.complete()
    await fresh_server.assert_idle()


async def test_full_vocab_engine_fails_later(fresh_server: Server) -> None:
    """The body does not end, so no client takes it for complete."""
    fresh_server.runner.fail_once("vocabulary", after=2)
    connection = Connection(COMPLETIONS, body_of(COMPLETIONS, prompt_logprobs=-1, max_tokens=1))
    with pytest.raises(Exception, match="already started"):
        await connection.run(fresh_server.app)
    messages = [connection.sent.get_nowait() for _ in range(connection.sent.qsize())]
    assert messages[0]["status"] == 200
    assert len(messages) == 1 + 8
    assert all(message["more_body"] for message in messages[1:])
    await fresh_server.complete()
    await fresh_server.assert_idle()


async def test_full_vocab_stream_fails(fresh_server: Server) -> None:
    """The interrupted event is not valid JSON; the error is an event of its own."""
    fresh_server.runner.fail_once("vocabulary", after=2)
    torn, error, done = events_of(
        await fresh_server.post(COMPLETIONS, body_of(COMPLETIONS, prompt_logprobs=-1, max_tokens=1, stream=True))
    )
    with pytest.raises(json.JSONDecodeError):
        json.loads(torn)
    assert json.loads(error)["error"]["code"] == "engine_error"
    assert done == "[DONE]"
    await fresh_server.assert_idle()


@PATHS
@STREAMS
async def test_full_vocab_with_full_queue(
    server: Server, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = server.engine.admit

    def full(request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        if request.params.prompt is not None and request.params.prompt.full_vocab:
            raise QueueFullError("max_num_queued_reqs")
        return admit(request, bypass_limits=bypass_limits)

    monkeypatch.setattr(server.engine, "admit", full)
    response = await server.post(path, body_of(path, prompt_logprobs=-1, max_tokens=1, stream=stream))
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "1"


@STREAMS
async def test_full_vocab_do_not_deadlock_on_pages(stream: bool) -> None:
    """Each of four requests needs two of three pages; those that hold pinned pages never wait."""
    async with serving(runner=ExactRunner, full_vocab=True, pages=4) as server:
        bodies = [
            completion_body(prompt=[letter * 90, letter * 80], prompt_logprobs=K + 1, n=2, max_tokens=3, stream=stream)
            for letter in "abcd"
        ]
        responses = await asyncio.gather(*(server.post(COMPLETIONS, body) for body in bodies))
        assert [response.status_code for response in responses] == [200] * 4
        if stream:
            assert all(chunks_of(response) for response in responses)
        await server.assert_idle()


def scores_of(rank: int, top_ids: list[int], tops: list[float], logprob: float) -> TokenLogprobs:
    """One row of scores."""
    ranks = np.arange(1, len(top_ids) + 1, dtype=np.int32)
    floats = (np.asarray([logprob], np.float32), np.asarray([tops], np.float32))
    ids, own_rank = np.asarray([top_ids], np.int32), np.asarray([rank], np.int32)
    return TokenLogprobs(floats[0], own_rank, ids, floats[1], top_ranks=ranks[None])


def test_row_writer_ranks_of_equal_logprobs() -> None:
    """Different logits may have equal log-probs, so ranks follow the logits and not the row."""
    row = np.asarray([-4, -1, -1, -3, -3, -3, -9], np.float32)
    writer = RowWriter(byte_tokenizer(), len(row))
    entry = json.loads(writer.row(row, 5, scores_of(3, [2, 1], [-1, -1], -3), len(row)))
    assert rows_of(entry) == [(5, -3, 3), (2, -1, 1), (1, -1, 2), (3, -3, 4), (4, -3, 5), (0, -4, 6), (6, -9, 7)]


def test_row_writer_token_among_best_shows_k() -> None:
    row = np.asarray([-4, -1, -2, -3, -5, -6, -7], np.float32)
    writer = RowWriter(byte_tokenizer(), len(row))
    entry = json.loads(writer.row(row, 2, scores_of(2, [1, 2], [-1, -2], -2), 3))
    assert rows_of(entry) == [(2, -2, 2), (1, -1, 1), (3, -3, 3)]


@pytest.mark.parametrize(
    ("row", "rank"),
    [
        ([-1, -2, -3], 2),  # too short
        ([-4, -1, np.nan, -3, -5, -6, -7], 2),
        ([-4, -1, np.inf, -3, -5, -6, -7], 2),
        ([-4, -1, -2, -3, -5, -6, -7], 1),  # the best is another
    ],
)
def test_row_writer_inconsistent_row_is_error(row: list[float], rank: int) -> None:
    writer = RowWriter(byte_tokenizer(), 7)
    with pytest.raises(APIError) as raised:
        writer.row(np.asarray(row, np.float32), 2, scores_of(rank, [1, 2], [-1, -2], -2), 7)
    assert raised.value.status == 500


async def test_make_body_with_placeholders() -> None:
    async def pieces(*parts: bytes) -> AsyncGenerator[bytes]:
        for part in parts:
            yield part

    body = make_body({"a": Placeholder(pieces(b"[1", b"]")), "b": ["x", Placeholder(pieces(b"2"))], "c": "d"})
    parts = [part async for part in body.pieces()]
    assert parts == [b'{"a":[1', b"]", b',"b":["x",2', b'],"c":"d"}']


def test_make_body_unserializable_value_is_error() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        make_body({"a": object()})


@pytest.mark.parametrize("full_vocab", [False, True])
async def test_model_card_whole_vocabulary(full_vocab: bool) -> None:
    async with serving(full_vocab=full_vocab) as server:
        (card, _) = (await server.client.get("/v1/models")).json()["data"]
        assert (card["whole_vocabulary"], card["max_logprobs"]) == (full_vocab, K)
