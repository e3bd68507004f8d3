"""Job: a validated request, and the parts of its response that chat and completions share."""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.api.context import Context
from serve.api.errors import engine_error
from serve.api.generation import Choice, Prompt, output_logprobs
from serve.api.logprobs import TokenDetails, TokenNames
from serve.api.parsing import PROMPT_FIELDS
from serve.api.requests import GenerationRequest
from serve.api.unsent import Unsent
from serve.api.validation import PromptLogprobs
from serve.grammar.fields import GrammarRequest
from serve.jobs.output import Output

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job[B: GenerationRequest]:
    body: B
    header: dict[str, Any]  # first fields of the response and of every chunk
    prompts: list[Prompt]
    choices: list[Choice]
    prompt_tokens: int  # of all prompts
    prompt_logprobs: PromptLogprobs
    names: TokenNames
    unsent: Unsent
    grammar: GrammarRequest | None  # of the outputs

    @property
    def has_reasoning(self) -> bool:
        """True if the reasoning of outputs is separated from the answer."""
        return any(prompt.reply is not None and prompt.reply.reasoning is not None for prompt in self.prompts)


def log_request(context: Context, header: dict[str, Any], body: GenerationRequest, prompts: list[list[int]]) -> None:
    decode, length = context.model.tokenizer.decode, context.config.max_log_len
    starts = [decode(ids, skip_special_tokens=False)[:length] for ids in prompts]
    fields = body.model_dump(exclude_none=True, exclude=set(PROMPT_FIELDS))
    logger.warning("request %s: prompts %r, fields %r", header["id"], starts, fields)


def choice_fields(
    job: Job[Any], choice: Choice, output: Output, text: dict[str, Any], logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """A choice of a response or in a chunk; `text` is the field that contains the text."""
    fields = {"index": choice.index, **text, "logprobs": logprobs, "finish_reason": output.finish_reason}
    if output.finish_reason is not None:
        fields["stop_reason"] = output.stop_reason
    if job.body.return_token_ids or not job.body.stream:
        fields["token_ids"] = output.token_ids if job.body.return_token_ids else None
    if (experts := _routed_experts(choice, output)) is not None:
        fields["routed_experts"] = experts
    return fields


def _routed_experts(choice: Choice, output: Output) -> dict[str, Any] | None:
    """The experts of the next tokens of a choice, `data` first, as some clients expect; None if there are none.

    Raises:
        APIError: 500, the engine returned those of more or fewer tokens.
    """
    first = choice.request.params.experts_start
    if first is None:
        return None
    before = 0 if choice.num_experts else len(choice.prompt.ids) - 1 - first  # of the prompt, without its last token
    if sum(map(len, output.experts)) != before + len(output.token_ids):
        raise engine_error("The engine returned the experts of the wrong number of tokens.")
    if not output.experts:
        return None
    experts = np.concatenate(output.experts)
    start = first + choice.num_experts
    choice.num_experts += len(experts)
    data = base64.b64encode(experts.astype("<i2", copy=False).tobytes()).decode()
    return {"data": data, "shape": experts.shape, "start": start, "dtype": "int16"}


def token_details(job: Job[Any], choice: Choice, output: Output) -> TokenDetails:
    """What is known of the output's tokens besides their log-probs, as far as the request asks for it."""
    return TokenDetails.of(
        output,
        choice.alternatives or 0,
        with_mass=job.grammar is not None,
        with_processed=bool(job.body.return_processed_logprobs),
    )


def check_logprobs(job: Job[Any], outputs: Sequence[Output]) -> None:
    """Raise APIError 500 if any log-prob of the response is missing or NaN; outputs keep what the response contains."""
    for choice, output in zip(job.choices, outputs, strict=True):
        if choice.alternatives is not None:
            output.logprobs = [output_logprobs(output, choice.alternatives)]
            token_details(job, choice, output)
    requested = job.prompt_logprobs
    for k in (requested.echo_k, None if requested.full_vocab else requested.k):
        if k is not None:
            for prompt in job.prompts:
                prompt.logprobs(k, requested.start)


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """`usage`; a prompt counts once for all its choices, and `cached_tokens` of it were found in the prefix cache.

    `reasoning_tokens` are those before the answers; None if they are not separated.
    """
    fields: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if reasoning_tokens is not None:
        fields["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return fields
