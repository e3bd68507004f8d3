"""Reply: a model's answer, whole or put together from its events, with the numbers of all endpoints in one form."""

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
from tools.soak.ask import Wanted
from tools.soak.client import Answer

type Alternative = tuple[int, float, int | None]  # token id, log-prob, rank where it is told


class BrokenAnswerError(Exception):
    """It is no answer of the API."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The numbers of one token."""

    token_id: int
    logprob: float
    rank: int | None  # None: not told
    top: tuple[Alternative, ...] | None  # None: not told apart


@dataclass(slots=True)
class Choice:
    """One answer to a prompt."""

    index: int
    prompt: list[int] = field(default_factory=list)
    prompt_numbers: list[Scored | None] | None = None  # of each token of the prompt; None: not told
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    numbers: list[Scored | None] = field(default_factory=list)  # of an echoed prompt, and of what is generated
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Reply:
    """A model's answer."""

    id: str
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: UsageAnswer | None = None
    arrivals: list[float] = field(default_factory=list)  # when events with tokens came

    def choice(self, index: int) -> Choice:
        """That of an index, empty at first."""
        return self.choices.setdefault(index, Choice(index))


def read_reply(answer: Answer, wanted: Wanted) -> Reply:
    """Reads an answer of status 200.

    Raises:
        BrokenAnswerError: the stream is torn, or has not the form of one.
        pydantic.ValidationError: a part has another shape than the API says.
    """
    if not wanted.stream:
        return (_whole_chat if wanted.chat else _whole_text)(answer.body, wanted)
    return (_streamed_chat if wanted.chat else _streamed_text)(list(_events(answer)), wanted)


def _events(answer: Answer) -> Iterator[tuple[float, bytes]]:
    """When each event came, and what it holds, up to the [DONE] that must end them."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        raise BrokenAnswerError("a stream has another content type")
    rest, done = b"", False
    for at, piece in answer.pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if done:
                raise BrokenAnswerError("a stream goes on after [DONE]")
            if not event.startswith(b"data: "):
                raise BrokenAnswerError("a stream has a line that is no event")
            if event == b"data: [DONE]":
                done = True
            elif event.startswith(b'data: {"error"'):
                raise BrokenAnswerError(f"a stream has failed: {event[6:300].decode(errors='replace')}")
            else:
                yield at, event[6:]
    if rest or not done:
        raise BrokenAnswerError("a stream ends without [DONE]")


def _whole_chat(body: bytes, wanted: Wanted) -> Reply:
    told = ChatCompletionAnswer.model_validate_json(body)
    reply = Reply(told.id, usage=told.usage)
    prompt = told.prompt_token_ids or []
    numbers = _of_prompt(told.prompt_logprobs, told.prompt_logprobs_columns, wanted)
    for each in told.choices:
        choice = reply.choice(each.index)
        choice.prompt, choice.prompt_numbers = prompt, numbers
        choice.text, choice.token_ids = each.message.content, each.token_ids or []
        choice.numbers = _of_chat(each.logprobs)
        choice.finish_reason, choice.stop_reason = each.finish_reason, each.stop_reason
    return reply


def _streamed_chat(events: Sequence[tuple[float, bytes]], wanted: Wanted) -> Reply:
    chunks = [(at, ChatChunk.model_validate_json(event)) for at, event in events]
    reply = Reply(_one_id([chunk.id for _, chunk in chunks]))
    prompt: list[int] = []
    numbers: list[Scored | None] | None = None
    for at, chunk in chunks:
        prompt = chunk.prompt_token_ids or prompt
        numbers = _of_prompt(chunk.prompt_logprobs, chunk.prompt_logprobs_columns, wanted) or numbers
        reply.usage = chunk.usage or reply.usage
        for each in chunk.choices:
            choice = _unfinished(reply, each.index)
            choice.text += each.delta.content
            choice.token_ids += each.token_ids or []
            choice.numbers += _of_chat(each.logprobs)
            choice.finish_reason, choice.stop_reason = each.finish_reason, each.stop_reason
            reply.arrivals += [at] if each.token_ids else []
    for choice in reply.choices.values():
        choice.prompt, choice.prompt_numbers = prompt, numbers
    return reply


def _whole_text(body: bytes, wanted: Wanted) -> Reply:
    told = CompletionAnswer.model_validate_json(body)
    reply = Reply(told.id, usage=told.usage)
    for each in told.choices:
        _add_text(reply.choice(each.index), each, wanted)
    return reply


def _streamed_text(events: Sequence[tuple[float, bytes]], wanted: Wanted) -> Reply:
    chunks = [(at, CompletionChunk.model_validate_json(event)) for at, event in events]
    reply = Reply(_one_id([chunk.id for _, chunk in chunks]))
    for at, chunk in chunks:
        reply.usage = chunk.usage or reply.usage
        for each in chunk.choices:
            _add_text(_unfinished(reply, each.index), each, wanted)
            reply.arrivals += [at] if each.token_ids else []
    return reply


def _add_text(choice: Choice, told: CompletionChunkChoice, wanted: Wanted) -> None:
    choice.prompt = told.prompt_token_ids or choice.prompt
    numbers = _of_prompt(told.prompt_logprobs, told.prompt_logprobs_columns, wanted)
    choice.prompt_numbers = numbers or choice.prompt_numbers
    if told.logprobs is not None:
        # The ids of an echo are the prompt's, which stand in the same event.
        choice.numbers += _of_text([*(told.prompt_token_ids or []), *(told.token_ids or [])], told.logprobs, wanted)
        choice.offsets += told.logprobs.text_offset
    choice.text += told.text
    choice.token_ids += told.token_ids or []
    choice.finish_reason, choice.stop_reason = told.finish_reason, told.stop_reason


def _unfinished(reply: Reply, index: int) -> Choice:
    choice = reply.choice(index)
    if choice.finish_reason is not None:
        raise BrokenAnswerError(f"choice {index} goes on after its finish_reason")
    return choice


def _one_id(ids: Sequence[str]) -> str:
    if len(set(ids)) != 1:
        raise BrokenAnswerError(f"the events of a stream have {len(set(ids))} ids")
    return ids[0]


def _of_chat(told: ChatLogprobsAnswer | None) -> list[Scored | None]:
    return [
        Scored(
            each.token_id, each.logprob, each.rank, tuple((o.token_id, o.logprob, o.rank) for o in each.top_logprobs)
        )
        for each in (told.content if told else ())
    ]


def _of_text(ids: Sequence[int], told: CompletionLogprobsAnswer, wanted: Wanted) -> list[Scored | None]:
    """Ranks are not told, but the best come in their order."""
    count = len(told.tokens)
    columns = (told.token_logprobs, told.top_logprobs, told.top_token_ids, told.text_offset)
    if any(len(column) != count for column in columns):
        raise BrokenAnswerError("the columns of logprobs have several lengths")
    if count > len(ids):
        raise BrokenAnswerError(f"logprobs hold {count} tokens, of {len(ids)}")
    rows: list[Scored | None] = []
    for token_id, logprob, by_name, top_ids, _ in zip(ids[len(ids) - count :], *columns, strict=True):
        if logprob is None or by_name is None or top_ids is None:
            rows.append(None)
            continue
        # By name the token itself comes first, then the others; where tokens read alike, they share a name.
        order = list(dict.fromkeys((token_id, *top_ids)))
        values = dict(zip(order, by_name.values(), strict=False))
        ranks = itertools.repeat(None) if wanted.named else itertools.count(1)
        top = (
            tuple((each, values[each], rank) for each, rank in zip(top_ids, ranks, strict=False))
            if len(values) == len(by_name) == len(order)
            else None
        )
        rows.append(Scored(token_id, logprob, None, top))
    return rows


def _of_prompt(
    entries: Sequence[dict[str, PromptEntry] | None] | None, columns: PromptColumns | None, wanted: Wanted
) -> list[Scored | None] | None:
    if columns is not None:
        return _of_columns(columns)
    return None if entries is None else [_of_entry(entry, wanted) if entry else None for entry in entries]


def _of_entry(entry: dict[str, PromptEntry], wanted: Wanted) -> Scored:
    """Its own numbers come first; they are among the alternatives only if it is one of the best, or named."""
    told = {int(token): (each.logprob, each.rank) for token, each in entry.items()}
    alternatives = wanted.prompt_alternatives or 0
    best = sorted(told, key=lambda token: told[token][1])[:alternatives]
    if len(told) > alternatives + 1 or len({rank for _, rank in told.values()}) != len(told):
        raise BrokenAnswerError("an entry of prompt_logprobs holds too many tokens, or a rank twice")
    if not set(wanted.prompt_named) <= set(told):
        raise BrokenAnswerError("an entry of prompt_logprobs lacks an id that was named")
    token_id = next(iter(told))
    return Scored(token_id, *told[token_id], tuple((each, *told[each]) for each in wanted.prompt_named or best))


def _of_columns(columns: PromptColumns) -> list[Scored | None]:
    names = ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs", "top_ranks")
    told = [getattr(columns, name) for name in names]
    if len({len(column) for column in told}) != 1:
        raise BrokenAnswerError("the columns of prompt_logprobs have several lengths")
    rows = [
        Scored(token_id, logprob, rank, tuple(zip(*top, strict=True)))
        for token_id, logprob, rank, *top in zip(*told, strict=True)
    ]
    return [*itertools.repeat(None, columns.start), *rows]
