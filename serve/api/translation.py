"""Endpoints of other APIs on top of chat: their requests become chat requests, and outputs become their items."""

import asyncio
import re
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import orjson
from pydantic import PrivateAttr
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from serve.api.chat import ChatHandler, token_entries
from serve.api.errors import APIError
from serve.api.generation import output_logprobs
from serve.api.job import Job
from serve.api.json_stream import Body, dump, make_body
from serve.api.middleware import AnswerRecord
from serve.api.parsing import validate
from serve.api.reply import call_logprobs
from serve.api.requests import ChatCompletionRequest, OutputFields
from serve.jobs.output import Output
from serve.text.chat import PromptError
from serve.text.output_parts import ArgumentsDelta, CallEnd, CallStart, Part, TextPart


class TranslatedChat(ChatCompletionRequest):
    """A chat request that was made from a request of another API."""

    _source: Any = PrivateAttr(None)

    @property
    def source(self) -> Any:
        """What the answer needs of the request that was received."""
        return self._source


@dataclass(frozen=True, slots=True)
class Translation:
    body: OutputFields  # whose fields chat has, too
    fields: dict[str, Any]  # further fields of the chat request
    source: Any = None  # what the answer needs of the request


type Renames = Sequence[tuple[str, str]]  # pattern of a field of chat, and the field of the other API
type TranslatedJob = Job[TranslatedChat]


@dataclass(slots=True)
class Item:
    """Consecutive tokens of one kind: reasoning, content, or one call of a tool with its marks."""

    index: int
    kind: Literal["reasoning", "content", "call"]
    tokens: range  # of the output
    text: str = ""  # of a call: the arguments' JSON
    call: CallStart | None = None
    end: CallEnd | None = None  # of a call that is complete


@dataclass(slots=True)
class Items:
    """The items of one output. Every token belongs to one of them: those between two items to the second one.

    The mark at the end of reasoning belongs to the reasoning.
    """

    items: list[Item] = field(default_factory=list)

    @property
    def last(self) -> Item:
        return self.items[-1]

    def add(self, part: Part) -> bool:
        """Add a part to the last item, or to a new one: then return True."""
        kind = _kind(part)
        is_new = isinstance(part, CallStart) or not self.items or self.last.kind != kind
        if is_new:
            start = self.last.tokens.stop if self.items else 0
            self.items.append(Item(len(self.items), kind, range(start, start)))
        item = self.last
        self.extend(part.tokens.stop)
        match part:
            case TextPart(text=text) | ArgumentsDelta(text=text):
                item.text += text
            case CallStart():
                item.call = part
            case CallEnd():
                item.end = part
        return is_new

    def end_reasoning(self, part: Part, answer_start: int | None) -> bool:
        """Before `part` is added: add the tokens before the answer to the reasoning if it ends; True if it does."""
        if not self.items or self.last.kind != "reasoning" or _kind(part) == "reasoning" or answer_start is None:
            return False
        self.extend(answer_start)
        return True

    def extend(self, end: int) -> None:
        """The tokens before `end` belong to the last item."""
        tokens = self.last.tokens
        self.last.tokens = range(tokens.start, max(tokens.stop, end))

    def complete(self, num_tokens: int) -> bool:
        """Add the rest of the output's tokens; True if that needs a new item, of an output without text."""
        is_new = not self.items and self.add(TextPart("content", "", range(0)))
        self.extend(num_tokens)
        return is_new


def _kind(part: Part) -> Literal["reasoning", "content", "call"]:
    return part.kind if isinstance(part, TextPart) else "call"


class Writer(Protocol):
    """Writes one answer: the events of a stream in their order, or the complete document."""

    def start(self, cached_tokens: int) -> Iterator[dict[str, Any]]: ...

    def open(self, item: Item) -> Iterator[dict[str, Any]]: ...

    def extend(self, item: Item, text: str, logprobs: Any) -> Iterator[dict[str, Any]]:
        """`logprobs`: entries of the new tokens; None if they are not requested."""

    def close(self, item: Item, output: Output) -> Iterator[dict[str, Any]]: ...

    def end(self, items: Sequence[Item], output: Output) -> Iterator[dict[str, Any]]:
        """Close the last item and the answer. Slow: called in a thread."""

    def document(self, items: Sequence[Item], output: Output) -> dict[str, Any]:
        """The complete answer. Slow: called in a thread."""


class _ReceivedFieldError(Exception):
    """An error in a field of the request that was received."""

    def __init__(self, cause: APIError | PromptError) -> None:
        super().__init__(cause)
        self.cause = cause


class TranslatedHandler(ChatHandler[TranslatedChat]):
    """An endpoint of another API: one choice, whose output consists of items."""

    model = TranslatedChat
    collects_streams = True
    renames: ClassVar[Renames]

    async def __call__(self, request: HTTPRequest) -> Response:
        try:
            with renamed(self.renames):
                return await super().__call__(request)
        except _ReceivedFieldError as error:
            raise error.cause from None

    def _read(self, data: dict[str, Any], record: AnswerRecord) -> TranslatedChat:
        try:
            translation = self._translated(data, record)
        except (APIError, PromptError) as error:
            raise _ReceivedFieldError(error) from None
        shared = {name: getattr(translation.body, name) for name in OutputFields.model_fields}
        chat = validate(TranslatedChat, shared | translation.fields, self._context.unknown_fields)
        chat._source = translation.source
        return chat

    @abstractmethod
    def _translated(self, data: dict[str, Any], record: AnswerRecord) -> Translation:
        """Validate the fields of a body and translate them. Raise APIError or PromptError if one is invalid."""

    @abstractmethod
    def _writer(self, job: TranslatedJob) -> Writer: ...

    async def _chunks(self, job: TranslatedJob) -> AsyncGenerator[dict[str, Any]]:
        stream = _Stream(job, self._writer(job))
        with renamed(self.renames):
            async with aclosing(self._deltas(job)) as deltas:
                async for _, delta in deltas:
                    for event in stream.events(delta):
                        yield event
            events = stream.last_events()
            while (last := await asyncio.to_thread(next, events, None)) is not None:
                yield last

    def _checked_body(self, job: TranslatedJob, outputs: Sequence[Output]) -> Body:
        [output] = outputs
        items = Items()
        for part in _parts(job, output, 0):
            items.end_reasoning(part, output.answer_start)
            items.add(part)
        items.complete(len(output.token_ids))
        return make_body(self._writer(job).document(items.items, output))


@contextmanager
def renamed(renames: Renames) -> Iterator[None]:
    """Raise errors in fields of the chat request as errors in the fields from which they were made."""
    try:
        yield
    except PromptError as error:
        param = _rename(error.param, renames)
        raise PromptError(param, str(error).replace(f"`{error.param}`", f"`{param}`"), error.code) from None
    except APIError as error:
        if error.param is not None:
            param = _rename(error.param, renames)
            error.param, error.message = param, error.message.replace(f"`{error.param}`", f"`{param}`")
        raise


def _rename(param: str, renames: Renames) -> str:
    return next((re.sub(pattern, name, param) for pattern, name in renames if re.match(pattern, param)), param)


def _parts(job: TranslatedJob, delta: Output, start: int) -> list[Part]:
    """The parts of a delta whose first token has the index `start` in the output."""
    if job.prompts[0].reply is None:
        return [TextPart("content", delta.text, range(start, start + len(delta.token_ids)))]
    return delta.parts


def item_logprobs(job: TranslatedJob, item: Item, output: Output) -> dict[str, Any]:
    """Fields of an item of a finished output: entries of its tokens, and of a complete call the sums of its arguments.

    Empty if log-probs are not requested.
    """
    [choice] = job.choices
    entries = token_entries(job, choice, output, slice(item.tokens.start, item.tokens.stop))
    if choice.alternatives is None:
        return {}
    fields: dict[str, Any] = {
        "logprobs": entries if isinstance(entries, orjson.Fragment) else orjson.Fragment(dump(entries))
    }
    if item.end is not None:
        fields["call_logprobs"] = call_logprobs(item.end, output_logprobs(output, choice.alternatives).logprob)
    return fields


def warnings_of(job: TranslatedJob) -> dict[str, Any]:
    reply = job.prompts[0].reply
    return {"warnings": list(reply.warnings)} if reply is not None and reply.warnings else {}


class _Stream:
    """The events of one stream."""

    def __init__(self, job: TranslatedJob, writer: Writer) -> None:
        self._job = job
        self._writer = writer
        self._items = Items()
        self._output = Output()
        self._unsent = Output()  # tokens that no event has had

    def events(self, delta: Output) -> Iterator[dict[str, Any]]:
        writer, items, output, [choice] = self._writer, self._items, self._output, self._job.choices
        if not output.token_ids and not items.items:
            yield from writer.start(delta.cached_tokens)
        output.add(delta)
        self._unsent.add(delta)
        self._job.unsent.add(choice, output, delta)
        for part in _parts(self._job, delta, len(output.token_ids) - len(delta.token_ids)):
            if items.end_reasoning(part, delta.answer_start):
                yield from self._extended("")
            last = items.last if items.items else None
            if items.add(part):
                yield from () if last is None else writer.close(last, output)
                yield from writer.open(items.last)
            yield from self._extended(part.text if isinstance(part, TextPart | ArgumentsDelta) else "")
        if delta.finish_reason is not None:
            if items.complete(len(output.token_ids)):
                yield from writer.open(items.last)
            yield from self._extended("")

    def last_events(self) -> Iterator[dict[str, Any]]:
        return self._writer.end(self._items.items, self._output)

    def _extended(self, text: str) -> Iterator[dict[str, Any]]:
        """Events of text and tokens that were added to the last item."""
        item, unsent = self._items.last, self._unsent
        count = item.tokens.stop - (len(self._output.token_ids) - len(unsent.token_ids))
        logprobs = token_entries(self._job, self._job.choices[0], unsent, slice(count))
        if text or logprobs:
            yield from self._writer.extend(item, text, logprobs)
        self._unsent = unsent.tokens_from(count)
