"""Request bodies: valid seeds and their mutations."""

import json
from copy import deepcopy
from random import Random
from typing import Any

from serve.api.decisions.requests import DecisionsRequest, SystemOneRequest
from serve.api.messages.requests import MessagesRequest
from serve.api.requests import ChatCompletionRequest, CompletionRequest, ScoreRequest
from serve.api.responses_api.requests import ResponsesRequest
from serve.api.unsupported_fields import UNSUPPORTED, WITHOUT_EFFECT
from tools.fuzz.byte_mutations import mutate_bytes
from tools.fuzz.json_mutations import mutate_json, nested, random_value, serialize

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
DECISIONS, SYSTEM_ONE, SCORE, GENERATIVE_SCORING = "/v1/decisions", "/v1/systemone", "/v1/score", "/generative_scoring"
RESPONSES, MESSAGES, COUNT_TOKENS = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
PATHS = (
    *(CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE, "/invocations", DECISIONS, SYSTEM_ONE, SCORE, GENERATIVE_SCORING),
    *(RESPONSES, MESSAGES, COUNT_TOKENS),
)

_MESSAGES: tuple[Any, ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "x", "name": "n"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "refuse"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
)
_LABELS = {"true": "y", "false": ["n", "N"]}
_PREDICATE: dict[str, Any] = {"type": "predicate", "instructions": "?", "labels": _LABELS}
_UNLABELLED: dict[str, Any] = {"type": "predicate", "instructions": "?"}
_NOUL: dict[str, Any] = {"type": "noul", "instructions": "?", "labels": _LABELS}
_ITEMS: list[Any] = [
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
    {"role": "user", "content": [{"type": "input_json", "data": {"a": [1]}}]},
]
_CALLS: list[Any] = [
    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
    *_ITEMS[:2],
]
_BLOCKS: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
]
_LOGPROBS = ["message.output_text.logprobs"]
# Values that get past validation, or nearly.
_VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("org/bytes", "alias", "gpt-9"),
    "messages": _MESSAGES,
    "prompt": ("Hi", [72, 105], ["Hi", "Ho"], [[72], [105, 256]], [1] * 70),
    "prompt_token_ids": ([72, 105], [256, 1], [259] * 65),
    "tokens": ([72, 105], [257, 258, 259], [0, 255, 195, 169]),
    "temperature": (0, 1, 1e-6, 0.005, 2),
    "top_p": (1, 0.9, 1e-9),
    "top_k": (-1, 0, 5, 2**31 - 1),
    "min_p": (0, 0.1, 1),
    "presence_penalty": (0, 1.5, -2),
    "frequency_penalty": (0, 0.5),
    "repetition_penalty": (1, 1.3, 1e-30, 1e30),
    "n": (1, 2, 5),
    "best_of": (1, 2),
    "priority": (0, -5, 2**31 - 1),
    "cache_salt": ("salt", "a@b", ""),
    "max_tokens": (0, 1, 3, 20),
    "max_completion_tokens": (0, 1, 3, 20),
    "min_tokens": (0, 1, 4),
    "logit_bias": ({"5": 1.5}, {"257": -100}, {"72": 100, "0": 0}, {"999": 1}, {"01": 1}, {"٣": 1}),
    "allowed_token_ids": ([72, 257], [5], [257]),
    "bad_words": (["Hello"], ["e", "x y"], [" "]),
    "seed": (-1, 0, 7, 2**63 - 1),
    "stop": ("l", ["o", "l"], "Hello", []),
    "stop_token_ids": ([108], [257], []),
    "stream_options": ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}),
    "logprobs": (True, 0, 1, 3),
    "top_logprobs": (0, 1, 3),
    "prompt_logprobs": (0, 1, 3, 5, -1, 260),
    "prompt_logprobs_start": (0, 1, 2, 64),
    "prompt_logprobs_format": ("entries", "columns"),
    "prompt_logprob_token_ids": ([5], [1, 2, 3], [259]),
    "logprob_token_ids": ([5], [1, 2, 3], [259]),
    "logprobs_mode": ("raw_logprobs", "processed_logprobs"),
    "truncate_prompt_tokens": (-1, 1, 2, 64),
    "truncation_side": ("left", "right"),
    "request_id": ("abc", "é", "a b"),
    "chat_template": (
        "{{ messages }}",
        "{% for m in messages %}{{ m|tojson }}{% endfor %}",
        "{% if %}",
        "{{ dict(a=1, a=2) }}",
    ),
    "chat_template_kwargs": ({"mark": "!"}, {"messages": []}, {"a": {"b": [1]}}),
    "documents": ([{"title": "t", "text": "x"}], []),
    "reasoning_effort": ("low",),
    "summary": ([], [{"type": "summary_text", "text": "x"}]),
    "role": ("system", "developer", "user", "assistant", "tool"),
    "content": ("Hi", "refuse", "", [{"type": "text", "text": "x"}], [], None),
    "type": ("text", "image_url", "predicate", "noul", "choice", "score", "function_call", "input_text", "input_image"),
    "input": ("Hi", _ITEMS, [{"role": "user", "content": "Hi"}]),
    "instructions": ("x", ""),
    "max_output_tokens": (1, 3, 20),
    "include": (_LOGPROBS, [], ["web_search_call.results"]),
    "text": ({"format": {"type": "text"}}, {"format": {"type": "json_object"}, "verbosity": "medium"}, {"format": {}}),
    "reasoning": ({"effort": "low"}, {"effort": None}, {"summary": "auto"}),
    "previous_response_id": ("resp_1",),
    "metadata": ({"a": "b"}, {"a": 1}),
    "tools": (
        [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        [{"name": "f", "input_schema": {"type": "object"}}],
        [{"type": "function", "function": {"name": "f"}}],
        [],
    ),
    "tool_choice": (
        *("none", "auto", {"type": "auto"}, {"type": "tool", "name": "f"}, {"type": "function", "name": "f"}),
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    ),
    "system": ("x", [{"type": "text", "text": "x"}], []),
    "thinking": ({"type": "disabled"}, {"type": "adaptive"}),
    "output_config": ({"effort": "low"}, {"format": {"type": "json_schema", "schema": {"type": "object"}}}),
    "stop_sequences": (["l"], [""], []),
    "state": ("Hi", {"a": 1}, ["x"], " "),
    "questions": ([_PREDICATE], [_PREDICATE] * 3, {"a.b": _NOUL}, {"q": _NOUL | {"criteria": {"true": {"k": 1}}}}),
    "choices": ([{"value": True}, {"value": "true"}], [{"value": "a"}] * 2),
    "levels": ([{"label": "a"}, {"label": "b", "labels": "b"}],),
    "criteria": ({"true": "x"}, {"a": None, "b": {"k": 1}}, ["a", "b"], []),
    "labels": (_LABELS, ["a", "b"], {"true": "y"}, {"true": "long", "false": "n"}),
    "scoring": ("labels", "sequences", "permutations", "letters"),
    "normalize": ("sum", "token", "byte", "pmi"),
    "permutations": (1, 2, 120),
    "prompt_cache_key": ("k", ""),
    "prompt_cache_options": ({"mode": "explicit"}, {"ttl": "30m"}, {"ttl": "1h"}),
    "query": ("Hi", "", [72, 105], None),
    "items": ("a", ["a", "b"], [[1], [2, 3]], []),
    "label_token_ids": ([65, 66], [[65], [66, 67]], [260], [1, 1]),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
}
_FLAGS = (
    *("stream", "echo", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids"),
    *("return_tokens_as_token_ids", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
    *("return_prompt_text", "return_token_strs", "return_token_bytes", "include_usage"),
    *("apply_softmax", "item_first", "return_token_logprobs", "store", "parallel_tool_calls"),
)
_MODELS = [
    name
    for model in (
        *(ChatCompletionRequest, CompletionRequest, DecisionsRequest, SystemOneRequest, ScoreRequest),
        *(ResponsesRequest, MessagesRequest),
    )
    for name in model.model_fields
]
# Includes unknown fields. Fields with most effect occur twice.
_OTHERS = (*[*UNSUPPORTED][:24], *sorted(WITHOUT_EFFECT)[:12], "flavour", "x" * 200, "\0", "é", "temprature")
FIELDS = (*_VALUES, *_FLAGS, *dict.fromkeys(_MODELS), *_OTHERS)


def _seeds() -> list[tuple[str, dict[str, Any]]]:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 3}
    numbers = {"prompt_logprobs": 2, "return_token_ids": True}
    chat, text = {"messages": _MESSAGES[1]} | greedy, {"prompt": "Hi"} | greedy
    all_fields = {name: values[0] for name, values in _VALUES.items() if name in CompletionRequest.model_fields}
    all_fields |= {
        "stop": "l",
        "n": 2,
        "best_of": 2,
        "min_tokens": 0,
        "logprobs": 1,
        "temperature": 1,
        "prompt_logprobs": 0,
    }
    del all_fields["prompt_logprob_token_ids"], all_fields["stream_options"]
    return [
        (CHAT, chat),
        (CHAT, chat | numbers | {"logprobs": True, "top_logprobs": 2, "n": 2, "echo": True}),
        (CHAT, chat | numbers | {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}),
        (CHAT, {"prompt_token_ids": [72, 105], "return_prompt_text": True} | greedy),
        (CHAT, chat | {"chat_template_kwargs": {"mark": "!"}, "documents": [{"text": "x"}], "stop": ["l", "o"]}),
        (COMPLETIONS, text),
        (COMPLETIONS, text | numbers | {"echo": True, "logprobs": 3, "prompt": ["Hi", "Ho"], "n": 2}),
        (COMPLETIONS, text | {"prompt": [[72], [105, 256]], "stream": True, "prompt_logprobs": 1, "echo": True}),
        (COMPLETIONS, text | {"prompt_logprobs": -1, "max_tokens": 0}),
        (COMPLETIONS, text | {"prompt_logprobs": 1, "prompt_logprobs_format": "columns", "prompt_logprobs_start": 1}),
        (COMPLETIONS, all_fields | {"prompt": "Hi"}),
        (TOKENIZE, {"prompt": "Hé", "return_token_strs": True}),
        (TOKENIZE, {"messages": _MESSAGES[0], "add_special_tokens": True}),
        (DETOKENIZE, {"tokens": [72, 105, 257], "return_token_bytes": True}),
        (DECISIONS, {"input": "Hi", "questions": [_PREDICATE | {"name": "q"}, _PREDICATE], "return_token_ids": True}),
        (DECISIONS, {"input": _ITEMS[2:], "questions": [_UNLABELLED], "scoring": "sequences", "normalize": "byte"}),
        (SYSTEM_ONE, {"state": {"a": 1}, "questions": {"q": _NOUL, "r": _NOUL}, "scoring": "permutations"}),
        (SCORE, {"query": "Hi", "items": ["a", "b"], "label_token_ids": [65, 66], "apply_softmax": True}),
        (SCORE, {"query": [1], "items": [[2], [3]], "label_token_ids": [[65], [66]], "return_token_logprobs": True}),
        (GENERATIVE_SCORING, {"query": "Hi", "items": ["a"], "label_token_ids": [65], "item_first": True}),
        (RESPONSES, {"input": "Hi", "temperature": 0, "max_output_tokens": 3, "include": _LOGPROBS, "top_logprobs": 1}),
        (RESPONSES, {"input": _CALLS[:1], "instructions": "x", "max_output_tokens": 3, "stream": True}),
        (
            RESPONSES,
            {"input": "Hi", "max_output_tokens": 3, "text": {"format": {"type": "text"}}, "metadata": {"a": "b"}},
        ),
        (MESSAGES, {"messages": _BLOCKS[:1], "system": "x", "max_tokens": 3, "logprobs": True, "top_logprobs": 1}),
        (MESSAGES, {"messages": _BLOCKS[:1], "max_tokens": 3, "stop_sequences": ["l"], "stream": True}),
        (COUNT_TOKENS, {"messages": _BLOCKS, "model": "alias"}),
        ("/invocations", text | {"echo": True}),
        ("/invocations", chat),
    ]


def pack(path: str, body: bytes) -> bytes:
    """Encode a path and a body as one input."""
    return bytes([PATHS.index(path)]) + body


def unpack(data: bytes) -> tuple[str, bytes]:
    """Decode path and body of any input."""
    return PATHS[(data[0] if data else 0) % len(PATHS)], data[1:]


def seeds() -> list[bytes]:
    """Valid inputs that cover many fields."""
    return [pack(path, json.dumps(body).encode()) for path, body in _seeds()]


def mutate(data: bytes, random: Random) -> bytes:
    """Return an input after a few mutations, mostly of JSON values."""
    path, body = unpack(data)
    if random.random() < 0.05:
        path = random.choice(PATHS)
    try:
        value = json.loads(body)
        if not isinstance(value, dict) or random.random() < 0.1:
            return pack(path, mutate_bytes(body, random))
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            _mutate(value, random)
        return pack(path, serialize(value, random))
    except (ValueError, RecursionError, OverflowError):  # no longer JSON, or too deep to serialize
        return pack(path, mutate_bytes(body, random))


def _mutate(value: dict[str, Any], random: Random) -> None:
    if random.random() < 0.5:
        name = random.choice(FIELDS)
        value[name] = deepcopy(_plausible_value(name, random))
    else:
        mutate_json(value, random, _plausible_value)


def _plausible_value(name: str, random: Random) -> Any:
    """Return a value that is mostly plausible for the field."""
    chance = random.random()
    if chance < 0.05:
        return nested(random)
    if chance < 0.25:
        return random_value(random)
    return random.choice(_VALUES.get(name, (True, False, None, 0.5, {"some": "value"})))
