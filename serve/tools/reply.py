"""ReplyFormat: how the output of one request is divided into reasoning, content and calls."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.text.output_splitter import OutputSplitter, ReasoningMarks
from serve.text.tokenizer import Tokenizer
from serve.tools.definitions import ToolRequest
from serve.tools.formats import HERMES, CallFormat
from serve.tools.markup import ChatMarkup


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    tools: ToolRequest | None
    calls: CallFormat | None  # None: calls are content
    reasoning: ReasoningMarks | None
    starts_in_reasoning: bool = False
    warnings: Sequence[str] = ()

    @property
    def is_plain(self) -> bool:
        """True if all of the output is content."""
        return self.calls is None and self.reasoning is None

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

    def kept_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that are marks of calls or reasoning."""
        marks = (*(self.calls.marks if self.calls else ()),)
        if self.reasoning is not None:
            marks += (self.reasoning.start, self.reasoning.end)
        return frozenset(
            index
            for text, index in tokenizer.added_tokens().items()
            if index in tokenizer.special_ids and any(text in mark for mark in marks)
        )


def reply_format(
    markup: ChatMarkup, tools: ToolRequest | None, prompt: str, *, separates_reasoning: bool = True
) -> ReplyFormat:
    """The form of the output after a prompt."""
    calls = None
    if tools is not None and tools.callable:
        calls = HERMES if tools.is_required and markup.calls.written is None else markup.calls
    reasoning = markup.reasoning if separates_reasoning else None
    is_open = reasoning is not None and prompt.rstrip().endswith(reasoning.start)
    return ReplyFormat(tools, calls, reasoning, is_open, markup.warnings(tools))
