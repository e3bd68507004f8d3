"""Generation: sampling options, and token ids to text with the log-probs of every token."""

import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError

from serve.config.generation_config import SamplingFieldKeywords, SamplingFields
from serve.config.values import suggestion
from serve.engine.request import EngineLimits, PromptScoring, Request, SamplingParams
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.fields import GrammarFields, StructuredOutputs, grammar_request
from serve.jobs.output import Output, OutputDecoder
from serve.jobs.request_queue import RequestQueue
from serve.jobs.results import CallArgument, Generation, Tokens, ToolCall, token_columns
from serve.jobs.score import checked_logprobs
from serve.text.chat import PromptError
from serve.text.detokenizer import Detokenizer, StopStrings
from serve.text.tokenizer import Tokenizer
from serve.tools.reply import Call, Reply, ReplyFormat, compile_output, logprob_of

_GREEDY_BELOW = 1e-5  # lower temperatures are greedy
_MIN_TEMPERATURE = 0.01
_INT64 = 2**63
DEFAULT_MAX_TOKENS = 16  # of completions, as in OpenAI's API; a chat has no such default

type _StopString = Annotated[str, Field(min_length=1)]


class GenerationOptions(SamplingFields, GrammarFields):
    """Options of `LLM.generate` and `LLM.chat`. None leaves the model's default, or else OpenAI's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] = 1  # outputs per prompt
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None  # output i uses seed + i; -1 draws one
    stop: _StopString | list[_StopString] | None = None
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0)] = 0  # alternatives of each generated token
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None  # alternatives of each prompt token
    return_processed_logprobs: bool = False
    return_routed_experts: bool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class SamplingKeywords(SamplingFieldKeywords, total=False):
    """Keyword arguments of `LLM.generate` and `LLM.chat`; the fields of GenerationOptions."""

    max_tokens: int | None
    n: int
    seed: int | None
    stop: str | list[str] | None
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int | None
    return_processed_logprobs: bool
    return_routed_experts: bool
    response_format: dict[str, Any] | None
    structured_outputs: StructuredOutputs | None


def as_list(value: Any) -> list[Any]:
    """A list of inputs; one text, one list of token ids or one conversation is a list of length 1."""
    if isinstance(value, str):
        return [value]
    items = [item.tolist() if isinstance(item, np.ndarray) else item for item in value]
    return [items] if items and isinstance(items[0], Integral | dict) else items


def make_options[O: GenerationOptions](values: Mapping[str, Any], limits: EngineLimits, kind: type[O]) -> O:
    """Validate options against what the model computes.

    Raises:
        TypeError: a name is not an option; the message suggests the nearest.
        ValueError: a value is not valid; the message names the option.
    """
    for name in values:
        if name not in kind.model_fields:
            raise TypeError(f"{name!r} is not an option{suggestion(name, kind.model_fields)}")
    try:
        options = kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field, *inner = first["loc"] if first["loc"][0] == "tools" else first["loc"][:1]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
        raise ValueError(f"{field}{path}: {first['msg']}") from None
    check_alternatives("logprobs", options.logprobs, limits.max_logprobs)
    check_alternatives("prompt_logprobs", options.prompt_logprobs, limits.max_logprobs)
    if options.return_routed_experts and limits.routing is None:
        raise ValueError("return_routed_experts: the model has no experts")
    return options


def sampling_params(fields: SamplingFields) -> SamplingParams:
    """Parameters with the values of `fields`; the others have their defaults, and `max_tokens` is 0."""
    values = {name: value for name in SamplingFields.model_fields if (value := getattr(fields, name)) is not None}
    if "temperature" in values:
        value = values["temperature"]
        values["temperature"] = 0.0 if value < _GREEDY_BELOW else max(value, _MIN_TEMPERATURE)
    if "top_k" in values:
        values["top_k"] = max(values["top_k"], 0)  # -1 is off, too
    return SamplingParams(max_tokens=0, **values)


def choice_params(
    shared: SamplingParams, choice: int, *, max_tokens: int, seed: int | None, prompt: PromptScoring | None
) -> SamplingParams:
    """Parameters of output number `choice` for a prompt; `shared` are those of all outputs.

    Its seed is `seed` + `choice`; None or -1 draws one. Only output 0 scores the prompt.
    """
    seed = None if seed in (None, -1) else seed + choice
    return replace(shared, max_tokens=max_tokens, seed=seed, prompt=None if choice else prompt)


@dataclass(frozen=True, slots=True)
class OutputRequest:
    index: int  # of the prompt
    token_ids: list[int]  # of the prompt
    max_tokens: int
    choice: int = 0  # number of the output for this prompt
    reply: ReplyFormat | None = None  # how the output is divided; None: all of it is content


class Generator:
    """Generates with the same options for all prompts."""

    def __init__(
        self, queue: RequestQueue, tokenizer: Tokenizer, grammars: GrammarCompiler, options: GenerationOptions
    ) -> None:
        """Raise PromptError if the options state an invalid grammar."""
        self._queue = queue
        self._grammars = grammars
        self._grammar = grammar_request(options, ignore_eos=options.ignore_eos)
        self._tokenizer = tokenizer
        self._options = options
        self._stop = StopStrings(options.stop_strings)
        self._eos_token_ids = frozenset() if options.ignore_eos else tokenizer.eos_token_ids
        self._params = replace(
            sampling_params(options),
            stop_token_ids=self._eos_token_ids,
            return_processed=options.return_processed_logprobs,
            experts_start=0 if options.return_routed_experts else None,
        )

    async def stream(self, request: OutputRequest) -> AsyncGenerator[Output]:
        """Generate an output event by event; only choice 0 has the prompt's log-probs.

        Raises:
            PromptError: the grammar cannot be used.
            RequestError: the engine failed on the request.
            EngineStoppedError: the engine has stopped.
        """
        async with aclosing(self._outputs(request, await self._request_params(request))) as outputs:
            async for output in outputs:
                yield output

    async def _request_params(self, request: OutputRequest) -> SamplingParams:
        options, reply = self._options, request.reply
        scoring = None if options.prompt_logprobs is None else PromptScoring()
        params = choice_params(
            self._params, request.choice, max_tokens=request.max_tokens, seed=options.seed, prompt=scoring
        )
        stated = self._grammar if reply is None else reply.grammar(self._grammar, ignore_eos=options.ignore_eos)
        return replace(params, grammar=await compile_output(stated, reply, self._grammars))

    async def _outputs(self, request: OutputRequest, params: SamplingParams) -> AsyncGenerator[Output]:
        options, reply = self._options, request.reply
        splitter = None if reply is None else reply.splitter(self._tokenizer, skip_special_tokens=True)
        detokenizer = Detokenizer(self._tokenizer, self._stop, kept_ids=() if splitter is None else splitter.kept_ids)
        decoder = OutputDecoder(detokenizer, self._eos_token_ids, splitter)
        async with aclosing(self._queue.events(Request(uuid.uuid4().hex, request.token_ids, params))) as events:
            async for event in events:
                delta = decoder.output(event)
                delta.logprobs = [checked_logprobs(part, options.logprobs) for part in delta.logprobs]
                delta.processed = [checked_logprobs(part, options.logprobs) for part in delta.processed]
                if delta.prompt_logprobs is not None:
                    delta.prompt_logprobs = checked_logprobs(delta.prompt_logprobs, options.prompt_logprobs or 0)
                yield delta
                if delta.finish_reason is not None:
                    return  # closing the events aborts a request that ended in the text

    async def run(self, prompts: Iterable[OutputRequest]) -> AsyncGenerator[Generation]:
        """Generate `n` outputs for each prompt, at the same time; yield them in order. Raises as `stream`."""

        async def generate(request: OutputRequest) -> tuple[OutputRequest, SamplingParams, Output]:
            output, params = Output(), await self._request_params(request)
            async with aclosing(self._outputs(request, params)) as deltas:
                async for delta in deltas:
                    output.add(delta)
            return request, params, output

        requests = (replace(prompt, choice=choice) for prompt in prompts for choice in range(self._options.n))
        prompt_tokens: Tokens | None = None  # scored by the first output of the prompt
        async with aclosing(self._queue.run_in_order(requests, generate, lambda item: len(item.token_ids))) as results:
            async for request, params, output in results:
                ids, logprobs = request.token_ids, output.prompt_logprobs
                if logprobs is not None:
                    prompt_tokens = Tokens(**token_columns(self._tokenizer, ids, logprobs, starts_sequence=True))
                yield self._generation(request, output, prompt_tokens, has_grammar=params.grammar is not None)

    def _generation(
        self, request: OutputRequest, output: Output, prompt: Tokens | None, *, has_grammar: bool
    ) -> Generation:
        options, logprobs = self._options, output.all_logprobs(self._options.logprobs)
        reply = Reply(output.text, None, []) if request.reply is None else Reply.of(output.parts, request.reply)
        ends_in_call = bool(reply.calls) and output.finish_reason == "stop"
        has_reasoning = request.reply is not None and request.reply.reasoning is not None
        return Generation(
            index=request.index,
            choice=request.choice,
            text=output.text,
            content=reply.content,
            reasoning=reply.reasoning,
            answer_start=output.answer_start if has_reasoning else None,
            tool_calls=tuple(_tool_call(call, logprobs.logprob) for call in reply.calls),
            finish_reason="tool_calls" if ends_in_call else str(output.finish_reason),
            stop_reason=output.stop_reason,
            prompt_token_ids=request.token_ids,
            prompt=prompt,
            processed_logprobs=(
                output.all_processed(options.logprobs).logprob if options.return_processed_logprobs else None
            ),
            allowed_mass=np.array(output.allowed_mass, np.float32) if has_grammar else None,
            forced=output.forced if has_grammar else None,
            routed_experts=np.concatenate(output.experts) if output.experts else None,
            **token_columns(self._tokenizer, output.token_ids, logprobs, starts_sequence=False),
        )


def _tool_call(call: Call, logprobs: NDArray[np.float32]) -> ToolCall:
    spans = () if call.end is None else call.end.arguments
    tokens = None if call.end is None else call.end.tokens
    return ToolCall(
        id=call.id,
        type="custom" if call.is_custom else "function",
        name=call.name,
        arguments=call.text,
        tokens=tokens,
        logprob=None if tokens is None else logprob_of(tokens, logprobs),
        argument_logprobs=tuple(
            CallArgument(name=span.name, tokens=span.tokens, logprob=logprob_of(span.tokens, logprobs))
            for span in spans
        ),
    )


def check_alternatives(param: str, count: int | None, max_logprobs: int) -> None:
    """Raise ValueError if the model was not loaded for `count` alternatives per token."""
    if count is not None and not 0 <= count <= max_logprobs:
        raise ValueError(f"{param}: {count} is not from 0 to {max_logprobs}, the limit that max_logprobs sets")


def check_text_length(param: str, text: str, tokenizer: Tokenizer, limits: EngineLimits) -> None:
    """Raise PromptError for a text that is certain to exceed the context, before it is tokenized."""
    if tokenizer.certainly_exceeds(text, limits.max_model_len):
        message = (
            f"This model's maximum context length is {limits.max_model_len} tokens; "
            f"a text of {len(text)} characters cannot fit."
        )
        raise PromptError(param, message, "context_length_exceeded")


def generation_room(
    param: str,
    prompt_tokens: int,
    max_tokens: int | None,
    limits: EngineLimits,
    *,
    max_tokens_param: str = "max_tokens",
) -> int:
    """Number of tokens that may be generated: `max_tokens`, or all that fit after the prompt if it is None.

    Raise PromptError if prompt and output do not fit into the context or the cache. It names the prompt by `param`, or
    `max_tokens` if that many do not fit after any prompt.
    """
    capacity = min(limits.max_model_len, limits.cache_tokens)
    room = capacity - prompt_tokens
    needed = 1 if max_tokens is None else max_tokens
    if needed <= room:
        return room if max_tokens is None else needed
    if max_tokens is not None and needed >= capacity:
        param = max_tokens_param
    at_least = "at least " if max_tokens is None else ""
    request = f"but the request needs {prompt_tokens} prompt tokens and {at_least}{needed} to generate."
    if prompt_tokens + needed > limits.max_model_len:
        message = f"This model's maximum context length is {limits.max_model_len} tokens, {request}"
    else:
        message = f"The cache holds {limits.cache_tokens} tokens (--kv-cache-memory), {request}"
    raise PromptError(param, message, "context_length_exceeded")
