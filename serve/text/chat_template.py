"""Chat templates: messages to prompt text, in the sandboxed Jinja environment of `transformers`."""

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

# Variables that the renderer sets itself; `tools` and `documents` may come from the request.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "messages",
        "return_assistant_tokens_mask",
        "self",
    }
)
_MAX_ERROR = 300  # characters: some errors quote the entire chat


class ChatTemplateError(ValueError):
    """The messages cannot be rendered. The message is that of the template's `raise_exception`, if it called it."""


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: Mapping[str, Any],
) -> str:
    """Renders a chat as `apply_chat_template(tokenize=False)` of `transformers` does.

    Args:
        template: Jinja source; compiled templates are cached by `transformers`.
        messages: dicts with "role" and usually "content"; keys whose value is None are dropped.
        special_tokens: variables of the template, such as {"bos_token": "<s>"}.
        add_generation_prompt: end the text with the header of a new assistant message.
        continue_final_message: end the text inside the last message, without its end marker.
        template_kwargs: additional variables; they override special tokens.

    Raises:
        ChatTemplateError: the template refuses the messages or is broken, or the arguments contradict each other.
    """
    if not messages:
        raise ChatTemplateError("messages is empty")
    if add_generation_prompt and continue_final_message:
        raise ChatTemplateError("add_generation_prompt and continue_final_message cannot both be true")
    if reserved := sorted(_RESERVED & template_kwargs.keys()):
        raise ChatTemplateError(f"chat_template_kwargs may not set {reserved[0]!r}")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        rendered, _ = render_jinja_template(
            conversations=[present],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**special_tokens, **template_kwargs},
        )
    except TemplateError as error:
        raise ChatTemplateError(error.message or type(error).__name__) from error
    except Exception as error:
        # A template is a program compiled to Python: it may raise anything, MemoryError included.
        reason = str(error) or type(error).__name__
        raise ChatTemplateError(f"the chat template failed: {reason[:_MAX_ERROR]}") from error
    return str(rendered[0])
