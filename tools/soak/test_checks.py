"""What the soak checks of an answer, and of one that comes again: each check can fail."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tools.soak.again import (
    Comparison,
    Original,
    Pool,
    Sample,
    ask_to_repeat,
    ask_to_score,
    compare_replies,
    compare_scores,
)
from tools.soak.answers import Reply, Scored
from tools.soak.ask import Ask, Manner
from tools.soak.checks import check_scored, check_status, checked_reply
from tools.soak.client import Answer
from tools.soak.fake_answers import (
    CHAT_ASK,
    CHAT_BODY,
    CONTENT,
    ERROR,
    ID,
    STREAM_ASK,
    TEXT_ASK,
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


def test_right_answers_have_nothing_wrong() -> None:
    assert wrong_with(CHAT_ASK, chat_answer()) == []
    assert wrong_with(TEXT_ASK, text_answer()) == []


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
    processed = replace(CHAT_ASK, body=CHAT_BODY | {"logprobs_mode": "processed_logprobs"})
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
