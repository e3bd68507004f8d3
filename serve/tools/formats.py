"""Text formats of tool calls, and which of them a chat template teaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.text.output_parts import Parser, PartReader, Reading
from serve.text.output_splitter import ReasoningMarks
from serve.tools import harmony
from serve.tools.call_reader import CallReader
from serve.tools.parsers import (
    GemmaCall,
    Leading,
    Marked,
    json_objects,
    llama_tag,
    mistral,
    python_lines,
    python_list,
    qwen_coder,
)


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """How calls are written if a grammar holds the model to them."""

    open: str
    before: str  # the arguments; NAME is the tool's
    after: str
    separator: str
    close: str = ""
    style: str = "json"  # of the arguments, see `serve.grammar.argument_styles`

    def text(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls with arguments in JSON, each a name and the arguments."""
        texts = (f"{self.before.replace('NAME', name)}{arguments}{self.after}" for name, arguments in calls)
        return f"{self.open}{self.separator.join(texts)}{self.close}"


_OBJECT = '{"name": "NAME", "arguments": '
WRITTEN_HERMES = WrittenCall("", f"<tool_call>\n{_OBJECT}", "}\n</tool_call>", "\n")


@dataclass(frozen=True, slots=True)
class CallFormat:
    name: str  # of --tool-call-parser
    marks: tuple[str, ...]  # all texts that may be special tokens
    parse: Leading | Marked | harmony.Channels
    hints: tuple[str, ...] = ()  # a template of this format contains one of them
    written: WrittenCall | None = None  # with arguments in JSON
    styled: WrittenCall | None = None  # with arguments that are no JSON
    short_ids: bool = False
    answer: str = ""  # header of content, if calls, content and reasoning are messages of their own

    def parser(self, tools: Mapping[str, Mapping[str, Any]]) -> Parser:
        """A parser of outputs; `tools` are the schemas of the parameters by name."""

        def parse(reader: PartReader) -> Reading[None]:
            yield from self.parse(CallReader(reader, tools, short_ids=self.short_ids))

        return parse


def _json(*begin: str, end: tuple[str, ...] = ()) -> Marked:
    return Marked(begin, end, json_objects)


HERMES = CallFormat(
    "hermes",
    ("<tool_call>", "</tool_call>"),
    _json("<tool_call>", end=("</tool_call>",)),
    ("<tool_call>",),
    WRITTEN_HERMES,
)
# The first whose hint a template contains is its format.
FORMATS = (
    CallFormat(
        "qwen3_coder",
        ("<tool_call>", "</tool_call>"),
        Marked(("<tool_call>", "<function="), ("</tool_call>",), qwen_coder),
        ("<function=",),
        styled=WrittenCall("", "<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>", "\n", style="qwen_xml"),
    ),
    CallFormat(
        "gemma4",
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
        Marked(("<|tool_call>",), (), GemmaCall('<|"|>', "<tool_call|>")),
        ("<|tool_call>",),
        styled=WrittenCall("", "<|tool_call>call:NAME{", "}<tool_call|>", "", style="gemma4"),
    ),
    CallFormat(
        "functiongemma",
        ("<start_function_call>", "<end_function_call>", "<escape>"),
        Marked(("<start_function_call>",), (), GemmaCall("<escape>", "<end_function_call>")),
        ("<start_function_call>",),
        styled=WrittenCall("", "<start_function_call>call:NAME{", "}<end_function_call>", "", style="functiongemma"),
    ),
    CallFormat(
        "lfm2",
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        Marked(("<|tool_call_start|>",), ("<|tool_call_end|>",), python_list),
        ("<|tool_call_start|>", "<|tool_list_start|>"),
        styled=WrittenCall("<|tool_call_start|>[", "NAME(", ")", ", ", "]<|tool_call_end|>", "python"),
    ),
    CallFormat(
        "olmo3",
        ("<function_calls>", "</function_calls>"),
        Marked(("<function_calls>",), ("</function_calls>",), python_lines),
        ("<function_calls>",),
        styled=WrittenCall("<function_calls>", "NAME(", ")", "\n", "</function_calls>", "python"),
    ),
    CallFormat(
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        Marked(("[TOOL_CALLS]",), (), mistral),
        ("[ARGS]",),
        WrittenCall("", "[TOOL_CALLS]NAME[ARGS]", "", ""),
        short_ids=True,
    ),
    CallFormat(
        "mistral_v3",
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        Marked(("[TOOL_CALLS]",), (), mistral),
        ("[TOOL_CALLS]",),
        WrittenCall("[TOOL_CALLS][", _OBJECT, "}", ", ", "]"),
        short_ids=True,
    ),
    CallFormat(
        "phi4_mini",
        ("<|tool_call|>", "<|/tool_call|>"),
        _json("<|tool_call|>", "functools", end=("<|/tool_call|>",)),
        ("<|/tool_call|>", "functools["),
        WrittenCall("<|tool_call|>[", _OBJECT, "}", ", ", "]<|/tool_call|>"),
    ),
    CallFormat(
        "granite",
        ("<|tool_call|>", "<tool_call>"),
        _json("<|tool_call|>", "<tool_call>", end=("</tool_call>",)),
        ("<|tool_call|>",),
        WrittenCall("<|tool_call|>[", _OBJECT, "}", ", ", "]"),
    ),
    CallFormat(
        "granite_20b",
        ("<function_call>",),
        _json("<function_call>"),
        ("<function_call>",),
        WrittenCall("", f"<function_call> {_OBJECT}", "}", "\n"),
    ),
    CallFormat(
        "pythonic",
        ("<|python_start|>", "<|python_end|>"),
        Leading("[", python_list, Marked(("<|python_start|>",), ("<|python_end|>",), python_list)),
        ("<|python_start|>",),
        styled=WrittenCall("[", "NAME(", ")", ", ", "]", "python"),
    ),
    CallFormat(
        "llama3",
        ("<|python_tag|>",),
        Leading("{", json_objects, Marked(("<|python_tag|>",), (), llama_tag)),
        ("<|python_tag|>", "Environment: ipython"),
        WrittenCall("", '{"name": "NAME", "parameters": ', "}", "; "),
    ),
    CallFormat(
        "smollm3",
        ("<tool_call>", "</tool_call>", "<code>", "</code>"),
        Marked(("<tool_call>", "<code>"), ("</tool_call>", "</code>"), llama_tag),
        ("python_tools",),
        WrittenCall("", f"<tool_call>{_OBJECT}", "}</tool_call>", "\n"),
    ),
    CallFormat(
        "harmony",
        harmony.MARKS,
        harmony.Channels(),
        ("<|channel|>commentary",),
        WrittenCall("", harmony.CALL, "", "<|end|>"),
        answer=harmony.ANSWER,
    ),
    HERMES,
)
_OTHER_HINTS = ("<arg_key>", "]<]minimax[>[")  # of formats that are not known, which share marks with others

REASONING = {
    "think": ReasoningMarks("<think>", "</think>"),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
    "gemma4": ReasoningMarks("<|channel>thought", "<channel|>"),
    "seed_oss": ReasoningMarks("<seed:think>", "</seed:think>"),
    "harmony": ReasoningMarks("<|channel|>analysis<|message|>", "<|end|>", harmony.TURN, harmony.ANSWER),
}


def format_of(template: str) -> CallFormat | None:
    """The format of calls that a chat template contains; None if it is not known."""
    if any(hint in template for hint in _OTHER_HINTS):
        return None
    return next((item for item in FORMATS if any(hint in template for hint in item.hints)), None)


def reasoning_of(template: str) -> ReasoningMarks | None:
    """The marks of reasoning that a chat template contains."""
    return next((marks for marks in REASONING.values() if (marks.start if marks.turn else marks.end) in template), None)
