"""Chats: messages to prompt text to token ids. The HTTP API, `LLM`, scoring and the terminal chat share this code."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.text.chat_template import ChatTemplateError, TemplateSandbox, render_chat
from serve.text.tokenizer import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_ITEMS = 10_000  # messages of a chat, parts of a message
# Fields of messages that templates would leave out, and their values without effect: OpenAI's, Ollama's, and those that
# make Model Studio, DeepSeek and Mistral continue the message.
_UNSUPPORTED: dict[str, Any] = {"audio": None, "function_call": None, "images": [], "partial": False, "prefix": False}

_MEDIA = ("image", "audio", "video")  # in types of content parts


class PromptError(ValueError):
    """A prompt that cannot be used. The message is one sentence that names the field."""

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param  # path of the field, such as "messages[0].role"
        self.code = code  # OpenAI's error code


def required_string(item: Mapping[str, Any], key: str, path: str) -> str:
    """The text at a key of the object at `path`. Raise PromptError if there is no text."""
    value = item.get(key)
    if not isinstance(value, str):
        code = "missing_required_parameter" if value is None else "invalid_type"
        raise PromptError(f"{path}.{key}", f"`{path}.{key}` must be a string.", code)
    return value


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Renders and encodes the chats of one model."""

    tokenizer: Tokenizer
    sandbox: TemplateSandbox | None = None  # renders templates that come from requests
    replaced_roles: set[str] = field(default_factory=set, compare=False)  # each logged once

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        request_template: str | None = None,
        param: str = "messages",
    ) -> str:
        """Render messages that `check_messages` returned; special tokens are written out.

        Args:
            add_generation_prompt: defaults to True unless `continue_final_message` is set.
            variables: additional variables of the template.
            request_template: Jinja source to render in the sandbox instead of the model's template.
            param: path of the messages, for errors.

        Raises:
            PromptError: the arguments contradict each other, or the template refuses the messages.
            TemplateBusyError: the sandbox is in use.
        """
        generates = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        if generates and continue_final_message:
            message = "`continue_final_message` and `add_generation_prompt` cannot both be true."
            raise PromptError("continue_final_message", message)
        template, render = self.tokenizer.chat_template, render_chat
        if request_template is not None:
            assert self.sandbox is not None
            template, render = request_template, self.sandbox.render
        if template is None:
            raise PromptError(param, "This model has no chat template. Set --chat-template, or send a prompt instead.")
        try:
            return render(
                template,
                self._known_roles(messages, template),
                special_tokens=self.tokenizer.special_tokens,
                add_generation_prompt=generates,
                continue_final_message=continue_final_message,
                template_kwargs=variables or {},
            )
        except ChatTemplateError as error:
            raise PromptError(param, f"The chat template refused the messages: {error}") from None

    def _known_roles(self, messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
        """The messages with the role `system` instead of `developer` if the template has no such role."""
        if "developer" in template or all(message["role"] != "developer" for message in messages):
            return messages
        if "developer" not in self.replaced_roles:
            self.replaced_roles.add("developer")
            logger.warning("messages of the role developer are rendered as system: the chat template has no such role")
        return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]

    def encode(self, text: str, *, add_special_tokens: bool = False, param: str = "messages") -> list[int]:
        """Token ids of a rendered chat. Raise PromptError if it cannot be tokenized or gives no tokens."""
        ids = encode_text(self.tokenizer, text, add_special_tokens=add_special_tokens, param=param)
        if not ids:
            raise PromptError(param, "The messages give an empty prompt.")
        return ids


def check_messages(
    messages: Sequence[Any], *, roles: Collection[str] | None = None, param: str = "messages"
) -> list[dict[str, Any]]:
    """Messages that can be rendered: the text parts of a message's content are joined by line breaks.

    Raise PromptError for a message that is not a mapping with a role and valid content. `roles` None allows any role.
    """
    if not messages:
        raise PromptError(param, f"`{param}` must hold at least one message.", "empty_array")
    return [_message(message, f"{param}[{i}]", roles) for i, message in enumerate(messages)]


def _message(message: Any, path: str, roles: Collection[str] | None) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(path, f"`{path}` is not a message with a role.", "invalid_type")
    if roles is not None and message["role"] not in roles:
        raise PromptError(f"{path}.role", f"`{path}.role` must be one of {', '.join(roles)}.")
    for name, value in _UNSUPPORTED.items():
        if message.get(name) not in (None, value):
            raise PromptError(f"{path}.{name}", f"`{path}.{name}` is not supported.", "unsupported_parameter")
    content = message.get("content")
    param = f"{path}.content"
    if isinstance(content, list):
        if len(content) > MAX_ITEMS:
            raise PromptError(param, f"`{param}` has more than {MAX_ITEMS} parts.", "array_above_max_length")
        content = "\n".join(_text_of_part(part, f"{param}[{i}]") for i, part in enumerate(content))
    elif content is None and message["role"] not in ("assistant", "tool"):
        raise PromptError(param, f"`{param}` is missing.", "missing_required_parameter")
    elif content is not None and not isinstance(content, str):
        raise PromptError(param, f"`{param}` is neither a string nor a list of parts.", "invalid_type")
    return {**message, "content": content}


def _text_of_part(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "refusal"):  # of an assistant, either
        message = f"`{path}.type`: only parts of type text are supported."
        if isinstance(kind, str) and any(word in kind for word in _MEDIA):
            message = f"`{path}.type`: {kind} is not supported: vision and audio parts of models are not served."
        raise PromptError(f"{path}.type", message, "unsupported_parameter")
    text = part.get(kind)
    if not isinstance(text, str):
        raise PromptError(f"{path}.{kind}", f"`{path}.{kind}` must be a string.", "invalid_type")
    return text


def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of `text`. Raise PromptError if it cannot be tokenized."""
    with prompt_errors(param):
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)


@contextmanager
def prompt_errors(param: str) -> Iterator[None]:
    """Raise a tokenizer's errors as PromptErrors."""
    try:
        yield
    except TokenizerError as error:
        raise PromptError(param, str(error)) from None
