"""The prompt of a chat: messages through the template to token ids, or ids that a client already has."""

from collections.abc import Mapping
from typing import Any

from serve.api.context import Endpoint
from serve.api.errors import invalid, unsupported
from serve.api.job import Prompt
from serve.api.requests import ChatCompletionRequest, ChatPromptFields
from serve.api.validation import check_ids, check_length, check_number_of_ids, truncated
from serve.engine.request import EngineLimits
from serve.text.chat import ROLES, ChatFormat, check_messages, generation_room


def chat_prompt(body: ChatCompletionRequest, max_tokens: int | None, at: Endpoint) -> tuple[Prompt, int]:
    """The prompt, and how many tokens may be generated after it.

    Args:
        max_tokens: of the request; None for all that there is room for.

    Raises:
        APIError, PromptError: 400 that names a field.
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
    room = generation_room(param, len(ids), max_tokens, limits)
    return Prompt(ids, text, echo=_reply_so_far(body, at.config.response_role) if body.echo else ""), room


def chat_text(body: ChatPromptFields, at: Endpoint) -> str:
    """The chat as the template writes it, special tokens written out.

    Raises:
        APIError, PromptError: 400 that names a field.
    """
    if body.messages is None:
        raise invalid("messages", "`messages` is missing.", "missing_required_parameter")
    if body.chat_template is not None and at.jail is None:
        message = "`chat_template` is only accepted if the server was started with --trust-request-chat-template."
        raise unsupported("chat_template", message)
    return _format(at).render(
        _messages(body),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        variables=_variables(body),
        request_template=body.chat_template,
    )


def chat_ids(body: ChatPromptFields, text: str, at: Endpoint) -> list[int]:
    """The token ids of a rendered chat.

    Raises:
        PromptError: 400 that names `messages`.
    """
    return _format(at).encode(text, add_special_tokens=bool(body.add_special_tokens))


def _format(at: Endpoint) -> ChatFormat:
    return ChatFormat(at.tokenizer, at.model.chat_template, at.jail)


def _messages(body: ChatPromptFields) -> list[dict[str, Any]]:
    messages = [
        {"role": message.role, "content": message.content, **(message.model_extra or {})}
        for message in body.messages or ()
    ]
    return check_messages(messages, roles=ROLES)


def _given_ids(body: ChatCompletionRequest, ids: list[int], limits: EngineLimits) -> list[int]:
    if not ids:
        raise invalid("prompt_token_ids", "`prompt_token_ids` must hold at least one id.", "empty_array")
    check_number_of_ids("prompt_token_ids", ids, body, limits)
    check_ids("prompt_token_ids", ids, limits)
    return ids


def _reply_so_far(body: ChatPromptFields, role: str) -> str:
    """Content of the last message if its role is the assistant's: an echo repeats it before the answer."""
    if not body.messages or body.messages[-1].role != role:
        return ""
    return _messages(body)[-1]["content"] or ""


def _variables(body: ChatPromptFields) -> Mapping[str, Any]:
    """Variables of the template; `chat_template_kwargs` overrides fields of their own."""
    named = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    return {name: value for name, value in named.items() if value is not None} | (body.chat_template_kwargs or {})
