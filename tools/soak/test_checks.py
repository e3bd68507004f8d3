"""The soak's checks of answers and replays: each can fail."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tools.soak.checks import check_scored, check_status, checked_reply
from tools.soak.client import Answer
from tools.soak.fake_answers import (
    CHAT_BODY,
    CHAT_REQUEST,
    CONTENT,
    ERROR,
    ID,
    STREAM_REQUEST,
    TEXT_REQUEST,
    answer_of,
    changed,
    chat_answer,
    chunks,
    entry,
    prompt_entries,
    reply_to,
    stream_of,
    text_answer,
    usage,
    wrong_with,
)
from tools.soak.replay import (
    Comparison,
    Original,
    Pool,
    Sample,
    compare_replies,
    compare_scores,
    repeated_request,
    scoring_request,
)
from tools.soak.replies import Reply, Scored
from tools.soak.request import ClientBehavior, Request


def test_check_reply_accepts_valid_answers() -> None:
    assert wrong_with(CHAT_REQUEST, chat_answer()) == []
    assert wrong_with(TEXT_REQUEST, text_answer()) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("id", "chatcmpl-other", "id is not the request's"),
        ("usage", usage(3, 3), "usage is (3, 3, 6)"),
        ("usage", usage(3, 2) | {"prompt_tokens_details": {"cached_tokens": 4}}, "4 of 3 prompt tokens"),
        ("usage", None, "schema: usage"),
        ("choices", [], "the choices are [], expected 1"),
        ("prompt_token_ids", [], "prompt's ids are missing"),
        ("choices.0.token_ids", [11], "2 log-probs for 1 tokens"),
        ("choices.0.token_ids", [11, 13], "log-probs for 2 tokens, or for other tokens"),
        ("choices.0.finish_reason", "eos", "schema: choices.0.finish_reason"),
        ("choices.0.message.content", "x stop x", "contains a stop string"),
        ("choices.0.stop_reason", "end", "stop_reason is not a stop string"),
        (f"{CONTENT}.1.logprob", 0.5, "does not match the schema"),
        (f"{CONTENT}.1.logprob", None, "does not match the schema"),
        (f"{CONTENT}.1.rank", 0, "does not match the schema"),
        (f"{CONTENT}.1.rank", 2, "temperature 0 chose rank 2"),
        (f"{CONTENT}.1.logprob", -0.6, "as an alternative (-0.5, 1)"),
        (f"{CONTENT}.1.top_logprobs", [entry(12, -0.5, 1)], "1 alternatives instead of 2"),
        (f"{CONTENT}.1.top_logprobs.1", entry(12, -1.5, 2), "2 alternatives instead of 2, or other ids"),
        (f"{CONTENT}.1.top_logprobs.1", entry(13, -0.4, 2), "rank 1 has log-prob -0.5, rank 2 has -0.4"),
        (f"{CONTENT}.1.top_logprobs.1", entry(13, -0.6, 2), "sum to more than 1"),
        (f"{CONTENT}.1.top_logprobs.1", entry(13, -1.5, 3), "not 1, 2, 3"),
        ("prompt_logprobs", None, "prompt_logprobs are missing"),
        ("prompt_logprobs", prompt_entries([5, 6]), "2 prompt_logprobs for 3 tokens"),
        ("prompt_logprobs", prompt_entries([5, 6, 8]), "for 3 tokens, or for other tokens"),
        ("prompt_logprobs.1.6", {"logprob": -0.05, "rank": 9, "decoded_token": "x"}, "prompt token 1: rank 1 has"),
        ("prompt_logprobs.1.6", {"logprob": -4.0, "rank": 1, "decoded_token": "x"}, "or a duplicate rank"),
        ("prompt_logprobs.2.3.rank", 2, "not 1, 2, 3"),
    ],
)
def test_check_reply_rejects_a_wrong_chat(path: str, value: object, message: str) -> None:
    wrong = wrong_with(CHAT_REQUEST, changed(chat_answer(), path, value))
    assert any(message in violation for violation in wrong), wrong
    assert "secret" not in str(wrong)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("choices.1.index", 2, "the choices are [0, 2], expected 2"),
        ("choices.0.logprobs", None, "log-probs for 3 tokens"),
        ("choices.0.logprobs.tokens", ["x"], "differ in length"),
        ("choices.0.logprobs.text_offset", [0, 2, 1], "text_offset decreases"),
        ("choices.0.logprobs.token_logprobs.2", -0.6, "as an alternative (-0.5, 1)"),
        ("choices.0.logprobs.token_logprobs.1", -4.5, "echo and prompt_logprobs differ"),
        ("choices.0.logprobs.top_logprobs.2", {"a": -0.5, "b": -0.4}, "rank 1 has log-prob -0.5, rank 2 has -0.4"),
        ("choices.0.token_ids", [], "logprobs contain 3 tokens, not 2"),
        ("choices.0.finish_reason", None, "does not match the schema"),
    ],
)
def test_check_reply_rejects_a_wrong_completion(path: str, value: object, message: str) -> None:
    wrong = wrong_with(TEXT_REQUEST, changed(text_answer(), path, value))
    assert any(message in violation for violation in wrong), wrong


def test_check_scored_compares_ranks_with_logprobs() -> None:
    top = ((1, -1.0, 1), (2, -2.0, 2))
    assert list(check_scored(Scored(3, -2.0, 3, top), 2, ())) == []
    assert list(check_scored(Scored(3, -1.5, 3, top), 2, ())) == ["rank 2 has log-prob -2.0, rank 3 has -1.5"]
    assert list(check_scored(Scored(3, -1.5, None, top), 2, ())) == ["rank 2 has log-prob -2.0, rank 3 has -1.5"]
    assert list(check_scored(Scored(3, -9999.0, 40, top), 2, ())) == []
    named = ((7, -5.0, 30), (2, -2.0, 2))
    assert list(check_scored(Scored(3, -1.5, 1, named), 2, (7, 2))) == []
    assert list(check_scored(Scored(3, -2.5, 1, named), 2, (7, 2))) == ["rank 1 has log-prob -2.5, rank 2 has -2.0"]
    assert list(check_scored(Scored(3, -1.5, 1, named), 2, (2, 7))) == ["2 alternatives instead of 2, or other ids"]


def test_read_reply_is_the_same_for_a_stream() -> None:
    whole, wrong = checked_reply(CHAT_REQUEST, answer_of(chat_answer()))
    streamed, also = checked_reply(STREAM_REQUEST, stream_of(chunks()))
    assert wrong == also == []
    assert whole is not None
    assert streamed is not None
    assert streamed.choices == whole.choices
    assert len(streamed.arrivals) == 2
    assert all(before < after for before, after in pairwise(streamed.arrivals))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (stream_of(chunks(), end=b""), "ends without [DONE]"),
        (stream_of(chunks(), end=b"data: [DONE]"), "ends without [DONE]"),
        (stream_of(chunks(), end=b"data: [DONE]\n\ndata: {}\n\n"), "continues after [DONE]"),
        (stream_of(chunks(), end=b": a comment\n\ndata: [DONE]\n\n"), "not an event"),
        (stream_of([{"error": {"code": "engine_error"}}]), "a stream failed"),
        (stream_of(chunks(), kind="application/json"), "content type"),
        (stream_of([*chunks()[:3], chunks()[2]]), "continues after its finish_reason"),
        (stream_of([chunks()[0] | {"id": "another"}, *chunks()[1:]]), "2 different ids"),
        (stream_of(chunks()[:3]), "usage is missing"),
        (stream_of([*chunks()[:2], chunks()[3]]), "finish_reason is missing"),
        (stream_of([{"choices": 5}]), "does not match the schema"),
        (stream_of([*chunks()[:1], *chunks()[2:]]), "1 tokens of at most 2, finish_reason length"),
    ],
)
def test_check_reply_rejects_a_wrong_stream(answer: Answer, message: str) -> None:
    wrong = checked_reply(STREAM_REQUEST, answer)[1]
    assert any(message in violation for violation in wrong), wrong


@pytest.mark.parametrize(
    ("sent", "answer", "message"),
    [
        (CHAT_REQUEST, answer_of(ERROR, 500), "the status is 500, not 200: x: Too long."),
        (CHAT_REQUEST, answer_of(ERROR, 400), "the status is 400, not 200"),
        (replace(CHAT_REQUEST, status=400), answer_of({}), "the status is 200, not 400"),
        (replace(CHAT_REQUEST, status=400), answer_of({"detail": "x"}, 400), "not in OpenAI's envelope: error"),
        (replace(CHAT_REQUEST, status=400), answer_of(b"<html>", 400), "not in OpenAI's envelope"),
        (replace(CHAT_REQUEST, status=400), answer_of(ERROR, 429, {"retry-after": "1"}), "the status is 429, not 400"),
        (CHAT_REQUEST, answer_of(ERROR, 429), "no Retry-After"),
        (CHAT_REQUEST, answer_of({}, headers={"x-request-id": "other"}), "X-Request-Id header is not"),
        (CHAT_REQUEST, answer_of(b'{"choices": ['), "is not JSON"),
        (CHAT_REQUEST, Answer(ID, 0.0, failure="ReadError: gone"), "ReadError: gone"),
        (
            replace(CHAT_REQUEST, behavior=ClientBehavior.LEAVES_READING),
            replace(answer_of(ERROR, 500), left=True),
            "status is 500",
        ),
    ],
)
def test_check_status_rejects_a_wrong_answer(sent: Request, answer: Answer, message: str) -> None:
    assert any(message in violation for violation in check_status(sent, answer))


def test_check_status_accepts_allowed_outcomes() -> None:
    assert list(check_status(CHAT_REQUEST, answer_of(ERROR, 429, {"retry-after": "1"}))) == []
    assert list(check_status(replace(CHAT_REQUEST, status=400), answer_of(ERROR, 400))) == []
    assert (
        list(check_status(replace(CHAT_REQUEST, behavior=ClientBehavior.LEAVES_WAITING), Answer(ID, 0.0, left=True)))
        == []
    )


def sample_of(request: Request, payload: dict[str, Any]) -> Sample:
    """The sample that the pool takes of an answer."""
    pool, rng = Pool(tolerance=0), random.Random(1)
    pool.add(rng, 7, request, reply_to(request, payload))
    sample = pool.draw_sample(rng)
    assert sample is not None
    assert pool.draw_sample(rng) is None
    return sample


def test_scoring_request_contains_prompt_and_answer() -> None:
    sample = sample_of(CHAT_REQUEST, chat_answer())
    assert sample.token_ids == [5, 6, 7, 11, 12]
    assert sorted(sample.rows) == [1, 2, 3, 4]
    replay = scoring_request(random.Random(1), sample, "m")
    assert isinstance(replay.body, dict)
    assert replay.body["prompt"] == [5, 6, 7, 11, 12]
    assert replay.body["max_tokens"] == 0
    processed = replace(CHAT_REQUEST, body=CHAT_BODY | {"logprobs_mode": "processed_logprobs"})
    assert sorted(sample_of(processed, chat_answer()).rows) == [1, 2]  # those of the prompt are always raw


@pytest.mark.parametrize(("tolerance", "differences", "ranks"), [(0.0, 2, 0), (1e-3, 0, 1)])
def test_compare_scores_compares_bits_without_tolerance(tolerance: float, differences: int, ranks: int) -> None:
    before = Scored(12, -0.5, 1, ((12, -0.5, 1),))
    sample = Sample(7, [5, 12], {1: before})
    found = compare_scores(sample, replayed(before), tolerance)
    assert (found.tokens, found.differences, found.rank_changes) == (1, [], 0)
    next_float = float(np.nextafter(np.float32(-0.5), np.float32(0)))
    found = compare_scores(sample, replayed(replace(before, logprob=next_float, rank=2)), tolerance)
    assert (len(found.differences), found.rank_changes) == (differences, ranks)
    for other in (Scored(13, -0.5, 1, None), replace(before, logprob=float("nan")), None):
        assert len(compare_scores(sample, replayed(other), tolerance).differences) == 1
    found = compare_scores(sample, replayed(replace(before, top=((13, -0.5, 1),))), tolerance)
    assert len(found.differences) == (0 if tolerance else 1)


def replayed(row: Scored | None) -> Reply:
    reply = Reply("x")
    reply.choice(0).prompt_logprobs = [None, row]
    return reply


def test_compare_replies_compares_all_fields() -> None:
    reply = reply_to(TEXT_REQUEST, text_answer())
    original = Original(7, TEXT_REQUEST, reply.choices)
    replay = repeated_request(original)
    assert replay.streams
    assert not repeated_request(replace(original, request=replay)).streams
    assert compare_replies(original, reply) == Comparison(tokens=4)
    for path, value in (
        ("choices.1.text", "xy"),
        ("choices.1.finish_reason", "stop"),
        ("choices.0.logprobs.top_logprobs.2", {"a": -0.5, "b": -1.25}),
        ("choices.0.prompt_logprobs.1.6.logprob", -4.5),
    ):
        other = checked_reply(TEXT_REQUEST, answer_of(changed(text_answer(), path, value)))[0]
        assert other is not None
        assert len(compare_replies(original, other).differences) == 1, path
