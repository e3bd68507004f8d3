"""The prompt of a chat: messages through the template to token ids, or ids that a client already has."""

from collections.abc import Mapping
from typing import Any

from serve.api.context import Endpoint
from serve.api.errors import APIError, invalid, unsupported
from serve.api.job import Prompt
from serve.api.requests import MAX_ITEMS, ROLES, ChatCompletionRequest, ChatMessage, ChatPromptFields
from serve.api.validation import check_ids, check_length, check_number_of_ids, check_room, truncated
from serve.engine.request import EngineLimits
from serve.text.chat_template import ChatTemplateError
from serve.text.template_sandbox import TemplateBusyError
from serve.text.tokenizer import TokenizerError


def chat_prompt(body: ChatCompletionRequest, max_tokens: int | None, at: Endpoint) -> tuple[Prompt, int]:
    """The prompt, and how many tokens may be generated after it.

    Args:
        max_tokens: asked for; None for all that there is room for.

    Raises:
        APIError: 400 that names a field.
    """
    limits = at.engine.limits
    if body.prompt_token_ids is not None:
        param, text, ids = "prompt_token_ids", "", _given_ids(body, body.prompt_token_ids, limits)
        if body.return_prompt_text:
            text = at.tokenizer.decode(ids, skip_special_tokens=False)
    else:
        param, text = "messages", chat_text(body, at)
        check_length(param, text, body, at.tokenizer, limits)
        ids = chat_ids(body, text, at)
    ids = truncated(ids, body, max_tokens, limits)
    room = check_room(param, len(ids), max_tokens, limits)
    return Prompt(ids, text, echo=_reply_so_far(body, at.config.response_role) if body.echo else ""), room


def chat_text(body: ChatPromptFields, at: Endpoint) -> str:
    """The chat as the template writes it, special tokens written out.

    Raises:
        APIError: 400 that names a field.
    """
    if body.messages is None:
        raise invalid("messages", "`messages` is missing.", "missing_required_parameter")
    if not body.messages:
        raise invalid("messages", "`messages` must hold at least one message.", "empty_array")
    if body.chat_template is not None and at.jail is None:
        message = "`chat_template` is taken from the request only where the server says --trust-request-chat-template."
        raise unsupported("chat_template", message)
    continues = bool(body.continue_final_message)
    # Both true is a contradiction unless the first is only a default.
    generates = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if continues and generates:
        message = "`continue_final_message` and `add_generation_prompt` cannot both be true."
        raise invalid("continue_final_message", message)
    messages = [_message(message, i) for i, message in enumerate(body.messages)]
    how: dict[str, Any] = {"add_generation_prompt": generates, "continue_final_message": continues}
    try:
        if body.chat_template is not None and at.jail is not None:
            return at.jail.render(
                body.chat_template,
                messages,
                special_tokens=at.tokenizer.special_tokens,
                template_kwargs=_variables(body),
                **how,
            )
        return at.tokenizer.render_chat(
            messages, chat_template_kwargs=_variables(body), chat_template=at.config.chat_template, **how
        )
    except ChatTemplateError as error:
        raise invalid("messages", f"The chat template refused the messages: {error}") from None
    except TemplateBusyError:
        message = "Too many chat templates are being rendered. Try again later."
        raise APIError(503, message, None, "too_many_templates", {"Retry-After": "1"}) from None


def chat_ids(body: ChatPromptFields, text: str, at: Endpoint) -> list[int]:
    """The token ids of a rendered chat.

    Raises:
        APIError: 400 that names `messages`.
    """
    try:
        ids = at.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
    except TokenizerError as error:
        raise invalid("messages", str(error)) from None
    if not ids:
        raise invalid("messages", "The messages give an empty prompt.")
    return ids


def _given_ids(body: ChatCompletionRequest, ids: list[int], limits: EngineLimits) -> list[int]:
    if not ids:
        raise invalid("prompt_token_ids", "`prompt_token_ids` must hold at least one id.", "empty_array")
    check_number_of_ids("prompt_token_ids", ids, body, limits)
    check_ids("prompt_token_ids", ids, limits)
    return ids


def _reply_so_far(body: ChatPromptFields, role: str) -> str:
    """What an echo puts before the answer: the last message, if it is by the one who answers."""
    if not body.messages or body.messages[-1].role != role:
        return ""
    return _message(body.messages[-1], len(body.messages) - 1)["content"] or ""


def _variables(body: ChatPromptFields) -> Mapping[str, Any]:
    """What the template sees beside the messages; `chat_template_kwargs` stand over fields of their own."""
    named = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    return {name: value for name, value in named.items() if value is not None} | (body.chat_template_kwargs or {})


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message for the template, its text parts joined."""
    where = f"messages[{index}]"
    if message.role not in ROLES:
        raise invalid(f"{where}.role", f"`{where}.role` must be one of {', '.join(ROLES)}.")
    content = message.content
    if isinstance(content, list):
        if len(content) > MAX_ITEMS:
            too_many = f"`{where}.content` has more than {MAX_ITEMS} parts."
            raise invalid(f"{where}.content", too_many, "array_above_max_length")
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and message.role != "assistant":
        raise invalid(f"{where}.content", f"`{where}.content` is missing.", "missing_required_parameter")
    return {"role": message.role, "content": content, **(message.model_extra or {})}


def _part(part: dict[str, Any], where: str) -> str:
    if part.get("type") != "text":
        raise unsupported(f"{where}.type", f"`{where}.type`: only parts of type text are supported.")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text", f"`{where}.text` must be a string.", "invalid_type")
    return text
