"""Conversation: what was said so far, as messages for the template and as a file."""

from dataclasses import dataclass, field
from typing import Any

from serve.cli.chat.reply import Reply
from serve.engine.request import EngineLimits
from serve.text.chat import ChatFormat, check_text_length, generation_room


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

    chats: ChatFormat
    limits: EngineLimits

    def prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
        """Token ids, and the number of tokens that fit after them.

        Raises:
            PromptError: the template refuses the messages, or they are too long.
        """
        text = self.chats.render(messages)
        check_text_length("messages", text, self.chats.tokenizer, self.limits)
        ids = self.chats.encode(text)
        return ids, generation_room("messages", len(ids), None, self.limits)
