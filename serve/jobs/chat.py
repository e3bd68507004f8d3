"""Conversations: the options of tools and reasoning, and prompts with the form of their replies."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from serve.jobs.generate import GenerationOptions, SamplingKeywords
from serve.text.chat import ChatFormat, check_messages
from serve.tools.definitions import ToolField, tool_request
from serve.tools.markup import ChatMarkup, markup_of
from serve.tools.reply import ReplyFormat, reply_format, thinking_budget, thinking_variables


class ChatOptions(GenerationOptions):
    """Options of `LLM.chat`, as in chat completions."""

    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template
    tools: list[ToolField] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1)] | None = None  # -1: none
    separate_reasoning: bool = True


class ChatKeywords(SamplingKeywords, total=False):
    """Keyword arguments of `LLM.chat`; the fields of ChatOptions."""

    chat_template_kwargs: dict[str, Any] | None
    tools: Sequence[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool
    enable_thinking: bool | None
    reasoning_effort: str | None
    thinking_token_budget: int | None
    separate_reasoning: bool


class ChatPrompts:
    """Renders conversations for one model."""

    def __init__(self, chats: ChatFormat) -> None:
        self._chats = chats

    @cached_property
    def _markup(self) -> ChatMarkup:
        return markup_of(self._chats.tokenizer.chat_template, self._chats.tokenizer.special_tokens)

    def render(self, messages: Any, options: ChatOptions, param: str) -> tuple[str, ReplyFormat | None]:
        """The text of a prompt, and how its output is divided; None if all of it is content.

        Raise PromptError for invalid messages or options; `param` names the messages.
        """
        markup = self._markup
        tools = tool_request(options.tools, options.tool_choice, parallel=options.parallel_tool_calls)
        effort, has_reasoning = options.reasoning_effort, markup.reasoning is not None
        budgets = {"thinking_token_budget": options.thinking_token_budget}
        budget = thinking_budget(budgets, effort, has_reasoning=has_reasoning)
        variables = thinking_variables(effort, options.enable_thinking) | markup.variables(tools)
        text = self._chats.render(
            markup.messages(check_messages(messages, param=param), tools),
            variables=variables | (options.chat_template_kwargs or {}),
            param=param,
        )
        reply = reply_format(markup, tools, text, separates_reasoning=options.separate_reasoning, budget=budget)
        return text, None if reply.is_plain else reply
