"""From a line to token ids: texts, prompts with completions, chats, ids."""

from dataclasses import dataclass
from typing import Any

import orjson

from serve.cli.score.errors import LineError
from serve.cli.score.source import Line
from serve.text.chat import ChatFormat, PromptError, check_messages, encode_text

_PAIR = ("prompt", "completion")
_ID, _TOOLS = "id", "tools"


@dataclass(frozen=True, slots=True)
class Text:
    """What is to be scored."""

    token_ids: list[int]  # at least one
    completion_start: int | None  # the first token of the completion, where there is one
    id: Any = None  # of the line, a JSON value


@dataclass(frozen=True, slots=True)
class TextReader:
    """Reads lines."""

    chats: ChatFormat
    vocab_size: int  # V
    text_field: str | None = None
    add_special_tokens: bool = True

    @staticmethod
    def fields(text_field: str | None) -> tuple[str, ...]:
        """Names of all fields that are read."""
        return (*_one_of(text_field), *_PAIR, _ID, _TOOLS)

    def read(self, line: Line, *, is_text: bool) -> Text:
        """The text of a line.

        Args:
            is_text: the line is the text, else a JSON value.

        Raises:
            LineError: it cannot be scored, and why.
        """
        if line.error is not None:
            raise LineError(line.error)
        try:
            text = self._plain(line.data) if is_text else self._value(line.data)
        except PromptError as error:
            raise LineError(str(error)) from error
        if not text.token_ids:
            raise LineError("gives no tokens")
        if text.completion_start == len(text.token_ids):
            raise LineError("the completion gives no tokens")
        if text.completion_start == 0:
            raise LineError("the prompt gives no tokens: nothing comes before the completion's first")
        return text

    def _plain(self, data: bytes) -> Text:
        try:
            return Text(self._encode(data.decode()), None)
        except UnicodeDecodeError as error:
            raise LineError(f"is not UTF-8: byte {error.start + 1} of the line") from error

    def _value(self, data: bytes) -> Text:
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise LineError(f"is not JSON: {error}") from error
        if isinstance(value, str):
            return Text(self._encode(value), None)
        if not isinstance(value, dict):
            raise LineError("is neither a JSON object nor a string")
        ids, start = self._ids(value)
        return Text(ids, start, value.get(_ID))

    def _ids(self, row: dict[str, Any]) -> tuple[list[int], int | None]:
        """Token ids, and the first of the completion."""
        tools = row.get(_TOOLS)
        for name in _one_of(self.text_field):
            if row.get(name) is not None:
                return self._alone(row[name], name, tools)
            if self.text_field is None and name == "text" and all(row.get(each) is not None for each in _PAIR):
                return self._pair(row["prompt"], row["completion"], tools)
        wanted = self.text_field or "text, prompt and completion, messages or token_ids"
        raise LineError(f"has no {wanted}")

    def _alone(self, value: Any, name: str, tools: Any) -> tuple[list[int], int | None]:
        if isinstance(value, str):
            return self._encode(value), None
        if _is_chat(value):
            messages = check_messages(value, param=name)
            answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
            return self._chat(messages, messages[:-1] if answered else None, tools)
        return self._checked(value, name), None

    def _pair(self, prompt: Any, completion: Any, tools: Any) -> tuple[list[int], int | None]:
        if isinstance(prompt, str) and isinstance(completion, str):
            return _split(self._encode(prompt + completion), self._encode(prompt))
        if _is_chat(prompt) and _is_chat(completion):
            before = check_messages(prompt, param="prompt")
            return self._chat([*before, *check_messages(completion, param="completion")], before, tools)
        if isinstance(prompt, list) and isinstance(completion, list):
            ids = self._checked(prompt, "prompt")
            return [*ids, *self._checked(completion, "completion")], len(ids)
        raise LineError("prompt and completion must both be strings, token ids or messages")

    def _chat(
        self, messages: list[dict[str, Any]], before: list[dict[str, Any]] | None, tools: Any
    ) -> tuple[list[int], int | None]:
        """A chat; `before` are the messages to which the others are the answer."""
        variables = {} if tools is None else {"tools": tools}
        ids = self._chat_ids(messages, variables, add_generation_prompt=False)
        if before is None:
            return ids, None
        return _split(ids, self._chat_ids(before, variables, add_generation_prompt=True))

    def _chat_ids(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], *, add_generation_prompt: bool
    ) -> list[int]:
        text = self.chats.render(messages, variables=variables, add_generation_prompt=add_generation_prompt)
        return encode_text(self.chats.tokenizer, text, add_special_tokens=False, param="messages")

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.chats.tokenizer, text, add_special_tokens=self.add_special_tokens, param="text")

    def _checked(self, value: Any, name: str) -> list[int]:
        if not isinstance(value, list):
            raise LineError(f"{name} is neither a string, nor a list of token ids or of messages")
        for index, token_id in enumerate(value):
            if type(token_id) is not int:
                raise LineError(f"{name}[{index}] is not a token id")
            if not 0 <= token_id < self.vocab_size:
                raise LineError(f"{name}[{index}]: {token_id} is not in the vocabulary of {self.vocab_size} tokens")
        return value


def _one_of(text_field: str | None) -> tuple[str, ...]:
    return ("text", "messages", "token_ids") if text_field is None else (text_field,)


def _split(whole: list[int], prompt: list[int]) -> tuple[list[int], int]:
    """A text, and where its tokens begin to differ from the prompt's alone.

    A token that reaches from the prompt into the completion is the completion's: the prompt alone does not have it.
    """
    common = 0
    for ours, theirs in zip(whole, prompt, strict=False):
        if ours != theirs:
            break
        common += 1
    return whole, common


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
