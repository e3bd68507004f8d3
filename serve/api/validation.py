"""What both endpoints check of a request against what the engine can do. Each check names the field in its APIError."""

import re
from collections.abc import Collection, Sequence

from serve.api.errors import invalid, prompt_errors, unsupported
from serve.api.requests import GenerationRequest
from serve.engine.request import EngineLimits
from serve.text.chat import check_text_length, generation_room
from serve.text.tokenizer import Tokenizer

_MAX_ANSWERS = 4096
# Of a text: its tokens take 300 bytes for each while they are made. More where a model's context is longer.
_MAX_CHARACTERS, _CHARACTERS = 4 << 20, 16
_CACHE_SALT = re.compile(r"[^@/\\\0]{1,128}")


def check_common(body: GenerationRequest) -> None:
    """Fields that can be judged without the model."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` is only allowed when `stream` is true.")
    if body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", "`best_of` must equal `n`.")
    if body.cache_salt is not None and not _CACHE_SALT.fullmatch(body.cache_salt):
        raise invalid("cache_salt", "`cache_salt` must be 1 to 128 characters without @, /, \\ and NUL.")


def check_answers(prompts: int, n: int) -> None:
    """A request's answers are not so many that it alone fills the server's memory."""
    if prompts * n > _MAX_ANSWERS:
        message = f"`n` of {n} for each of {prompts} prompts is more than the maximum of {_MAX_ANSWERS} answers."
        raise invalid("n", message, "integer_above_max_value")


def check_top_k(param: str, k: int, limits: EngineLimits) -> None:
    """k is what this server computes for every token."""
    if k > limits.max_logprobs:
        message = f"`{param}` is {k}, greater than the maximum of {limits.max_logprobs} (--max-logprobs)."
        raise invalid(param, message, "integer_above_max_value")


def check_ids(param: str, ids: Collection[int], limits: EngineLimits) -> None:
    """All ids are in the vocabulary."""
    if any(token_id >= limits.vocab_size for token_id in ids):
        raise invalid(param, f"`{param}` holds an id outside the vocabulary of {limits.vocab_size}.")


def check_scored_ids(param: str, ids: Collection[int], limits: EngineLimits) -> None:
    """Ids whose numbers are asked for: some, not too many, each once."""
    if not ids:
        raise invalid(param, f"`{param}` must hold at least one id.", "empty_array")
    if len(ids) > limits.max_scored_ids:
        message = f"`{param}` holds more than {limits.max_scored_ids} ids."
        raise invalid(param, message, "array_above_max_length")
    if len(set(ids)) != len(ids):
        raise invalid(param, f"`{param}` holds an id twice.")
    check_ids(param, ids, limits)


def check_logprob_token_ids(body: GenerationRequest, *, shown: bool, limits: EngineLimits) -> None:
    """`logprob_token_ids` names the alternatives of log-probs that are `shown`."""
    if body.logprob_token_ids is None:
        return
    if not shown:
        raise invalid("logprob_token_ids", "`logprob_token_ids` needs `logprobs`.")
    check_scored_ids("logprob_token_ids", body.logprob_token_ids, limits)


def truncated(ids: list[int], body: GenerationRequest, max_tokens: int | None, limits: EngineLimits) -> list[int]:
    """A prompt cut to `truncate_prompt_tokens`, at its beginning unless the request says otherwise.

    Args:
        max_tokens: asked for, which -1 leaves room for; one where nothing is asked.
    """
    most = body.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        most = max(1, min(limits.max_model_len, limits.cache_tokens) - (1 if max_tokens is None else max_tokens))
    if not 1 <= most <= limits.max_model_len:
        message = f"`truncate_prompt_tokens` must be -1, or from 1 to {limits.max_model_len}."
        raise invalid("truncate_prompt_tokens", message)
    return ids[:most] if body.truncation_side == "right" else ids[-most:]


def check_length(param: str, text: str, body: GenerationRequest, tokenizer: Tokenizer, limits: EngineLimits) -> None:
    """A text that could never fit is refused before it is tokenized; one that is to be cut, where it is enormous."""
    if body.truncate_prompt_tokens is None:
        with prompt_errors():
            check_text_length(param, text, tokenizer, limits)
    check_size(param, text, limits)


def check_size(param: str, text: str, limits: EngineLimits) -> None:
    """A text is one that can be tokenized."""
    most = max(_MAX_CHARACTERS, _CHARACTERS * limits.max_model_len)
    if len(text) > most:
        message = f"`{param}` has {len(text)} characters, of at most {most}."
        raise invalid(param, message, "string_above_max_length")


def check_number_of_ids(param: str, ids: Sequence[int], body: GenerationRequest, limits: EngineLimits) -> None:
    """Ids that could never fit are refused before each is looked at, unless they are to be cut."""
    if body.truncate_prompt_tokens is None and len(ids) > limits.max_model_len:
        message = f"This model's maximum context length is {limits.max_model_len} tokens, but `{param}` has {len(ids)}."
        raise invalid(param, message, "context_length_exceeded")


def check_room(param: str, prompt: int, max_tokens: int | None, limits: EngineLimits) -> int:
    """Tokens that may be generated after a prompt of that many: `max_tokens`, or all that there is room for."""
    with prompt_errors():
        return generation_room(param, prompt, max_tokens, limits)
