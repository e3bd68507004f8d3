"""Checks of every answer. Each yields its violations as text that contains no prompt."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from serve.api.responses import ErrorAnswer
from tools.soak.client import Answer
from tools.soak.replies import Alternative, BrokenAnswerError, Choice, Reply, Scored, read_reply
from tools.soak.request import Body, Expectation, Request

# With one of these, greedy decoding may choose another token than the most likely one.
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
_CHANGES_CHOICE = frozenset({*_PENALTIES, "min_tokens", "allowed_token_ids", "bad_words", "logprobs_mode"})
_SUM = 1e-3  # rounding allowed in a sum of float32 probabilities


def check_status(request: Request, answer: Answer) -> Iterator[str]:
    """Check connection, status, headers and error envelope."""
    if answer.failure is not None:
        yield answer.failure
    if answer.status is None:
        return
    if answer.headers.get("x-request-id") != answer.request_id:
        yield "the X-Request-Id header is not the request's"
    if answer.status == 429 and request.generates:
        if not answer.headers.get("retry-after", "").isdecimal():
            yield "a 429 has no Retry-After"
    elif answer.status != request.status:
        yield f"the status is {answer.status}, not {request.status}: {_error_message(answer.body)}"
    if not answer.left and answer.failure is None:
        yield from _check_envelope(answer) if answer.status >= 400 else _check_json(answer)


def _check_envelope(answer: Answer) -> Iterator[str]:
    try:
        envelope = ErrorAnswer.model_validate_json(answer.body).error
    except ValidationError as error:
        yield f"a {answer.status} is not in OpenAI's envelope: {_first_problem(error)}"
        return
    if not 0 < len(envelope.message) <= 1000:
        yield f"the message of a {answer.status} has {len(envelope.message)} characters"


def _check_json(answer: Answer) -> Iterator[str]:
    if answer.headers.get("content-type", "").startswith("application/json"):
        try:
            json.loads(answer.body)
        except ValueError:
            yield f"a body of {len(answer.body)} bytes is not JSON"


def checked_reply(request: Request, answer: Answer) -> tuple[Reply | None, list[str]]:
    """Return the parsed answer, if possible, and its violations."""
    assert isinstance(request.body, dict)
    expected = Expectation.of(request)
    try:
        reply = read_reply(answer, expected)
    except BrokenAnswerError as error:
        return None, [str(error)]
    except ValidationError as error:
        return None, [f"the answer does not match the schema: {_first_problem(error)}"]
    return reply, list(check_reply(request.body, expected, reply, answer.request_id))


def check_reply(body: Body, expected: Expectation, reply: Reply, request_id: str) -> Iterator[str]:
    """Check an answer against the request."""
    if not reply.id.endswith(request_id):
        yield "the answer's id is not the request's"
    count = expected.prompts * expected.n
    if sorted(reply.choices) != list(range(count)):
        yield f"the choices are {sorted(reply.choices)}, expected {count}"
        return
    if expected.usage:
        yield from _check_usage(expected, reply)
    for choice in reply.choices.values():
        for violation in _check_choice(body, expected, choice):
            yield f"choice {choice.index}: {violation}"


def _check_usage(expected: Expectation, reply: Reply) -> Iterator[str]:
    usage = reply.usage
    if usage is None:
        yield "usage is missing"
        return
    prompt = sum(len(reply.choices[i].prompt) for i in range(0, len(reply.choices), expected.n))
    output = sum(len(choice.token_ids) for choice in reply.choices.values())
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    if counts != (prompt, output, prompt + output):
        yield f"usage is {counts} for {prompt} and {output} tokens"
    if not 0 <= usage.prompt_tokens_details.cached_tokens <= prompt:
        yield f"{usage.prompt_tokens_details.cached_tokens} of {prompt} prompt tokens are cached"


def _check_choice(body: Body, expected: Expectation, choice: Choice) -> Iterator[str]:
    yield from _check_end(body, expected, choice)
    echoed = len(choice.prompt) if expected.echo else 0
    if not choice.prompt:
        yield "the prompt's ids are missing"
    tokens = choice.prompt[:echoed] + choice.token_ids if expected.alternatives is not None else []
    if [row.token_id if row else None for row in choice.logprobs[echoed:]] != tokens[echoed:]:
        yield f"{len(choice.logprobs)} log-probs for {len(tokens)} tokens, or for other tokens"
        return
    if any(before > after for before, after in itertools.pairwise(choice.offsets)):
        yield "text_offset decreases"
    greedy = body.get("temperature") == 0 and not _CHANGES_CHOICE & set(body)
    for i, row in enumerate(choice.logprobs[echoed:]):
        assert row is not None
        for violation in check_scored(row, expected.alternatives or 0, expected.named):
            yield f"token {i}: {violation}"
        if greedy and (row.rank or 1, _first(row, expected)) not in ((1, None), (1, row.token_id)):
            yield f"token {i}: temperature 0 chose rank {row.rank}"
    yield from _check_prompt(expected, choice, choice.logprobs[:echoed])


def _check_end(body: Body, expected: Expectation, choice: Choice) -> Iterator[str]:
    """Check finish_reason, stop_reason and the end of the text."""
    count, limit = len(choice.token_ids), expected.max_tokens
    if choice.finish_reason is None:
        yield "finish_reason is missing"
    if limit is not None and (count > limit or (choice.finish_reason == "length" and count != limit)):
        yield f"{count} tokens of at most {limit}, finish_reason {choice.finish_reason}"
    allowed = body.get("allowed_token_ids")
    if allowed is not None and not set(choice.token_ids) <= set(allowed):
        yield "a token is not in allowed_token_ids"
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(choice.stop_reason, str) and choice.stop_reason not in stops:
        yield "stop_reason is not a stop string"
    if stops and not expected.echo:
        included = bool(body.get("include_stop_str_in_output")) and isinstance(choice.stop_reason, str)
        if included and not choice.text.endswith(str(choice.stop_reason)):
            yield "the text does not end with its stop string"
        if not included and any(each in choice.text for each in stops):
            yield "the text contains a stop string"


def _check_prompt(expected: Expectation, choice: Choice, echo: Sequence[Scored | None]) -> Iterator[str]:
    """Check the log-probs of the prompt and their copy in an echo."""
    rows = choice.prompt_logprobs
    if expected.prompt_alternatives is None:
        if rows is not None:
            yield "prompt_logprobs were not requested"
        return
    if rows is None:
        yield "prompt_logprobs are missing"
        return
    start = expected.prompt_start
    ids = [None] * min(start, len(choice.prompt)) + choice.prompt[start:]
    if [row.token_id if row else None for row in rows] != ids:
        yield f"{len(rows)} prompt_logprobs for {len(choice.prompt)} tokens, or for other tokens"
        return
    for i, row in enumerate(rows):
        for violation in check_scored(row, expected.prompt_alternatives, expected.prompt_named) if row else ():
            yield f"prompt token {i}: {violation}"
    if echo and [row.logprob if row else None for row in echo] != [row.logprob if row else None for row in rows]:
        yield "echo and prompt_logprobs differ"


def check_scored(row: Scored, alternatives: int, named: Sequence[int]) -> Iterator[str]:
    """Check range and consistency of the log-probs and ranks of one token."""
    if not -9999 <= row.logprob <= 0:  # -9999 is minus infinity on the wire
        yield f"the log-prob is {row.logprob}"
    if row.rank is not None and row.rank < 1:
        yield f"the rank is {row.rank}"
    if row.top is None:
        return
    ids = [token_id for token_id, _, _ in row.top]
    if len(ids) != alternatives or (named and ids != list(named)) or len(set(ids)) != len(ids):
        yield f"{len(ids)} alternatives instead of {alternatives}, or other ids"
        return
    if not all(-9999 <= logprob <= 0 for _, logprob, _ in row.top):
        yield "the log-prob of an alternative is out of range"
    if sum(math.exp(logprob) for _, logprob, _ in row.top) > 1 + _SUM:
        yield "the probabilities of the alternatives sum to more than 1"
    yield from _check_ranks(row, row.top, named)


def _check_ranks(row: Scored, top: Sequence[Alternative], named: Sequence[int]) -> Iterator[str]:
    if not named and [rank for _, _, rank in top] != list(range(1, len(top) + 1)):
        yield "the ranks of the alternatives are not 1, 2, 3 ..."
    own = next((each for each in top if each[0] == row.token_id), None)
    if own is not None and (row.logprob, row.rank or own[2]) != own[1:]:
        yield f"the token has log-prob {row.logprob} and rank {row.rank}, as an alternative {own[1:]}"
    ranked = [(rank, logprob) for _, logprob, rank in top if rank is not None]
    if own is None:
        # A token without a rank comes after the alternatives.
        ranked += [] if row.rank is None and named else [(row.rank or len(top) + 1, row.logprob)]
    ranked.sort(key=lambda each: each[0])
    for (rank, logprob), (next_rank, next_logprob) in itertools.pairwise(ranked):
        if rank == next_rank or logprob < next_logprob:
            yield f"rank {rank} has log-prob {logprob}, rank {next_rank} has {next_logprob}"


def _first(row: Scored, expected: Expectation) -> int | None:
    """Return the most likely token if the answer contains it."""
    return row.top[0][0] if row.top and not expected.named else None


def _error_message(body: bytes) -> str:
    """Return code and message of an error, which contain no prompt."""
    try:
        error = json.loads(body)["error"]
        return f"{error['code']}: {str(error['message'])[:200]}"
    except (ValueError, KeyError, TypeError):
        return f"{len(body)} bytes"


def _first_problem(error: ValidationError) -> str:
    """Return location and message of the first problem, without the input."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def check_page(request: Request, answer: Answer) -> list[str]:
    """Check an answer of status 200 that is not generated."""
    try:
        return list(request.check(answer.body))
    except ValidationError as error:
        return [f"the answer does not match the schema: {_first_problem(error)}"]
