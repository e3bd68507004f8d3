"""Checks of a request against the engine's limits, shared by the endpoints. Each raises an APIError for its field."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from serve.api.errors import APIError, invalid, unsupported
from serve.api.requests import GenerationRequest
from serve.engine.request import EngineLimits, PromptScoring
from serve.jobs.generate import check_text_length
from serve.text.tokenizer import Tokenizer

_MAX_ANSWERS = 4096
# Tokenizing takes about 300 bytes per token. The limit of a text is larger for models with a longer context.
_MAX_CHARACTERS, _CHARACTERS_PER_TOKEN = 4 << 20, 16
_MAX_PROMPT_LOGPROBS = 4 << 20  # per answer; each takes about 80 bytes of JSON
_FULL_LENGTHS = 2  # full-length prompts that are always accepted: with echo, log-probs are sent twice
_CACHE_SALT = re.compile(r"[^@/\\\0]{1,128}")


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The log-probs of prompt tokens that an answer contains."""

    k: int | None  # alternatives per token in `prompt_logprobs`; None without this field
    echo_k: int | None  # alternatives per token of an echoed prompt; None without log-probs in the echo
    scoring: PromptScoring | None  # for the engine; None without log-probs of the prompt
    columns: bool = False  # arrays instead of one object per token
    full_vocab: bool = False  # `k` exceeds the engine's maximum: rows over the full vocabulary are read

    @property
    def start(self) -> int:
        """Index of the first prompt token with log-probs; 1 by default, as the token at index 0 has none."""
        return 1 if self.scoring is None else self.scoring.start


def served_name(name: str | None, names: Sequence[str]) -> str:
    """The model's name in the response, by default the first of `names`. Raise APIError 404 for any other model."""
    if name is None:
        return names[0]
    if name not in names:
        served = ", ".join(map(repr, names))
        message = f"The model {name[:200]!r} does not exist. This server serves {served}."
        raise APIError(404, message, "model", "model_not_found")
    return name


def check_common(body: GenerationRequest) -> None:
    """Check fields that need no model."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` is only allowed when `stream` is true.")
    if body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", "`best_of` must equal `n`.")
    check_cache_salt("cache_salt", body.cache_salt)


def check_cache_salt(param: str, salt: str | None) -> None:
    if salt is not None and not _CACHE_SALT.fullmatch(salt):
        raise invalid(param, f"`{param}` must be 1 to 128 characters other than @, /, \\ and NUL.")


def check_answers(prompts: int, n: int) -> None:
    """Limit the answers of one request, which are in memory at the same time."""
    if prompts * n > _MAX_ANSWERS:
        message = f"`n` of {n} for {prompts} prompts exceeds the maximum of {_MAX_ANSWERS} answers per request."
        raise invalid("n", message, "integer_above_max_value")


def check_top_k(param: str, k: int, limits: EngineLimits) -> None:
    if k > limits.max_logprobs:
        message = f"`{param}` is {k}, greater than the maximum of {limits.max_logprobs} (--max-logprobs)."
        raise invalid(param, message, "integer_above_max_value")


def check_ids(param: str, ids: Collection[int], limits: EngineLimits) -> None:
    if any(token_id >= limits.vocab_size for token_id in ids):
        raise invalid(param, f"`{param}` contains an id outside the vocabulary of {limits.vocab_size} tokens.")


def check_requested_ids(param: str, ids: Collection[int], limits: EngineLimits) -> None:
    """Check ids whose log-probs are requested: at least one, no duplicates, within the limit."""
    if not ids:
        raise invalid(param, f"`{param}` must contain at least one id.", "empty_array")
    if len(ids) > limits.max_requested_ids:
        message = f"`{param}` contains more than {limits.max_requested_ids} ids."
        raise invalid(param, message, "array_above_max_length")
    if len(set(ids)) != len(ids):
        raise invalid(param, f"`{param}` contains a duplicate id.")
    check_ids(param, ids, limits)


def truncate(ids: list[int], body: GenerationRequest, max_tokens: int | None, limits: EngineLimits) -> list[int]:
    """The prompt truncated to `truncate_prompt_tokens`, on the left unless `truncation_side` is "right".

    Args:
        max_tokens: of the request; -1 leaves room for them, for one token if it is None.
    """
    length = body.truncate_prompt_tokens
    if length is None:
        return ids
    if length == -1:
        length = max(1, min(limits.max_model_len, limits.cache_tokens) - (1 if max_tokens is None else max_tokens))
    if not 1 <= length <= limits.max_model_len:
        message = f"`truncate_prompt_tokens` must be -1 or from 1 to {limits.max_model_len}."
        raise invalid("truncate_prompt_tokens", message)
    return ids[:length] if body.truncation_side == "right" else ids[-length:]


def check_length(param: str, text: str, body: GenerationRequest, tokenizer: Tokenizer, limits: EngineLimits) -> None:
    """Refuse a text that cannot fit before it is tokenized, unless it will be truncated."""
    if body.truncate_prompt_tokens is None:
        check_text_length(param, text, tokenizer, limits)
    check_size(param, text, limits)


def check_size(param: str, text: str, limits: EngineLimits) -> None:
    """Limit the characters that are tokenized at once."""
    maximum = max(_MAX_CHARACTERS, _CHARACTERS_PER_TOKEN * limits.max_model_len)
    if len(text) > maximum:
        message = f"`{param}` has {len(text)} characters, more than the maximum of {maximum}."
        raise invalid(param, message, "string_above_max_length")


def check_number_of_ids(param: str, ids: Sequence[int], body: GenerationRequest, limits: EngineLimits) -> None:
    """Refuse more ids than the context holds before each is checked, unless they will be truncated."""
    if body.truncate_prompt_tokens is None and len(ids) > limits.max_model_len:
        message = f"This model's maximum context length is {limits.max_model_len} tokens, but `{param}` has {len(ids)}."
        raise invalid(param, message, "context_length_exceeded")


def read_prompt_logprobs(body: GenerationRequest, echo_k: int | None, limits: EngineLimits) -> PromptLogprobs:
    """Read `prompt_logprobs` and the fields that refine it.

    Args:
        echo_k: `logprobs` of a request that echoes its prompt, else None. As in vLLM it is also the default of
            `prompt_logprobs`.

    Raises:
        APIError: 400 that names a field.
    """
    k = echo_k if body.prompt_logprobs is None else body.prompt_logprobs
    ids = body.prompt_logprob_token_ids
    if ids is not None:
        check_requested_ids("prompt_logprob_token_ids", ids, limits)
        if body.prompt_logprobs:
            message = "`prompt_logprob_token_ids` selects the alternatives, so `prompt_logprobs` must be 0 or unset."
            raise invalid("prompt_logprob_token_ids", message)
        k = len(ids)
        echo_k = None if echo_k is None else len(ids)
    start = body.prompt_logprobs_start or 0
    if start and k is None:
        raise invalid("prompt_logprobs_start", "`prompt_logprobs_start` needs `prompt_logprobs`.")
    full_vocab = ids is None and k is not None and not 0 <= k <= limits.max_logprobs
    if full_vocab:
        if not limits.full_vocab:
            check_top_k("prompt_logprobs", k or 0, limits)
            message = "`prompt_logprobs` of -1 (the full vocabulary) needs a server started with --max-logprobs -1; "
            raise invalid("prompt_logprobs", f"{message}the maximum of this server is {limits.max_logprobs}.")
        k = limits.vocab_size if k == -1 else min(k or 0, limits.vocab_size)
    columns = body.prompt_logprobs_format == "columns"
    if columns and k is None:
        raise invalid("prompt_logprobs_format", "`prompt_logprobs_format` needs `prompt_logprobs`.")
    if columns and full_vocab:
        message = f"`prompt_logprobs_format`: columns hold at most {limits.max_logprobs} alternatives per token."
        raise invalid("prompt_logprobs_format", message)
    scoring = None if k is None else PromptScoring(max(1, start), tuple(ids or ()))
    return PromptLogprobs(k, echo_k, scoring, columns, full_vocab)


def check_start(body: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """Check that `prompt_logprobs_start` is within every prompt."""
    start, shortest = body.prompt_logprobs_start, min(map(len, prompts))
    if start and start >= shortest:
        message = f"`prompt_logprobs_start` is {start}, but the shortest prompt has {shortest} tokens."
        raise invalid("prompt_logprobs_start", message)


def read_experts_start(body: GenerationRequest, prompts: Sequence[Sequence[int]], limits: EngineLimits) -> int | None:
    """Index of the first prompt token whose experts are returned; None if those of no token are.

    Raises:
        APIError: 400 that names a field.
    """
    start, param = body.routed_experts_prompt_start or 0, "routed_experts_prompt_start"
    if not body.return_routed_experts:
        if start:
            raise invalid(param, f"`{param}` needs `return_routed_experts`.")
        return None
    if limits.routing is None:
        raise unsupported("return_routed_experts", "`return_routed_experts`: the model has no experts.")
    if start >= min(map(len, prompts)):
        message = f"`{param}` is {start}, but the shortest prompt has {min(map(len, prompts))} tokens."
        raise invalid(param, message)
    return start


def check_grammar_start(body: GenerationRequest, grammar: object, prompts: Sequence[Sequence[int]]) -> None:
    """Check that `grammar_start` is within the only prompt of a request with a grammar."""
    start, param = body.grammar_start, "grammar_start"
    if start is None:
        return
    if grammar is None:
        raise invalid(param, f"`{param}` needs a grammar.")
    if len(prompts) > 1:
        raise invalid(param, f"`{param}` needs a single prompt.")
    if start > len(prompts[0]):
        raise invalid(param, f"`{param}` is {start}, but the prompt has {len(prompts[0])} tokens.")


def check_prompt_logprobs(
    requested: PromptLogprobs, prompts: Sequence[Sequence[int]], copies: int, limits: EngineLimits
) -> None:
    """Limit the log-probs of prompts in one answer, which is in memory as a whole and has `copies` of each."""
    width, echo_width = (0 if k is None else k + 1 for k in (requested.k, requested.echo_k))
    ids = () if requested.scoring is None else requested.scoring.requested_ids
    largest_row = max(limits.max_logprobs, len(ids)) + 1
    # Rows over the full vocabulary are streamed, and once; only the best alternatives are in memory.
    row = (largest_row if requested.full_vocab else width * copies) + echo_width * copies
    count = row * sum(max(0, len(prompt) - requested.start) for prompt in prompts)
    maximum = max(_MAX_PROMPT_LOGPROBS, _FULL_LENGTHS * limits.max_model_len * largest_row)
    if count > maximum:
        message = (
            f"The answer would contain {count} log-probs of prompts, more than the maximum of {maximum}: send fewer "
            "prompts per request, or request fewer log-probs (`prompt_logprobs`, `logprobs` with `echo`, `n`)."
        )
        raise invalid("prompt_logprobs" if requested.echo_k is None else "logprobs", message, "too_many_logprobs")
