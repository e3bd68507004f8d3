"""Sampling fields of a request to SamplingParams. Each error names its field."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from serve.api.errors import invalid
from serve.api.requests import GenerationRequest
from serve.api.validation import check_ids
from serve.engine.request import EngineLimits, SamplingParams
from serve.jobs import generate as jobs
from serve.text.tokenizer import Tokenizer, TokenizerError

_MAX_STOP_STRINGS = 10_000
_MAX_BAD_WORDS = 1000
_MAX_BAD_WORD_TOKENS = 10_000  # of all words together
_MAX_NAMED = 100  # keys in an error message
_MAX_CHARACTERS = 100_000  # of all strings of a field together; preparing them takes time


def sampling_params(
    body: GenerationRequest, tokenizer: Tokenizer, limits: EngineLimits, *, processed: bool
) -> SamplingParams:
    """Sampling parameters shared by all choices; `max_tokens`, `seed` and `prompt` differ and are not set.

    Args:
        processed: whether log-probs are of the sampling distribution instead of the raw one.

    Raises:
        APIError: 400 that names a field.
    """
    check_ids("stop_token_ids", body.stop_token_ids or (), limits)
    params = replace(
        jobs.sampling_params(body),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=(frozenset() if body.ignore_eos else tokenizer.eos_token_ids)
        | frozenset(body.stop_token_ids or ()),
        logit_bias=_logit_bias(body.logit_bias or {}, limits),
        allowed_token_ids=_allowed_token_ids(body, limits),
        bad_words=bad_word_ids(body.bad_words or (), tokenizer),
        requested_ids=tuple(body.logprob_token_ids or ()),
        processed=processed,
        return_processed=bool(body.return_processed_logprobs),
    )
    _check_tokens_remain(params, limits)
    return params


def stop_strings(body: GenerationRequest) -> tuple[str, ...]:
    """The strings that end an answer. Raise APIError 400 if one is invalid."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    _check_strings("stop", stop, _MAX_STOP_STRINGS)
    return stop


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences that spell the words, determined as in vLLM.

    Each word is tokenized alone and with a leading space. The latter counts if it has the same number of tokens and
    another first token, so that the word is found at the start of a text and within it.

    Raises:
        APIError: 400 that names `bad_words`.
    """
    _check_strings("bad_words", words, _MAX_BAD_WORDS)
    runs: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = _tokens(word.lstrip(), tokenizer)
        spaced = _tokens(f" {word.lstrip()}", tokenizer)
        runs[bare] = None
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            runs[spaced] = None
    if sum(map(len, runs)) > _MAX_BAD_WORD_TOKENS:
        message = f"`bad_words` has more than {_MAX_BAD_WORD_TOKENS} tokens."
        raise invalid("bad_words", message, "array_above_max_length")
    return tuple(runs)


def _tokens(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    except TokenizerError as error:
        raise invalid("bad_words", f"`bad_words`: {error}.") from None
    if not ids:
        raise invalid("bad_words", "`bad_words` contains a word without tokens.")
    return ids


def _check_strings(param: str, strings: Sequence[str], maximum: int) -> None:
    if "" in strings:
        raise invalid(param, f"`{param}` cannot contain an empty string.")
    if len(strings) > maximum:
        raise invalid(param, f"`{param}` has more than {maximum} strings.", "array_above_max_length")
    if sum(map(len, strings)) > _MAX_CHARACTERS:
        raise invalid(param, f"`{param}` has more than {_MAX_CHARACTERS} characters.", "string_above_max_length")


def _logit_bias(biases: Mapping[str, Any], limits: EngineLimits) -> tuple[tuple[int, float], ...]:
    if len(biases) > limits.vocab_size:
        raise invalid("logit_bias", f"`logit_bias` has more entries than the vocabulary of {limits.vocab_size}.")
    size = limits.vocab_size
    _check_keys([key for key in biases if not _is_token_id(key, size)], f"keys that are not token ids below {size}")
    numbers = {key: value for key, value in biases.items() if type(value) in (int, float)}
    _check_keys(
        [key for key in biases if key not in numbers], "values that are not numbers for the keys", "invalid_type"
    )
    outside = [key for key, value in numbers.items() if not -100 <= value <= 100]
    _check_keys(outside, "values out of the range from -100 to 100 for the keys")
    return tuple((int(key), float(value)) for key, value in numbers.items())


def _is_token_id(key: str, vocab_size: int) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= 10 and key == str(int(key)) and int(key) < vocab_size


def _check_keys(bad: Sequence[str], fault: str, code: str = "invalid_value") -> None:
    """Refuse `logit_bias` if there are bad keys. An error names all that fit into it."""
    if bad:
        names = ", ".join(f"{key[:50]!r}" for key in bad[:_MAX_NAMED])
        raise invalid("logit_bias", f"`logit_bias` has {fault}: {names}.", code)


def _allowed_token_ids(body: GenerationRequest, limits: EngineLimits) -> frozenset[int] | None:
    if body.allowed_token_ids is None:
        return None
    if not body.allowed_token_ids:
        raise invalid("allowed_token_ids", "`allowed_token_ids` must contain at least one id.", "empty_array")
    check_ids("allowed_token_ids", body.allowed_token_ids, limits)
    return frozenset(body.allowed_token_ids)


def _check_tokens_remain(params: SamplingParams, limits: EngineLimits) -> None:
    """Check that whatever was generated, a token remains that neither min_tokens nor a bad word forbids."""
    bad = frozenset(word[-1] for word in params.bad_words)
    forbidden = bad | params.stop_token_ids if params.min_tokens else bad
    if params.allowed_token_ids is not None:
        if params.allowed_token_ids <= forbidden:
            message = (
                "`allowed_token_ids` could leave no token to sample, given `bad_words`, `min_tokens` and stop ids."
            )
            raise invalid("allowed_token_ids", message)
    elif len(forbidden) >= limits.vocab_size:
        param = "bad_words" if len(bad) >= limits.vocab_size else "stop_token_ids"
        raise invalid(param, f"`{param}` could leave no token to sample.")
