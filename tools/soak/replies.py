"""Reply: a generated answer, complete or assembled from a stream, in one form for all endpoints."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve.api.responses import (
    ChatChunk,
    ChatCompletionAnswer,
    ChatLogprobsAnswer,
    CompletionAnswer,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobsAnswer,
    PromptColumns,
    PromptEntry,
    UsageAnswer,
)
from tools.soak.client import Answer
from tools.soak.request import Expectation

type Alternative = tuple[int, float, int | None]  # token id, log-prob, rank or None


class BrokenAnswerError(Exception):
    """The answer violates the API's format."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-prob, rank and alternatives of one token."""

    token_id: int
    logprob: float
    rank: int | None  # None: not in the answer
    top: tuple[Alternative, ...] | None  # None: not in the answer, or ambiguous


@dataclass(slots=True)
class Choice:
    """One choice of an answer."""

    index: int
    prompt: list[int] = field(default_factory=list)
    prompt_logprobs: list[Scored | None] | None = None  # per prompt token; None: not in the answer
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Scored | None] = field(default_factory=list)  # of the echoed prompt and the generated tokens
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Reply:
    """A generated answer."""

    id: str
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: UsageAnswer | None = None
    arrivals: list[float] = field(default_factory=list)  # arrival times of events with tokens

    def choice(self, index: int) -> Choice:
        """Return the choice of an index, created empty at first."""
        return self.choices.setdefault(index, Choice(index))


def read_reply(answer: Answer, expected: Expectation) -> Reply:
    """Parse an answer of status 200.

    Raises:
        BrokenAnswerError: the stream is incomplete or malformed.
        pydantic.ValidationError: the answer does not match the API's schema.
    """
    if not expected.stream:
        return (_chat_reply if expected.chat else _completion_reply)(answer.body, expected)
    return (_streamed_chat_reply if expected.chat else _streamed_completion_reply)(list(_events(answer)), expected)


def _events(answer: Answer) -> Iterator[tuple[float, bytes]]:
    """Yield arrival time and data of each event before the final [DONE]."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        raise BrokenAnswerError("the content type of a stream is not text/event-stream")
    rest, done = b"", False
    for arrival, piece in answer.pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if done:
                raise BrokenAnswerError("a stream continues after [DONE]")
            if not event.startswith(b"data: "):
                raise BrokenAnswerError("a stream contains a line that is not an event")
            if event == b"data: [DONE]":
                done = True
            elif event.startswith(b'data: {"error"'):
                raise BrokenAnswerError(f"a stream failed: {event[6:300].decode(errors='replace')}")
            else:
                yield arrival, event[6:]
    if rest or not done:
        raise BrokenAnswerError("a stream ends without [DONE]")


def _chat_reply(body: bytes, expected: Expectation) -> Reply:
    returned = ChatCompletionAnswer.model_validate_json(body)
    reply = Reply(returned.id, usage=returned.usage)
    prompt = returned.prompt_token_ids or []
    logprobs = _prompt_logprobs(returned.prompt_logprobs, returned.prompt_logprobs_columns, expected)
    for each in returned.choices:
        choice = reply.choice(each.index)
        choice.prompt, choice.prompt_logprobs = prompt, logprobs
        choice.text, choice.token_ids = each.message.content or "", each.token_ids or []
        choice.logprobs = _chat_logprobs(each.logprobs, expected)
        choice.finish_reason, choice.stop_reason = each.finish_reason, each.stop_reason
    return reply


def _streamed_chat_reply(events: Sequence[tuple[float, bytes]], expected: Expectation) -> Reply:
    chunks = [(arrival, ChatChunk.model_validate_json(event)) for arrival, event in events]
    reply = Reply(_one_id([chunk.id for _, chunk in chunks]))
    prompt: list[int] = []
    logprobs: list[Scored | None] | None = None
    for arrival, chunk in chunks:
        prompt = chunk.prompt_token_ids or prompt
        logprobs = _prompt_logprobs(chunk.prompt_logprobs, chunk.prompt_logprobs_columns, expected) or logprobs
        reply.usage = chunk.usage or reply.usage
        for each in chunk.choices:
            choice = _unfinished(reply, each.index)
            choice.text += each.delta.content or ""
            choice.token_ids += each.token_ids or []
            choice.logprobs += _chat_logprobs(each.logprobs, expected)
            choice.finish_reason, choice.stop_reason = each.finish_reason, each.stop_reason
            reply.arrivals += [arrival] if each.token_ids else []
    for choice in reply.choices.values():
        choice.prompt, choice.prompt_logprobs = prompt, logprobs
    return reply


def _completion_reply(body: bytes, expected: Expectation) -> Reply:
    returned = CompletionAnswer.model_validate_json(body)
    reply = Reply(returned.id, usage=returned.usage)
    for each in returned.choices:
        _add_completion(reply.choice(each.index), each, expected)
    return reply


def _streamed_completion_reply(events: Sequence[tuple[float, bytes]], expected: Expectation) -> Reply:
    chunks = [(arrival, CompletionChunk.model_validate_json(event)) for arrival, event in events]
    reply = Reply(_one_id([chunk.id for _, chunk in chunks]))
    for arrival, chunk in chunks:
        reply.usage = chunk.usage or reply.usage
        for each in chunk.choices:
            _add_completion(_unfinished(reply, each.index), each, expected)
            reply.arrivals += [arrival] if each.token_ids else []
    return reply


def _add_completion(choice: Choice, returned: CompletionChunkChoice, expected: Expectation) -> None:
    choice.prompt = returned.prompt_token_ids or choice.prompt
    logprobs = _prompt_logprobs(returned.prompt_logprobs, returned.prompt_logprobs_columns, expected)
    choice.prompt_logprobs = logprobs or choice.prompt_logprobs
    if returned.logprobs is not None:
        # An echo repeats the prompt, whose ids are in the same event.
        choice.logprobs += _completion_logprobs(
            [*(returned.prompt_token_ids or []), *(returned.token_ids or [])], returned.logprobs, expected
        )
        choice.offsets += returned.logprobs.text_offset
    choice.text += returned.text
    choice.token_ids += returned.token_ids or []
    choice.finish_reason, choice.stop_reason = returned.finish_reason, returned.stop_reason


def _unfinished(reply: Reply, index: int) -> Choice:
    choice = reply.choice(index)
    if choice.finish_reason is not None:
        raise BrokenAnswerError(f"choice {index} continues after its finish_reason")
    return choice


def _one_id(ids: Sequence[str]) -> str:
    if len(set(ids)) != 1:
        raise BrokenAnswerError(f"the events of a stream have {len(set(ids))} different ids")
    return ids[0]


def _chat_logprobs(returned: ChatLogprobsAnswer | None, expected: Expectation) -> list[Scored | None]:
    """Convert `logprobs` of a chat. Before requested ids stands the token itself, unless it is one of them."""
    rows: list[Scored | None] = []
    for each in returned.content if returned else ():
        top = [(other.token_id, other.logprob, other.rank) for other in each.top_logprobs]
        if expected.named and each.token_id not in expected.named:
            if top[:1] != [(each.token_id, each.logprob, each.rank)]:
                raise BrokenAnswerError("the token itself is missing beside the requested ids")
            del top[0]
        rows.append(Scored(each.token_id, each.logprob, each.rank, tuple(top)))
    return rows


def _completion_logprobs(
    ids: Sequence[int], returned: CompletionLogprobsAnswer, expected: Expectation
) -> list[Scored | None]:
    """Convert `logprobs` of a completion, which has no ranks: alternatives are ordered by rank."""
    count = len(returned.tokens)
    columns = (returned.token_logprobs, returned.top_logprobs, returned.top_token_ids, returned.text_offset)
    if any(len(column) != count for column in columns):
        raise BrokenAnswerError("the columns of logprobs differ in length")
    if count > len(ids):
        raise BrokenAnswerError(f"logprobs contain {count} tokens, not {len(ids)}")
    rows: list[Scored | None] = []
    for token_id, logprob, by_name, top_ids, _ in zip(ids[len(ids) - count :], *columns, strict=True):
        if logprob is None or by_name is None or top_ids is None:
            rows.append(None)
            continue
        # Keyed by text: the token itself first, then the others. Tokens with equal text share an entry.
        order = list(dict.fromkeys((token_id, *top_ids)))
        values = dict(zip(order, by_name.values(), strict=False))
        ranks = itertools.repeat(None) if expected.named else itertools.count(1)
        top = (
            tuple((each, values[each], rank) for each, rank in zip(top_ids, ranks, strict=False))
            if len(values) == len(by_name) == len(order)
            else None
        )
        rows.append(Scored(token_id, logprob, None, top))
    return rows


def _prompt_logprobs(
    entries: Sequence[dict[str, PromptEntry] | None] | None, columns: PromptColumns | None, expected: Expectation
) -> list[Scored | None] | None:
    if columns is not None:
        return _from_columns(columns)
    return None if entries is None else [_from_entry(entry, expected) if entry else None for entry in entries]


def _from_entry(entry: dict[str, PromptEntry], expected: Expectation) -> Scored:
    """Convert one entry of `prompt_logprobs`: the token itself first, then the alternatives."""
    returned = {int(token): (each.logprob, each.rank) for token, each in entry.items()}
    alternatives = expected.prompt_alternatives or 0
    best = sorted(returned, key=lambda token: returned[token][1])[:alternatives]
    if len(returned) > alternatives + 1 or len({rank for _, rank in returned.values()}) != len(returned):
        raise BrokenAnswerError("an entry of prompt_logprobs contains too many tokens or a duplicate rank")
    if not set(expected.prompt_named) <= set(returned):
        raise BrokenAnswerError("an entry of prompt_logprobs lacks a requested id")
    token_id = next(iter(returned))
    return Scored(
        token_id, *returned[token_id], tuple((each, *returned[each]) for each in expected.prompt_named or best)
    )


def _from_columns(columns: PromptColumns) -> list[Scored | None]:
    names = ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs", "top_ranks")
    returned = [getattr(columns, name) for name in names]
    if len({len(column) for column in returned}) != 1:
        raise BrokenAnswerError("the columns of prompt_logprobs differ in length")
    rows = [
        Scored(token_id, logprob, rank, tuple(zip(*top, strict=True)))
        for token_id, logprob, rank, *top in zip(*returned, strict=True)
    ]
    return [*itertools.repeat(None, columns.start), *rows]
