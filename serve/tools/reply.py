"""ReplyFormat: how the output of one request is divided into reasoning, content and calls."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.engine.grammar import Grammar
from serve.grammar.fields import GrammarRequest
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.text.chat import PromptError
from serve.text.output_splitter import OutputSplitter, ReasoningMarks
from serve.text.tokenizer import Tokenizer
from serve.tools.call_grammar import call_grammar
from serve.tools.definitions import ToolRequest
from serve.tools.formats import HERMES, CallFormat
from serve.tools.markup import ChatMarkup
from serve.tools.thinking import ThinkingGrammar


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
        parse = None if self.calls is None or self.tools is None else self.calls.parser(self.tools.schemas)
        return OutputSplitter(
            tokenizer,
            parse,
            reasoning=self.reasoning,
            starts_in_reasoning=self.starts_in_reasoning,
            kept_ids=self.kept_ids(tokenizer),
            skip_special_tokens=skip_special_tokens,
            single_call=self.tools is not None and self.tools.is_single and not self.tools.is_required,
        )

    def grammar(self, stated: GrammarRequest | None) -> GrammarRequest | None:
        """The grammar of an answer; `stated` is that of the request's other fields.

        Raises:
            PromptError: grammar and tools cannot be combined.
        """
        if self.calls is None or self.tools is None:
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
        whitespace = alternative.spec.whitespace if alternative else None
        unused = stated if is_required else None
        return GrammarRequest(GrammarSpec(GrammarKind.STRUCTURAL_TAG, text, whitespace), "tools", unused)

    def with_thinking(self, tokenizer: Tokenizer, vocab_size: int, answer: Grammar | None) -> Grammar | None:
        """The grammar of the output, which may start with reasoning."""
        if self.thinking is None or (answer is None and self.budget is None):
            return answer
        return ThinkingGrammar(
            tokenizer,
            self.thinking,
            answer,
            is_open=self.starts_in_reasoning,
            budget=self.budget,
            vocab_size=vocab_size,
        )

    def kept_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that are marks of calls or reasoning."""
        marks = (*(self.calls.marks if self.calls else ()),)
        if self.thinking is not None:
            marks += (self.thinking.start, self.thinking.end)
        elif self.reasoning is not None:
            marks += (self.reasoning.start, self.reasoning.end)
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
        calls = HERMES if tools.is_required and markup.calls.written is None else markup.calls
    marks, end = markup.reasoning, prompt.rstrip()
    return ReplyFormat(
        tools,
        calls,
        marks if separates_reasoning else None,
        starts_in_reasoning=marks is not None and end.endswith(marks.start),
        thinking=None if marks is None or end.endswith(marks.end) else marks,
        budget=budget,
        warnings=markup.warnings(tools),
    )
