"""Conversation: what was said so far, as messages for the template and as a file."""

from dataclasses import dataclass, field
from typing import Any

from serve.cli.chat.reply import Reply
from serve.engine.request import EngineLimits
from serve.text.chat_template import ChatTemplateError
from serve.text.tokenizer import Tokenizer, TokenizerError


class PromptError(ValueError):
    """A message cannot be sent; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its reply."""

    user: str
    reply: Reply


@dataclass(slots=True)
class Conversation:
    """The turns, under a system message where there is one."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    unsent: str | None = None  # the last message, if it has no reply

    def messages(self, text: str | None = None) -> list[dict[str, Any]]:
        """All messages, `text` from the user last."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            said += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply.text}]
        return said if text is None else [*said, {"role": "user", "content": text}]

    def take_back(self) -> str | None:
        """The message to send again, if any: one without a reply, or the last, whose reply is taken away."""
        if self.unsent is None and self.turns:
            self.unsent = self.turns.pop().user
        return self.unsent

    def as_json(self) -> dict[str, Any]:
        """Messages, and each reply's tokens with their numbers."""
        return {"messages": self.messages(), "replies": [turn.reply.as_json() for turn in self.turns]}


@dataclass(frozen=True, slots=True)
class Prompter:
    """Makes the prompt of a conversation."""

    tokenizer: Tokenizer
    chat_template: str | None  # instead of the tokenizer's
    limits: EngineLimits

    def prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
        """Token ids, and how many tokens there is room for after them.

        Raises:
            PromptError: the template refuses the messages, or they are too long.
        """
        try:
            text = self.tokenizer.render_chat(
                messages,
                add_generation_prompt=True,
                continue_final_message=False,
                chat_template_kwargs={},
                chat_template=self.chat_template,
            )
            most = min(self.limits.max_model_len, self.limits.cache_tokens)
            if self.tokenizer.surely_above(text, most):
                raise PromptError(f"{len(text):,} characters are more than the {most:,} tokens that fit")
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        except (ChatTemplateError, TokenizerError) as error:
            raise PromptError(str(error)) from None
        if not ids:
            raise PromptError("the template makes nothing of this")
        if len(ids) >= most:
            raise PromptError(f"the chat has {len(ids):,} tokens with this message, and {most - 1:,} fit")
        return ids, most - len(ids)
