"""What must hold of every answer. Each check yields what is wrong, in words that hold no text of a prompt."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from serve.api.responses import ErrorAnswer
from tools.soak.answers import Alternative, BrokenAnswerError, Choice, Reply, Scored, read_reply
from tools.soak.ask import Ask, Body, Wanted
from tools.soak.client import Answer

# With one of these, the most likely token need not be the one that is chosen.
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
_CHANGES_CHOICE = frozenset({*_PENALTIES, "min_tokens", "allowed_token_ids", "bad_words", "logprobs_mode"})
_SUM = 1e-3  # by which float32 probabilities of a part of the vocabulary may be above 1


def check_status(ask: Ask, answer: Answer) -> Iterator[str]:
    """The connection, the status and what goes with it."""
    if answer.failure is not None:
        yield answer.failure
    if answer.status is None:
        return
    if answer.headers.get("x-request-id") != answer.request_id:
        yield "the answer does not bear the request's id"
    if answer.status == 429 and ask.generates:
        if not answer.headers.get("retry-after", "").isdecimal():
            yield "a 429 has no Retry-After"
    elif answer.status != ask.status:
        yield f"the status is {answer.status}, not {ask.status}: {_error_message(answer.body)}"
    if not answer.left and answer.failure is None:
        yield from _check_envelope(answer) if answer.status >= 400 else _check_json(answer)


def _check_envelope(answer: Answer) -> Iterator[str]:
    try:
        told = ErrorAnswer.model_validate_json(answer.body).error
    except ValidationError as error:
        yield f"a {answer.status} is not in OpenAI's envelope: {_told(error)}"
        return
    if not 0 < len(told.message) <= 1000:
        yield f"the message of a {answer.status} has {len(told.message)} characters"


def _check_json(answer: Answer) -> Iterator[str]:
    if answer.headers.get("content-type", "").startswith("application/json"):
        try:
            json.loads(answer.body)
        except ValueError:
            yield f"a body of {len(answer.body)} bytes is not JSON"


def checked_reply(ask: Ask, answer: Answer) -> tuple[Reply | None, list[str]]:
    """A model's answer, and all that is wrong with it."""
    assert isinstance(ask.body, dict)
    wanted = Wanted.of(ask)
    try:
        reply = read_reply(answer, wanted)
    except BrokenAnswerError as error:
        return None, [str(error)]
    except ValidationError as error:
        return None, [f"an answer of another shape: {_told(error)}"]
    return reply, list(check_reply(ask.body, wanted, reply, answer.request_id))


def check_reply(body: Body, wanted: Wanted, reply: Reply, request_id: str) -> Iterator[str]:
    """A model's answer against what was asked for."""
    if not reply.id.endswith(request_id):
        yield "the answer's id is not the request's"
    count = wanted.prompts * wanted.n
    if sorted(reply.choices) != list(range(count)):
        yield f"the choices are {sorted(reply.choices)}, not {count}"
        return
    if wanted.usage:
        yield from _check_usage(wanted, reply)
    for choice in reply.choices.values():
        for wrong in _check_choice(body, wanted, choice):
            yield f"choice {choice.index}: {wrong}"


def _check_usage(wanted: Wanted, reply: Reply) -> Iterator[str]:
    usage = reply.usage
    if usage is None:
        yield "usage is missing"
        return
    prompt = sum(len(reply.choices[i].prompt) for i in range(0, len(reply.choices), wanted.n))
    output = sum(len(choice.token_ids) for choice in reply.choices.values())
    told = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    if told != (prompt, output, prompt + output):
        yield f"usage tells {told}, of {prompt} and {output} tokens"
    if not 0 <= usage.prompt_tokens_details.cached_tokens <= prompt:
        yield f"{usage.prompt_tokens_details.cached_tokens} of {prompt} prompt tokens were cached"


def _check_choice(body: Body, wanted: Wanted, choice: Choice) -> Iterator[str]:
    yield from _check_end(body, wanted, choice)
    echoed = len(choice.prompt) if wanted.echo else 0
    if not choice.prompt:
        yield "the prompt's ids are missing"
    tokens = choice.prompt[:echoed] + choice.token_ids if wanted.alternatives is not None else []
    if [row.token_id if row else None for row in choice.numbers[echoed:]] != tokens[echoed:]:
        yield f"{len(choice.numbers)} log-probs of {len(tokens)} tokens, or of others"
        return
    if any(before > after for before, after in itertools.pairwise(choice.offsets)):
        yield "text_offset goes back"
    greedy = body.get("temperature") == 0 and not _CHANGES_CHOICE & set(body)
    for place, row in enumerate(choice.numbers[echoed:]):
        assert row is not None
        for wrong in check_scored(row, wanted.alternatives or 0, wanted.named):
            yield f"token {place}: {wrong}"
        if greedy and (row.rank or 1, _first(row, wanted)) not in ((1, None), (1, row.token_id)):
            yield f"token {place}: temperature 0 has chosen rank {row.rank}"
    yield from _check_prompt(wanted, choice, choice.numbers[:echoed])


def _check_end(body: Body, wanted: Wanted, choice: Choice) -> Iterator[str]:
    """Why the text ended, and where."""
    count, most = len(choice.token_ids), wanted.most_tokens
    if choice.finish_reason is None:
        yield "there is no finish_reason"
    if most is not None and (count > most or (choice.finish_reason == "length" and count != most)):
        yield f"{count} tokens of at most {most}, ended by {choice.finish_reason}"
    allowed = body.get("allowed_token_ids")
    if allowed is not None and not set(choice.token_ids) <= set(allowed):
        yield "a token is not among allowed_token_ids"
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(choice.stop_reason, str) and choice.stop_reason not in stops:
        yield "stop_reason is none of the stop strings"
    if stops and not wanted.echo:
        included = bool(body.get("include_stop_str_in_output")) and isinstance(choice.stop_reason, str)
        if included and not choice.text.endswith(str(choice.stop_reason)):
            yield "the text does not end with its stop string"
        if not included and any(each in choice.text for each in stops):
            yield "the text holds a stop string"


def _check_prompt(wanted: Wanted, choice: Choice, echo: Sequence[Scored | None]) -> Iterator[str]:
    """The numbers of the prompt, which an echo repeats."""
    rows = choice.prompt_numbers
    if wanted.prompt_alternatives is None:
        if rows is not None:
            yield "prompt_logprobs without having been asked for"
        return
    if rows is None:
        yield "prompt_logprobs are missing"
        return
    start = wanted.prompt_start
    expected = [None] * min(start, len(choice.prompt)) + choice.prompt[start:]
    if [row.token_id if row else None for row in rows] != expected:
        yield f"{len(rows)} prompt_logprobs of {len(choice.prompt)} tokens, or of others"
        return
    for place, row in enumerate(rows):
        for wrong in check_scored(row, wanted.prompt_alternatives, wanted.prompt_named) if row else ():
            yield f"prompt token {place}: {wrong}"
    if echo and [row.logprob if row else None for row in echo] != [row.logprob if row else None for row in rows]:
        yield "an echo and prompt_logprobs tell different numbers"


def check_scored(row: Scored, alternatives: int, named: Sequence[int]) -> Iterator[str]:
    """The numbers of one token: possible ones, and in agreement with each other."""
    if not -9999 <= row.logprob <= 0:  # -9999 is minus infinity on the wire
        yield f"the log-prob is {row.logprob}"
    if row.rank is not None and row.rank < 1:
        yield f"the rank is {row.rank}"
    if row.top is None:
        return
    ids = [token_id for token_id, _, _ in row.top]
    if len(ids) != alternatives or (named and ids != list(named)) or len(set(ids)) != len(ids):
        yield f"{len(ids)} alternatives instead of {alternatives}, or others"
        return
    if not all(-9999 <= logprob <= 0 for _, logprob, _ in row.top):
        yield "the log-prob of an alternative is impossible"
    if sum(math.exp(logprob) for _, logprob, _ in row.top) > 1 + _SUM:
        yield "the alternatives have a probability above 1"
    yield from _check_ranks(row, row.top, named)


def _check_ranks(row: Scored, top: Sequence[Alternative], named: Sequence[int]) -> Iterator[str]:
    if not named and [rank for _, _, rank in top] != list(range(1, len(top) + 1)):
        yield "the alternatives' ranks are not 1, 2, 3 ..."
    own = next((each for each in top if each[0] == row.token_id), None)
    if own is not None and (row.logprob, row.rank or own[2]) != own[1:]:
        yield f"the token has log-prob {row.logprob} and rank {row.rank}, among the alternatives {own[1:]}"
    ranked = [(rank, logprob) for _, logprob, rank in top if rank is not None]
    if own is None:
        # Without a rank it comes after the best.
        ranked += [] if row.rank is None and named else [(row.rank or len(top) + 1, row.logprob)]
    ranked.sort(key=lambda each: each[0])
    for (rank, logprob), (next_rank, next_logprob) in itertools.pairwise(ranked):
        if rank == next_rank or logprob < next_logprob:
            yield f"rank {rank} has log-prob {logprob}, rank {next_rank} has {next_logprob}"


def _first(row: Scored, wanted: Wanted) -> int | None:
    """The most likely token, where it is told."""
    return row.top[0][0] if row.top and not wanted.named else None


def _error_message(body: bytes) -> str:
    """The server's own words, which are about fields and numbers."""
    try:
        error = json.loads(body)["error"]
        return f"{error['code']}: {str(error['message'])[:200]}"
    except (ValueError, KeyError, TypeError):
        return f"{len(body)} bytes"


def _told(error: ValidationError) -> str:
    """What is wrong first, and where, without what was given."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def check_other(ask: Ask, answer: Answer) -> list[str]:
    """An answer that is none of a model's, of status 200."""
    try:
        return list(ask.check(answer.body))
    except ValidationError as error:
        return [f"an answer of another shape: {_told(error)}"]
