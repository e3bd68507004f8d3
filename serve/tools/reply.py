"""ReplyFormat: how the output of one request is divided into reasoning, content and calls; Reply: these parts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.grammar import Grammar
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.fields import GrammarRequest, compile_grammar
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.text.chat import PromptError
from serve.text.output_parts import ArgumentsDelta, CallEnd, CallStart, Part, TextPart
from serve.text.output_splitter import OutputSplitter, ReasoningMarks
from serve.text.tokenizer import Tokenizer
from serve.tools.call_grammar import call_grammar, required_format, schema_error
from serve.tools.definitions import ToolRequest, custom_input
from serve.tools.formats import CallFormat
from serve.tools.markup import ChatMarkup
from serve.tools.thinking import ThinkingGrammar

_THINKING = ("enable_thinking", "thinking")  # variables of templates


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    tools: ToolRequest | None
    calls: CallFormat | None  # None: calls are content
    reasoning: ReasoningMarks | None  # None: it is content
    starts_in_reasoning: bool = False
    thinking: ReasoningMarks | None = None  # of reasoning that may precede the answer, whether it is separated or not
    budget: int | None = None  # tokens of the reasoning
    warnings: Sequence[str] = ()

    @property
    def is_plain(self) -> bool:
        """True if all of the output is content that starts at once."""
        return self.calls is None and self.reasoning is None and self.thinking is None

    def splitter(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> OutputSplitter:
        schemas = self.tools.schemas if self.tools is not None and self.tools.callable else {}
        parse = None if self.calls is None else self.calls.parser(schemas)
        return OutputSplitter(
            tokenizer,
            parse,
            reasoning=self.reasoning,
            starts_in_reasoning=self.starts_in_reasoning,
            kept_ids=self.kept_ids(tokenizer),
            skip_special_tokens=skip_special_tokens,
            single_call=self.tools is not None and self.tools.is_single and not self.tools.is_required,
        )

    @property
    def custom_names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools.tools if tool.is_custom) if self.tools else frozenset()

    def grammar(self, stated: GrammarRequest | None, *, ignore_eos: bool = False) -> GrammarRequest | None:
        """The grammar of an answer; `stated` is that of the request's other fields.

        Raises:
            PromptError: grammar and tools cannot be combined, or a tool's grammar is not supported.
        """
        if self.calls is None or self.tools is None or not self.tools.callable:
            return stated
        is_required = self.tools.is_required
        if stated is not None:
            may_be = stated.spec.kind is GrammarKind.JSON_SCHEMA
            if not may_be or (is_required and not stated.param.startswith("response_format")):
                verb = "must" if is_required else "may"
                message = f"`{stated.param}` cannot be combined with tools that the model {verb} call."
                raise PromptError(stated.param, message)
        alternative = None if is_required else stated
        text = call_grammar(self.tools, self.calls, alternative)
        if text is None:
            return None
        if ignore_eos:
            message = "`ignore_eos` cannot be combined with tools that a grammar holds."
            raise PromptError("ignore_eos", message)
        whitespace = alternative.spec.whitespace if alternative else None
        unused: tuple[GrammarRequest, ...] = (stated,) if stated is not None and is_required else ()
        unused += tuple(  # for errors that name their lines
            GrammarRequest(GrammarSpec(GrammarKind.GRAMMAR, f"{tool.lark}\n%llguidance {{}}"), tool.param)
            for tool in self.tools.callable
            if tool.lark is not None
        )
        return GrammarRequest(GrammarSpec(GrammarKind.STRUCTURAL_TAG, text, whitespace), "tools", unused)

    def with_thinking(
        self, tokenizer: Tokenizer, vocab_size: int, answer: Grammar | None, *, is_of_calls: bool = False
    ) -> Grammar | None:
        """The grammar of the output, which may start with reasoning. `is_of_calls`: the answer has its headers."""
        if self.thinking is None or (answer is None and self.budget is None):
            return answer
        return ThinkingGrammar(
            tokenizer,
            self.thinking,
            answer,
            is_open=self.starts_in_reasoning,
            budget=self.budget,
            vocab_size=vocab_size,
            has_header=is_of_calls,
        )

    def kept_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that are marks of calls or reasoning."""
        marks = (*(self.calls.marks if self.calls else ()),)
        if (reasoning := self.thinking or self.reasoning) is not None:
            marks += (reasoning.start, reasoning.end, reasoning.answer)
        return frozenset(
            index
            for text, index in tokenizer.added_tokens().items()
            if index in tokenizer.special_ids and any(text in mark for mark in marks)
        )


def reply_format(
    markup: ChatMarkup,
    tools: ToolRequest | None,
    prompt: str,
    *,
    separates_reasoning: bool,
    budget: int | None,
) -> ReplyFormat:
    """The form of the output after a prompt."""
    calls = None
    if tools is not None and tools.callable:
        calls = required_format(tools, markup.calls) if tools.is_required else markup.calls
    elif markup.calls.answer and separates_reasoning:
        calls = markup.calls
    marks, end = markup.reasoning, prompt.rstrip()
    may_think = marks is not None and not end.endswith(marks.end)
    if marks is not None and marks.turn:
        may_think = end.endswith((marks.turn, marks.start))
    return ReplyFormat(
        tools,
        calls,
        marks if separates_reasoning else None,
        starts_in_reasoning=marks is not None and end.endswith(marks.start),
        thinking=marks if may_think else None,
        budget=budget,
        warnings=markup.warnings(tools),
    )


def thinking_variables(effort: str | None, thinks: bool | None) -> dict[str, Any]:
    """Variables of the template for a request's `reasoning_effort` and `enable_thinking`."""
    if thinks is None and effort is not None:
        thinks = effort != "none"
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    return variables if thinks is None else variables | dict.fromkeys(_THINKING, thinks)


def thinking_budget(given: Mapping[str, int | None], effort: str | None, *, has_reasoning: bool) -> int | None:
    """Maximum number of tokens of the reasoning, from the fields that may state it; -1 states none.

    Raises:
        PromptError: the model does not reason, or the fields differ.
    """
    budgets = {name: value for name, value in given.items() if value not in (None, -1)}
    names = [*budgets]
    if budgets and not has_reasoning:
        raise PromptError(names[0], f"`{names[0]}`: this model has no marks of reasoning.")
    if len(set(budgets.values())) > 1:
        raise PromptError(names[1], f"`{names[1]}` differs from `{names[0]}`.")
    return 0 if effort == "none" and has_reasoning else next(iter(budgets.values()), None)


async def compile_output(
    request: GrammarRequest | None, reply: ReplyFormat | None, compiler: GrammarCompiler, key: str | None = None
) -> Grammar | None:
    """The grammar of an output, with its reasoning. Raises as `compile_grammar`."""
    try:
        grammar = None if request is None else await compile_grammar(request, compiler, key)
    except PromptError as error:
        if error.param != "tools" or reply is None or reply.tools is None:
            raise
        raise schema_error(reply.tools, str(error)) from None
    if reply is None:
        return grammar
    is_of_calls = request is not None and request.param == "tools"
    return reply.with_thinking(compiler.tokenizer, compiler.vocab_size, grammar, is_of_calls=is_of_calls)


@dataclass(slots=True)
class Call:
    id: str
    name: str
    is_custom: bool
    arguments: str = ""
    end: CallEnd | None = None  # None: the output ended within the call

    @property
    def text(self) -> str:
        """The arguments of a function, or the input of a custom tool once it is complete."""
        if not self.is_custom:
            return self.arguments
        return custom_input(self.arguments) if self.end else ""


@dataclass(slots=True)
class Reply:
    """The parts of one output, joined."""

    content: str
    reasoning: str | None
    calls: list[Call]

    @classmethod
    def of(cls, parts: Iterable[Part], reply: ReplyFormat) -> "Reply":
        content, reasoning, arguments = list[str](), list[str](), list[list[str]]()
        calls: list[Call] = []
        for part in parts:
            match part:
                case TextPart(kind="content"):
                    content.append(part.text)
                case TextPart():
                    reasoning.append(part.text)
                case CallStart():
                    calls.append(Call(part.id, part.name, part.name in reply.custom_names))
                    arguments.append([])
                case ArgumentsDelta():
                    arguments[part.index].append(part.text)
                case CallEnd():
                    calls[part.index].end = part
        for call, texts in zip(calls, arguments, strict=True):
            call.arguments = "".join(texts)
        return cls("".join(content), "".join(reasoning) if reasoning else None, calls)


def logprob_of(tokens: range, logprobs: Sequence[float] | NDArray[np.float32]) -> float:
    """Sum of the log-probs of some tokens; `logprobs` are those of the whole output."""
    return float(np.sum(logprobs[tokens.start : tokens.stop], dtype=np.float64))
