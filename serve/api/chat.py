"""POST /v1/chat/completions."""

import asyncio
from collections.abc import Sequence
from itertools import chain
from typing import Any

from serve.api.choices import ChoicesHandler
from serve.api.context import Context
from serve.api.errors import invalid, unsupported
from serve.api.generation import Choice, Prompt, output_logprobs
from serve.api.handler import Handler
from serve.api.job import Job, choice_fields
from serve.api.json_stream import dump_list
from serve.api.logprobs import chat_content
from serve.api.requests import ChatCompletionRequest, ChatPromptFields
from serve.api.validation import check_ids, check_length, check_number_of_ids, check_top_k, truncate
from serve.jobs.generate import generation_room
from serve.jobs.output import Output
from serve.text.chat import ROLES, check_messages
from serve.text.detokenizer import Echo

_BLOCK = 256  # tokens whose entries are Python objects at the same time; they take five times as much as their JSON

type _Job = Job[ChatCompletionRequest]


class ChatHandler[B: ChatCompletionRequest](Handler[B]):
    """An endpoint whose prompt is a chat: from the messages to the prompt's tokens."""

    id_prefix = "chatcmpl"
    objects = ("chat.completion", "chat.completion.chunk")

    def _alternatives(self, body: B) -> tuple[int | None, int | None]:
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        check_top_k("top_logprobs", body.top_logprobs or 0, self._context.engine.limits)
        return body.top_logprobs or 0 if body.logprobs else None, None

    def _prompts(self, body: B) -> list[Prompt]:
        context, limits = self._context, self._context.engine.limits
        max_tokens_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens: int | None = getattr(body, max_tokens_param)
        if body.prompt_token_ids is not None:
            param, text, ids = "prompt_token_ids", "", body.prompt_token_ids
            if not ids:
                raise invalid(param, "`prompt_token_ids` must contain at least one id.", "empty_array")
            check_number_of_ids(param, ids, body, limits)
            check_ids(param, ids, limits)
            if body.return_prompt_text:
                text = context.model.tokenizer.decode(ids, skip_special_tokens=False)
        else:
            param, text = "messages", chat_text(body, context)
            check_length(param, text, body, context.model.tokenizer, limits)
            ids = context.chat_format.encode(text, add_special_tokens=bool(body.add_special_tokens))
        ids = truncate(ids, body, max_tokens, limits)
        room = generation_room(param, len(ids), max_tokens, limits, max_tokens_param=max_tokens_param)
        default = context.model.defaults.max_new_tokens
        if max_tokens is None and default is not None:
            room = min(room, default)
        return [Prompt(ids, room, text, echo=Echo(self._reply_so_far(body) if body.echo else ""))]

    def _reply_so_far(self, body: B) -> str:
        """Content of the last message if its role is that of the reply: an echo repeats it before the output."""
        if not body.messages or body.messages[-1].role != self._context.config.response_role:
            return ""
        return _messages(body)[-1]["content"] or ""


class ChatCompletions(ChatHandler[ChatCompletionRequest], ChoicesHandler[ChatCompletionRequest]):
    model = ChatCompletionRequest

    def _answer(self, job: _Job, choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        answer = job.header | {
            "choices": choices,
            "usage": usage,
            "prompt_token_ids": job.prompts[0].ids if job.body.return_token_ids else None,
        }
        if job.body.return_prompt_text:
            answer["prompt_text"] = job.prompts[0].text
        return answer | self._prompt_fields(job, job.prompts[0])

    def _choices_of(self, job: _Job, batch: Sequence[tuple[Choice, Output]]) -> list[dict[str, Any]]:
        return [self._choice(job, *pair) for pair in batch]

    def _choice(self, job: _Job, choice: Choice, output: Output) -> dict[str, Any]:
        content = job.prompts[0].echo.text + output.text
        message = {"role": self._context.config.response_role, "content": content, "refusal": None}
        return choice_fields(job, choice, output, {"message": message}, _logprobs(job, choice, output))

    async def _opening(self, job: _Job, choice: Choice) -> dict[str, Any]:
        """The role and the prompt's ids; in the first choice also the prompt's log-probs."""
        prompt = choice.prompt
        delta = {"role": self._context.config.response_role, "content": prompt.echo.text}
        fields: dict[str, Any] = {
            "choices": [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]
        }
        if job.body.return_token_ids:
            fields["prompt_token_ids"] = prompt.ids
        if job.body.return_prompt_text:
            fields["prompt_text"] = prompt.text
        if choice.is_first_of_prompt and job.prompt_logprobs.k is not None:
            fields |= await asyncio.to_thread(self._prompt_fields, job, prompt)
        return fields

    async def _chunk_choice(self, job: _Job, choice: Choice, delta: Output) -> dict[str, Any]:
        return choice_fields(job, choice, delta, {"delta": {"content": delta.text}}, _logprobs(job, choice, delta))


def chat_text(body: ChatPromptFields, context: Context) -> str:
    """The rendered chat, special tokens written out.

    Raises:
        APIError, PromptError: 400 that names a field.
        TemplateBusyError: too many templates of requests are being rendered.
    """
    if body.messages is None:
        raise invalid("messages", "`messages` is missing.", "missing_required_parameter")
    if body.chat_template is not None and context.chat_format.sandbox is None:
        message = "`chat_template` is only accepted if the server was started with --trust-request-chat-template."
        raise unsupported("chat_template", message)
    fields = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    variables = {name: value for name, value in fields.items() if value is not None}
    return context.chat_format.render(
        _messages(body),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        variables=variables | (body.chat_template_kwargs or {}),
        request_template=body.chat_template,
    )


def _messages(body: ChatPromptFields) -> list[dict[str, Any]]:
    messages = [
        {"role": message.role, "content": message.content, **(message.model_extra or {})}
        for message in body.messages or ()
    ]
    return check_messages(messages, roles=ROLES)


def _logprobs(job: _Job, choice: Choice, output: Output) -> dict[str, Any] | None:
    content = token_entries(job, choice, output)
    return None if content is None else {"content": content, "refusal": None}


def token_entries[B: ChatCompletionRequest](
    job: Job[B], choice: Choice, output: Output, tokens: slice = slice(None)
) -> Any | None:
    """JSON list of the log-probs of an output's tokens; None if they are not requested."""
    if choice.alternatives is None:
        return None
    ids, logprobs = output.token_ids[tokens], output_logprobs(output, choice.alternatives)[tokens]
    with_chosen = job.body.logprob_token_ids is not None
    blocks = (
        chat_content(job.names, ids[i : i + _BLOCK], logprobs[i : i + _BLOCK], with_chosen=with_chosen)
        for i in range(0, len(ids), _BLOCK)
    )
    return dump_list(blocks) if len(ids) > _BLOCK else list(chain.from_iterable(blocks))
