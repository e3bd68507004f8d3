"""Messages of chat completions and the deltas of streams: their schemas, and ReplyWriter, which makes them of parts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from serve.text.output_parts import ArgumentsDelta, CallEnd, CallStart, Part, TextPart
from serve.tools.definitions import custom_input
from serve.tools.reply import Call, Reply, ReplyFormat, logprob_of


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ArgumentLogprob(_Fields):
    """A top-level argument of a call: the tokens of its value, from `start` to before `end` of the output's."""

    name: str
    start: int
    end: int
    logprob: Annotated[float, Field(description="sum over the tokens")]


class CallLogprobs(_Fields):
    """The tokens of a call, with the mark before it."""

    start: int
    end: int
    logprob: float
    arguments: list[ArgumentLogprob]


class CalledFunction(_Fields):
    name: str
    arguments: str


class CalledCustom(_Fields):
    name: str
    input: str


class ToolCallAnswer(_Fields):
    id: str
    type: Literal["function", "custom"]
    function: CalledFunction | None = None
    custom: CalledCustom | None = None
    logprobs: Annotated[CallLogprobs | None, Field(description="of a complete call, if `logprobs` are requested")] = (
        None
    )


class ReplyMessage(_Fields):
    role: str
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: Annotated[str | None, Field(description="the same as `reasoning_content`")] = None
    tool_calls: list[ToolCallAnswer] | None = None


class FunctionDelta(_Fields):
    name: str | None = None
    arguments: str | None = None


class CustomDelta(_Fields):
    name: str | None = None
    input: str | None = None


class ToolCallDelta(_Fields):
    """The first one of a call has its id, type and name; the last one its log-probs, if they are requested."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionDelta | None = None
    custom: CustomDelta | None = None
    logprobs: CallLogprobs | None = None


class ReplyDelta(_Fields):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


_INNER = {"function", "custom"}
_TEXT = {"function": "arguments", "custom": "input"}


class ReplyWriter:
    """Writes one output, whole or step by step."""

    def __init__(self, reply: ReplyFormat, *, includes_reasoning: bool = True) -> None:
        self._reply = reply
        self._includes_reasoning = includes_reasoning
        self._logprobs: list[float] = []  # of all tokens so far
        self._inputs: dict[int, str] = {}  # arguments so far of calls of custom tools
        self.has_calls = False
        self.has_answer = False  # the token where the answer starts has been written

    def deltas(self, parts: Sequence[Part], logprobs: NDArray[np.float32] | None = None) -> list[dict[str, Any]]:
        """Deltas for further parts, in their order, and the log-probs of the tokens that came with them.

        The first delta of a call has no arguments, and a delta has at most one entry for a call.
        """
        if logprobs is not None:
            self._logprobs += logprobs.tolist()
        deltas: list[dict[str, Any]] = []
        for part in parts:
            for field in self._fields(part, with_logprobs=logprobs is not None):
                if not deltas or not _extend(deltas[-1], field):
                    deltas.append(field)
        return deltas

    def message(self, parts: Sequence[Part], logprobs: NDArray[np.float32] | None = None) -> dict[str, Any]:
        """The fields of a message without a role: `content` and others that are not empty."""
        if logprobs is not None:
            self._logprobs += logprobs.tolist()
        reply = Reply.of(parts, self._reply)
        self.has_calls = bool(reply.calls)
        message: dict[str, Any] = {"content": reply.content or (None if reply.calls else "")}
        if reply.reasoning is not None and self._includes_reasoning:
            message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
        if reply.calls:
            message["tool_calls"] = [self._call(call, with_logprobs=logprobs is not None) for call in reply.calls]
        return message

    def _call(self, call: Call, *, with_logprobs: bool) -> dict[str, Any]:
        kind = "custom" if call.is_custom else "function"
        fields: dict[str, Any] = {"id": call.id, "type": kind, kind: {"name": call.name, _TEXT[kind]: call.text}}
        if with_logprobs and call.end is not None:
            fields["logprobs"] = call_logprobs(call.end, self._logprobs)
        return fields

    def _fields(self, part: Part, *, with_logprobs: bool) -> Iterable[dict[str, Any]]:
        match part:
            case TextPart(kind="content"):
                yield {"content": part.text}
            case TextPart():
                if self._includes_reasoning:
                    yield {"reasoning_content": part.text, "reasoning": part.text}
            case CallStart():
                self.has_calls = True
                kind = "custom" if part.name in self._reply.custom_names else "function"
                if kind == "custom":
                    self._inputs[part.index] = ""
                function = {"name": part.name, _TEXT[kind]: ""}
                yield {"tool_calls": [{"index": part.index, "id": part.id, "type": kind, kind: function}]}
            case ArgumentsDelta() if part.index in self._inputs:
                self._inputs[part.index] += part.text
            case ArgumentsDelta():
                yield {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
            case CallEnd():
                if part.index in self._inputs:
                    text = custom_input(self._inputs.pop(part.index))
                    yield {"tool_calls": [{"index": part.index, "custom": {"input": text}}]}
                if with_logprobs:
                    yield {"tool_calls": [{"index": part.index, "logprobs": call_logprobs(part, self._logprobs)}]}


def call_logprobs(call: CallEnd, logprobs: Sequence[float] | NDArray[np.float32]) -> dict[str, Any]:
    """The tokens of a call and of its arguments, with the sums of their log-probs; `logprobs` of the whole output."""

    def span(tokens: range) -> dict[str, Any]:
        return {"start": tokens.start, "end": tokens.stop, "logprob": logprob_of(tokens, logprobs)}

    arguments = [{"name": argument.name} | span(argument.tokens) for argument in call.arguments]
    return span(call.tokens) | {"arguments": arguments}


def _extend(delta: dict[str, Any], field: Mapping[str, Any]) -> bool:
    """Add a field to a delta if that keeps the order of its parts; else return False."""
    ((name, value), *_) = field.items()
    if name != "tool_calls":
        if "tool_calls" in delta or (name != "content" and "content" in delta):
            return False
        for key, text in field.items():
            delta[key] = delta.get(key, "") + text
        return True
    (entry,) = value
    entries = delta.setdefault("tool_calls", [])
    if not entries or entries[-1]["index"] != entry["index"]:
        entries.append(entry)
        return True
    known = entries[-1]
    if "id" in known and _INNER & entry.keys():
        return False
    for key in _INNER & entry.keys():
        texts = known.setdefault(key, {})
        texts |= {name: texts.get(name, "") + text for name, text in entry[key].items()}
    known |= {key: item for key, item in entry.items() if key not in _INNER}
    return True
