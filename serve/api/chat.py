"""POST /v1/chat/completions."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.api.choices import ChoicesHandler
from serve.api.context import Context
from serve.api.errors import invalid, unsupported
from serve.api.generation import Choice, Prompt, output_logprobs
from serve.api.handler import Handler
from serve.api.job import Job, choice_fields, token_details
from serve.api.json_stream import dump_list
from serve.api.logprobs import chat_content
from serve.api.reply import ReplyWriter
from serve.api.requests import ChatCompletionRequest, ChatPromptFields
from serve.api.validation import check_ids, check_length, check_number_of_ids, check_top_k, truncate
from serve.grammar.fields import GrammarRequest
from serve.jobs.generate import generation_room
from serve.jobs.output import Output
from serve.text.chat import ROLES, check_messages
from serve.text.detokenizer import Echo
from serve.tools.definitions import ToolRequest, tool_request
from serve.tools.markup import ChatMarkup, markup_of
from serve.tools.reply import ReplyFormat, reply_format, thinking_budget, thinking_variables

_BUDGETS = ("thinking_token_budget", "max_thinking_tokens", "reasoning_budget_tokens", "thinking_budget")
_MAX_MARK = 16  # tokens
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
        context, limits, tools = self._context, self._context.engine.limits, chat_tools(body)
        max_tokens_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens: int | None = getattr(body, max_tokens_param)
        if body.prompt_token_ids is not None:
            param, text, ids = "prompt_token_ids", "", body.prompt_token_ids
            if not ids:
                raise invalid(param, "`prompt_token_ids` must contain at least one id.", "empty_array")
            check_number_of_ids(param, ids, body, limits)
            check_ids(param, ids, limits)
            end = context.model.tokenizer.decode(ids[-_MAX_MARK:], skip_special_tokens=False)
            if body.return_prompt_text:
                text = context.model.tokenizer.decode(ids, skip_special_tokens=False)
        else:
            param, text = "messages", chat_text(body, context)
            end = text
            check_length(param, text, body, context.model.tokenizer, limits)
            ids = context.chat_format.encode(text, add_special_tokens=bool(body.add_special_tokens))
        ids = truncate(ids, body, max_tokens, limits)
        room = generation_room(param, len(ids), max_tokens, limits, max_tokens_param=max_tokens_param)
        default = context.model.defaults.max_new_tokens
        if max_tokens is None and default is not None:
            room = min(room, default)
        echo = Echo(self._reply_so_far(body) if body.echo else "")
        return [Prompt(ids, room, text, echo, self._reply_format(body, tools, end))]

    def _reply_format(self, body: B, tools: ToolRequest | None, prompt: str) -> ReplyFormat | None:
        """How the output after a prompt with this end is divided; None if all of it is content."""
        separates = body.separate_reasoning is not False and body.reasoning_format != "none"
        markup = chat_markup(body, self._context)
        budgets = {name: getattr(body, name) for name in _BUDGETS}
        budget = thinking_budget(budgets, body.reasoning_effort, has_reasoning=markup.reasoning is not None)
        reply = reply_format(markup, tools, prompt, separates_reasoning=separates, budget=budget)
        return None if reply.is_plain else reply

    def _grammar(self, body: B, prompts: Sequence[Prompt]) -> GrammarRequest | None:
        stated, reply = super()._grammar(body, prompts), prompts[0].reply
        grammar = stated if reply is None else reply.grammar(stated, ignore_eos=bool(body.ignore_eos))
        if grammar is not stated and body.grammar_start is not None:
            raise invalid("grammar_start", "`grammar_start` cannot be combined with tools that a grammar holds.")
        return grammar

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
        answer |= _warnings(job.prompts[0])
        return answer | self._prompt_fields(job, job.prompts[0])

    def _choices_of(self, job: _Job, batch: Sequence[tuple[Choice, Output]]) -> list[dict[str, Any]]:
        return [self._choice(job, *pair) for pair in batch]

    def _choice(self, job: _Job, choice: Choice, output: Output) -> dict[str, Any]:
        prompt, role = job.prompts[0], self._context.config.response_role
        logprobs = _logprobs(job, choice, output)
        if prompt.reply is None:
            message = {"role": role, "content": prompt.echo.text + output.text, "refusal": None}
            return choice_fields(job, choice, output, {"message": message}, logprobs)
        writer = _writer(job, prompt.reply)
        message = {"role": role, "content": None, "refusal": None}
        message |= writer.message(output.parts, _values(choice, output))
        if prompt.echo.text:
            message["content"] = prompt.echo.text + (message["content"] or "")
        fields = choice_fields(job, choice, output, {"message": message}, logprobs)
        return _reply_fields(fields, output, writer, prompt.reply)

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
        fields |= _warnings(prompt)
        if choice.is_first_of_prompt and job.prompt_logprobs.k is not None:
            fields |= await asyncio.to_thread(self._prompt_fields, job, prompt)
        return fields

    async def _chunk_choices(self, job: _Job, choice: Choice, delta: Output) -> list[dict[str, Any]]:
        logprobs, reply = _logprobs(job, choice, delta), choice.prompt.reply
        if reply is None:
            return [choice_fields(job, choice, delta, {"delta": {"content": delta.text}}, logprobs)]
        writer = choice.writer = choice.writer or _writer(job, reply)
        deltas = writer.deltas(delta.parts, _values(choice, delta))
        if not deltas and (logprobs or delta.finish_reason or delta.experts or job.body.return_token_ids):
            deltas = [{}]
        chunks = []
        for i, fields in enumerate(deltas):
            # The tokens come with the first of the deltas, the end with the last.
            is_first, is_last = i == 0, i == len(deltas) - 1
            part = replace(delta if is_first else Output(), finish_reason=delta.finish_reason if is_last else None)
            part.stop_reason = delta.stop_reason
            chunk = choice_fields(job, choice, part, {"delta": fields}, logprobs if is_first else None)
            chunks.append(_reply_fields(chunk, delta, writer, reply) if is_last else chunk)
        return chunks


def _warnings(prompt: Prompt) -> dict[str, Any]:
    return {"warnings": list(prompt.reply.warnings)} if prompt.reply is not None and prompt.reply.warnings else {}


def _writer(job: _Job, reply: ReplyFormat) -> ReplyWriter:
    return ReplyWriter(reply, includes_reasoning=job.body.include_reasoning is not False)


def _values(choice: Choice, output: Output) -> NDArray[np.float32] | None:
    """Log-prob of each token; None if log-probs are not requested."""
    return None if choice.alternatives is None else output_logprobs(output, choice.alternatives).logprob


def _reply_fields(fields: dict[str, Any], output: Output, writer: ReplyWriter, reply: ReplyFormat) -> dict[str, Any]:
    """The fields of a choice whose output was divided, up to the end of `output`."""
    if writer.has_calls and fields["finish_reason"] == "stop":
        fields["finish_reason"] = "tool_calls"
    if reply.reasoning is not None and output.answer_start is not None and not writer.has_answer:
        writer.has_answer = True
        fields["answer_start"] = output.answer_start
    return fields


def chat_tools(body: ChatPromptFields) -> ToolRequest | None:
    """The tools of a chat. Raise PromptError for an invalid field."""
    return tool_request(body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False)


def chat_markup(body: ChatPromptFields, context: Context) -> ChatMarkup:
    """That of the model's template, or of the one in the request."""
    if body.chat_template is None:
        return context.markup
    return markup_of(body.chat_template, context.model.tokenizer.special_tokens, is_trusted=False)


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
    variables = thinking_variables(body.reasoning_effort, body.enable_thinking)
    if body.documents is not None:
        variables["documents"] = body.documents
    markup, tools = chat_markup(body, context), chat_tools(body)
    variables |= markup.variables(tools)
    return context.chat_format.render(
        markup.messages(_messages(body), tools),
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
    details = token_details(job, choice, output)[tokens]
    with_chosen = job.body.logprob_token_ids is not None
    blocks = (
        chat_content(job.names, ids[block], logprobs[block], details[block], with_chosen=with_chosen)
        for block in (slice(i, i + _BLOCK) for i in range(0, len(ids), _BLOCK))
    )
    return dump_list(blocks) if len(ids) > _BLOCK else list(chain.from_iterable(blocks))
