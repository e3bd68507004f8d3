"""What both endpoints check of a request against what the engine can do. Each check names the field in its APIError."""

from serve.engine.request import EngineLimits
from serve.openai.errors import invalid, unsupported
from serve.openai.schema import GenerationRequest


def prompt_top_k(body: GenerationRequest, limits: EngineLimits) -> int | None:
    """The number of alternatives that `prompt_logprobs` asks for, None where it asks for nothing."""
    k = body.prompt_logprobs
    if k == -1:
        raise unsupported("prompt_logprobs", "`prompt_logprobs` of -1, the whole vocabulary, is not supported yet.")
    return None if k is None else check_top_k("prompt_logprobs", k, limits)


def check_top_k(param: str, k: int, limits: EngineLimits) -> int:
    """k, unless it is above what this server computes."""
    if k > limits.max_logprobs:
        message = f"`{param}` is {k}, greater than the maximum of {limits.max_logprobs} (--max-logprobs)."
        raise invalid(param, message, "integer_above_max_value")
    return k


def check_room(param: str, prompt: int, max_tokens: int | None, limits: EngineLimits) -> int:
    """Tokens that may be generated after a prompt of that many: `max_tokens`, or the rest of the context."""
    limit = limits.max_model_len
    if prompt + (1 if max_tokens is None else max_tokens) > limit:
        wanted = "at least 1" if max_tokens is None else str(max_tokens)
        message = (
            f"This model's maximum context length is {limit} tokens, but {prompt} prompt tokens and {wanted} "
            "to generate were asked for."
        )
        raise invalid(param, message, "context_length_exceeded")
    return limit - prompt if max_tokens is None else max_tokens


def check_stream_options(body: GenerationRequest) -> None:
    """`stream_options` only makes sense with `stream`."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` is only allowed when `stream` is true.")
