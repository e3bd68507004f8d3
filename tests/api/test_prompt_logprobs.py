"""Selection of prompt log-probs: a suffix, requested ids, and exactly one entry per token."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiled.state import MAX_REQUESTED_IDS
from model.token_logprobs import TokenLogprobs
from serve.engine.client import RequestHandle
from serve.engine.request import (
    FinishReason,
    PromptScoring,
    SamplingParams,
    TokenEvent,
)
from tests.support.fake_runner import MAX_MODEL_LEN, K, expected_outcome
from tests.support.http_client import (
    VOCAB_SIZE,
    Server,
    alter_events,
    body_of,
    chunks_of,
    completion_body,
    error_of,
    submitted,
    wrap_admit,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
STREAMS = pytest.mark.parametrize("stream", [False, True])
PROMPT = [4, 5, 6, 7, 9, 20, 41, 5, 3, 2, 90, 11]


async def answer_of(server: Server, path: str, *, stream: bool = False, **fields: Any) -> Any:
    """prompt_logprobs, and the entries or columns of the generated tokens, of an answer of one choice."""
    response = await server.post(path, body_of(path, **fields, stream=stream))
    if not stream:
        assert response.status_code == 200, response.text
        answer = response.json()
        (choice,) = answer["choices"]
        numbers = choice["logprobs"] and choice["logprobs"]["content"] if path == CHAT else choice["logprobs"]
        return (answer if path == CHAT else choice)["prompt_logprobs"], numbers
    chunks = chunks_of(response)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    if path == CHAT:
        return chunks[0].get("prompt_logprobs"), [entry for part in parts for entry in part["content"]]
    columns = {name: [value for part in parts for value in part[name]] for name in (parts[0] if parts else ())}
    return choices[0].get("prompt_logprobs"), columns


@pytest.mark.parametrize("start", [0, 1, 2, 5, 8])
@PATHS
@STREAMS
async def test_prompt_logprobs_start(fresh_plain_server: Server, path: str, stream: bool, start: int) -> None:
    requests = submitted(fresh_plain_server)
    fields = {"max_tokens": 1} if path == CHAT else {"max_tokens": 1, "prompt": PROMPT}
    plain, _ = await answer_of(fresh_plain_server, path, prompt_logprobs=2, **fields)
    suffix, _ = await answer_of(
        fresh_plain_server, path, stream=stream, prompt_logprobs=2, prompt_logprobs_start=start, **fields
    )
    first = max(1, start)
    assert suffix == [None] * first + plain[first:]
    assert requests[1].params.prompt == PromptScoring(first)


@STREAMS
async def test_prompt_logprobs_start_with_echo(plain_server: Server, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 2}
    _, plain = await answer_of(plain_server, COMPLETIONS, **fields)
    entries, columns = await answer_of(plain_server, COMPLETIONS, stream=stream, **fields, prompt_logprobs_start=4)
    assert entries[:4] == [None] * 4
    assert None not in entries[4:]
    for name in ("token_logprobs", "top_logprobs", "top_token_ids"):
        assert columns[name] == [None] * 4 + plain[name][4:]
    assert (columns["tokens"], columns["text_offset"]) == (plain["tokens"], plain["text_offset"])


@STREAMS
async def test_logprob_token_ids_in_completions(plain_server: Server, stream: bool) -> None:
    ids = (90, 3, 41, 8, 12)
    expected = expected_outcome(
        PROMPT, SamplingParams(4, temperature=0, requested_ids=ids), max_model_len=MAX_MODEL_LEN
    )
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 0, "logprob_token_ids": ids}
    _, columns = await answer_of(plain_server, COMPLETIONS, stream=stream, **fields)
    assert columns["top_token_ids"] == [list(ids)] * 4
    assert columns["token_logprobs"] == [row[0] for row in expected.logprobs]
    for tops, token, row in zip(columns["top_logprobs"], columns["tokens"], expected.logprobs, strict=True):
        assert isinstance(row[4], list)
        assert tops == {token: row[0]} | dict(zip(map(chr, ids), row[4], strict=True))


@pytest.mark.parametrize("top_logprobs", [None, 0, 2])
@STREAMS
async def test_logprob_token_ids_in_chat(plain_server: Server, stream: bool, top_logprobs: int | None) -> None:
    ids = (90, 3, 41, 8, 12)
    prompt = list(b"user:Hi;>")
    expected = expected_outcome(
        prompt, SamplingParams(3, temperature=0, requested_ids=ids), max_model_len=MAX_MODEL_LEN
    )
    fields: dict[str, Any] = {"max_tokens": 3, "logprobs": True, "top_logprobs": top_logprobs}
    _, content = await answer_of(plain_server, CHAT, stream=stream, **fields, logprob_token_ids=ids)
    rows: list[Any] = expected.logprobs
    for entry, token, (logprob, rank, *columns) in zip(content, expected.tokens, rows, strict=True):
        chosen = [] if token in ids else [(token, rank, logprob)]
        alternatives = [(top["token_id"], top["rank"], top["logprob"]) for top in entry["top_logprobs"]]
        assert alternatives == chosen + list(zip(*columns, strict=True))
        assert (entry["token_id"], entry["rank"], entry["logprob"]) == (token, rank, logprob)
    assert set(expected.tokens) - set(ids)


@STREAMS
async def test_logprob_token_ids_in_chat_do_not_repeat_chosen_token(plain_server: Server, stream: bool) -> None:
    fields: dict[str, Any] = {"max_tokens": 1, "logprobs": True, "stream": stream}
    _, (entry,) = await answer_of(plain_server, CHAT, **fields)
    ids = [7, entry["token_id"], 9]
    _, (entry,) = await answer_of(plain_server, CHAT, **fields, logprob_token_ids=ids)
    assert [top["token_id"] for top in entry["top_logprobs"]] == ids


@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": 0}, {"prompt_logprobs_start": 3}])
@PATHS
@STREAMS
async def test_prompt_logprob_token_ids(plain_server: Server, path: str, stream: bool, fields: dict[str, Any]) -> None:
    """The token itself comes first, then the requested ids in their order, without duplicates."""
    ids, start = [90, 5, 41, 115], fields.get("prompt_logprobs_start", 1)
    prompt = list(b"user:Hi;>") if path == CHAT else PROMPT
    scoring = PromptScoring(start, tuple(ids))
    expected = expected_outcome(prompt, SamplingParams(0, prompt=scoring), max_model_len=MAX_MODEL_LEN).prompt_logprobs
    assert expected is not None
    body = fields | {"prompt_logprob_token_ids": ids, "max_tokens": 0} | ({} if path == CHAT else {"prompt": prompt})
    entries, _ = await answer_of(plain_server, path, stream=stream, **body)
    assert entries[:start] == [None] * start
    for token, entry, row in zip(prompt[start:], entries[start:], expected, strict=True):
        assert list(entry) == [str(token), *(str(i) for i in ids if i != token)]
        actual = {int(key): (value["logprob"], value["rank"]) for key, value in entry.items()}
        _, _, _, ranks, logprobs = row
        assert isinstance(ranks, list)
        assert isinstance(logprobs, list)
        named = dict(zip(ids, zip(logprobs, ranks, strict=True), strict=True))
        assert actual == named | {token: row[:2]}


@STREAMS
async def test_prompt_logprob_token_ids_with_echo(plain_server: Server, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}
    entries, columns = await answer_of(
        plain_server, COMPLETIONS, stream=stream, **fields, prompt_logprob_token_ids=[9, 8, 7]
    )
    assert columns["top_token_ids"][1:-1] == [[9, 8, 7]] * (len(PROMPT) - 1)
    assert len(columns["top_token_ids"][-1]) == 1
    assert [columns["token_logprobs"][i] for i in range(1, 12)] == [
        entry[str(token)]["logprob"] for token, entry in zip(PROMPT[1:], entries[1:], strict=True)
    ]


@PATHS
@STREAMS
async def test_logprob_token_ids_maximum(plain_server: Server, path: str, stream: bool) -> None:
    ids = list(range(MAX_REQUESTED_IDS))
    fields = {"logprobs": True if path == CHAT else 1, "logprob_token_ids": ids, "prompt_logprob_token_ids": ids[::-1]}
    entries, numbers = await answer_of(plain_server, path, stream=stream, **fields, max_tokens=2)
    if path == CHAT:
        rows = [[top["token_id"] for top in entry["top_logprobs"]] for entry in numbers]
        assert all(set(row) == {*ids, entry["token_id"]} for row, entry in zip(rows, numbers, strict=True))
    else:
        assert numbers["top_token_ids"] == [ids] * 2
    assert all(len(entry) == MAX_REQUESTED_IDS for entry in entries[1:])


@PATHS
@STREAMS
async def test_prompt_logprobs_without_generation(fresh_server: Server, path: str, stream: bool) -> None:
    """max_tokens 0 generates nothing; all fields of prompt log-probs work with it."""
    for fields in ({"prompt_logprobs": 2}, {"prompt_logprob_token_ids": [1]}, {}):
        response = await fresh_server.post(
            path, body_of(path, max_tokens=0, **fields, stream=stream, return_token_ids=True)
        )
        if stream:
            choice = chunks_of(response)[-1]["choices"][0]
            text = choice["delta"]["content"] if path == CHAT else choice["text"]
        else:
            (choice,) = response.json()["choices"]
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert response.json()["usage"]["completion_tokens"] == 0
        assert (text, choice["finish_reason"], choice["token_ids"]) == ("", "length", [])
    assert "decode" not in [name for name, _ in fresh_server.runner.calls]


WITH_LOGPROBS: dict[str, dict[str, Any]] = {CHAT: {"logprobs": True}, COMPLETIONS: {"logprobs": 1}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt_logprobs": 1, "prompt_logprobs_start": -1}, "prompt_logprobs_start", "integer_below_min_value"),
        ({"prompt_logprobs": 1, "prompt_logprobs_start": 1.0}, "prompt_logprobs_start", "invalid_type"),
        ({"prompt_logprobs": 1, "prompt_logprobs_start": 9}, "prompt_logprobs_start", "invalid_value"),
        ({"prompt_logprobs_start": 1}, "prompt_logprobs_start", "invalid_value"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "invalid_value"),
        ({"prompt_logprobs": 1, "logprob_token_ids": [1]}, "logprob_token_ids", "invalid_value"),
        ({"logprobs": ..., "logprob_token_ids": []}, "logprob_token_ids", "empty_array"),
        ({"logprobs": ..., "logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids", "invalid_value"),
        ({"logprobs": ..., "logprob_token_ids": [1, 2, 1]}, "logprob_token_ids", "invalid_value"),
        ({"logprobs": ..., "logprob_token_ids": list(range(129))}, "logprob_token_ids", "array_above_max_length"),
        ({"logprobs": ..., "logprob_token_ids": [-1]}, "logprob_token_ids[0]", "integer_below_min_value"),
        ({"logprobs": ..., "logprob_token_ids": 1}, "logprob_token_ids", "invalid_type"),
        ({"prompt_logprob_token_ids": []}, "prompt_logprob_token_ids", "empty_array"),
        ({"prompt_logprob_token_ids": [VOCAB_SIZE]}, "prompt_logprob_token_ids", "invalid_value"),
        ({"prompt_logprob_token_ids": [7, 7]}, "prompt_logprob_token_ids", "invalid_value"),
        ({"prompt_logprob_token_ids": list(range(129))}, "prompt_logprob_token_ids", "array_above_max_length"),
        ({"prompt_logprob_token_ids": [True]}, "prompt_logprob_token_ids[0]", "invalid_type"),
        ({"prompt_logprob_token_ids": [1], "prompt_logprobs": 1}, "prompt_logprob_token_ids", "invalid_value"),
        ({"prompt_logprob_token_ids": [1], "prompt_logprobs": -1}, "prompt_logprob_token_ids", "invalid_value"),
    ],
)
@PATHS
@STREAMS
async def test_prompt_logprobs_invalid_value(
    fresh_server: Server, path: str, stream: bool, fields: dict[str, Any], param: str, code: str
) -> None:
    if "logprobs" in fields:
        fields = fields | WITH_LOGPROBS[path]
    error = error_of(await fresh_server.post(path, body_of(path, **fields, stream=stream)), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert fresh_server.runner.calls == []


async def test_prompt_logprobs_start_beyond_prompt(server: Server) -> None:
    body = completion_body(prompt=["abcd", "ab"], prompt_logprobs=1, prompt_logprobs_start=2)
    error = error_of(await server.post(COMPLETIONS, body), 400)
    assert (error["param"], error["message"]) == (
        "prompt_logprobs_start",
        "`prompt_logprobs_start` is 2, but the shortest prompt has 2 tokens.",
    )


@PATHS
@pytest.mark.parametrize(("k", "what"), [(K + 1, str(K)), (-1, str(K))])
async def test_prompt_logprobs_limit_names_flag(server: Server, path: str, k: int, what: str) -> None:
    error = error_of(await server.post(path, body_of(path, prompt_logprobs=k)), 400)
    assert error["param"] == "prompt_logprobs"
    assert "--max-logprobs" in error["message"]
    assert what in error["message"]


def shorter(scores: TokenLogprobs | None) -> TokenLogprobs | None:
    return None if scores is None else scores[:-1]


def fewer(scores: TokenLogprobs | None) -> TokenLogprobs | None:
    if scores is None:
        return None
    return replace(scores, top_ids=scores.top_ids[:, :1], top_ranks=scores.top_ranks[:, :1])


def with_nan(scores: TokenLogprobs | None) -> TokenLogprobs | None:
    if scores is None:
        return None
    return replace(scores, logprob=np.full_like(scores.logprob, np.nan))


@pytest.mark.parametrize("broken", [shorter, fewer, with_nan, lambda _: None])
@PATHS
@STREAMS
async def test_prompt_logprobs_missing_is_500(fresh_server: Server, path: str, stream: bool, broken: Any) -> None:
    """Missing rows are an error, never a shorter list."""
    alter_events(fresh_server, lambda event: replace(event, prompt_logprobs=broken(event.prompt_logprobs)))
    response = await fresh_server.post(path, body_of(path, prompt_logprobs=2, stream=stream))
    assert error_of(response, 500)["code"] == "engine_error"
    if path == COMPLETIONS:
        response = await fresh_server.post(path, completion_body(echo=True, logprobs=2, stream=stream))
        assert error_of(response, 500)["code"] == "engine_error"


@pytest.mark.parametrize("broken", [shorter, fewer, with_nan])
@PATHS
@STREAMS
async def test_logprobs_missing_is_500(fresh_server: Server, path: str, stream: bool, broken: Any) -> None:
    alter_events(
        fresh_server,
        lambda event: replace(event, logprobs=broken(event.logprobs)) if event.finish_reason is None else event,
    )
    fields = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    response = await fresh_server.post(path, body_of(path, **fields, stream=stream))
    if path == CHAT and stream:  # the chunk with the role has been sent
        assert '"engine_error"' in response.text
    else:
        assert error_of(response, 500)["code"] == "engine_error"


class EndlessHandle(RequestHandle):
    """Generates the same token forever and records how it is aborted."""

    aborted: list[FinishReason]

    def abort(self, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append(reason)
        super().abort(reason)

    async def __anext__(self) -> TokenEvent:
        column, table = np.zeros(1, np.int32), np.zeros((1, K), np.int32)
        scores = TokenLogprobs(column, column, table, table, top_ranks=table)
        return TokenEvent([72], scores)


async def test_prompt_logprobs_early_end_frees_pages(fresh_server: Server) -> None:
    """The request is aborted in the engine, for the reason that the text ended."""
    aborted: list[FinishReason] = []

    def endless(handle: RequestHandle) -> RequestHandle:
        result = EndlessHandle(handle._engine, handle._state)
        result.aborted = aborted
        return result

    wrap_admit(fresh_server, endless)
    answer = await fresh_server.complete(stop="HHH")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert aborted[0] is FinishReason.STOP
    await fresh_server.assert_idle()
