"""Valid answers written by hand, which the soak's tests corrupt."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tools.soak.checks import checked_reply
from tools.soak.client import Answer
from tools.soak.replies import Reply
from tools.soak.request import CHAT, COMPLETIONS, Body, Request, ServerFacts
from tools.soak.soak import Settings

ID = "soak-1-7"


FACTS = ServerFacts("m", 2048, 20, 1000, "fp_jax0.12_cpu_bfloat16", "0.2.0")


SETTINGS = Settings("http://s", 1, 60.0, None, 2, 4, None, 10.0, None)


CHAT_BODY: Body = {
    "messages": [{"role": "user", "content": "a secret"}],
    "temperature": 0,
    "max_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_logprobs": 1,
    "stop": ["stop"],
}
CHAT_REQUEST = Request(
    "chat",
    CHAT,
    CHAT_BODY,
)


TEXT_REQUEST = Request(
    "completion", COMPLETIONS, {"prompt": [[5, 6], [7]], "seed": 1, "max_tokens": 1, "logprobs": 2, "echo": True}
)


def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"token": "x", "logprob": logprob, "bytes": [120], "token_id": token_id, "rank": rank}


def chat_entry(token_id: int) -> dict[str, Any]:
    return entry(token_id, -0.5, 1) | {"top_logprobs": [entry(token_id, -0.5, 1), entry(token_id + 1, -1.5, 2)]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return counts | {"prompt_tokens_details": {"cached_tokens": 0}}


def prompt_entries(ids: list[int]) -> list[dict[str, Any] | None]:
    """Prompt log-probs where token 3 is the most likely and all others have rank 9."""
    best = {"3": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}}
    return [None, *({str(token): {"logprob": -4.0, "rank": 9, "decoded_token": "x"}} | best for token in ids[1:])]


def chat_answer() -> dict[str, Any]:
    """A valid answer to CHAT_REQUEST."""
    return {
        "id": f"chatcmpl-{ID}",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": FACTS.fingerprint,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "xx", "refusal": None},
                "logprobs": {"content": [chat_entry(11), chat_entry(12)], "refusal": None},
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": [11, 12],
            }
        ],
        "usage": usage(3, 2),
        "prompt_token_ids": [5, 6, 7],
        "prompt_logprobs": prompt_entries([5, 6, 7]),
    }


def text_choice(index: int, prompt: list[int]) -> dict[str, Any]:
    best = {"x": -4.0, "y": -0.1, "z": -2.5}
    own = {"a": -0.5, "b": -1.5}
    later = len(prompt) - 1
    return {
        "index": index,
        "text": "xx",
        "logprobs": {
            "tokens": [*("x" for _ in prompt), "a"],
            "token_logprobs": [None, *(-4.0 for _ in range(later)), -0.5],
            "top_logprobs": [None, *(best for _ in range(later)), own],
            "top_token_ids": [None, *([3, 4] for _ in range(later)), [11, 12]],
            "text_offset": list(range(len(prompt) + 1)),
        },
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_token_ids": prompt,
        "token_ids": [11],
        "prompt_logprobs": [
            entry and entry | {"4": {"logprob": -2.5, "rank": 2, "decoded_token": "x"}}
            for entry in prompt_entries(prompt)
        ],
    }


def text_answer() -> dict[str, Any]:
    """A valid answer to TEXT_REQUEST."""
    header = {"id": f"cmpl-{ID}", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": "f"}
    return header | {"choices": [text_choice(0, [5, 6]), text_choice(1, [7])], "usage": usage(3, 2)}


def answer_of(payload: object, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """The answer as a client records it."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    sent = {"x-request-id": ID, "content-type": "application/json", **headers}
    return Answer(ID, 0.0, status, sent, [(1.0, body)])


def wrong_with(request: Request, payload: object) -> list[str]:
    return checked_reply(request, answer_of(payload))[1]


def changed(payload: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return the payload with `value` at a path such as "choices.0.text"."""
    copied = copy.deepcopy(payload)
    target: Any = copied
    *steps, last = path.split(".")
    for step in steps:
        target = target[int(step)] if isinstance(target, list) else target[step]
    target[int(last) if isinstance(target, list) else last] = value
    return copied


CONTENT = "choices.0.logprobs.content"


def chunks() -> list[dict[str, Any]]:
    """Events of a stream with the content of `chat_answer`."""
    whole = chat_answer()
    header = {name: whole[name] for name in ("id", "created", "model", "system_fingerprint")}
    header["object"] = "chat.completion.chunk"
    prompt = {name: whole[name] for name in ("prompt_token_ids", "prompt_logprobs")}

    def choice(content: str, number: int | None, **more: object) -> dict[str, Any]:
        logprobs = None if number is None else {"content": [chat_entry(number)], "refusal": None}
        fields = {"index": 0, "delta": {"content": content}, "logprobs": logprobs, "finish_reason": None}
        return fields | ({} if number is None else {"token_ids": [number]}) | more

    return [
        header | prompt | {"choices": [choice("", None, delta={"role": "assistant", "content": ""})]},
        header | {"choices": [choice("x", 11)]},
        header | {"choices": [choice("x", 12, finish_reason="length", stop_reason=None)]},
        header | {"choices": [], "usage": whole["usage"]},
    ]


STREAM_REQUEST = replace(
    CHAT_REQUEST,
    body=CHAT_BODY | {"stream": True, "stream_options": {"include_usage": True}},
)


def stream_of(events: Iterable[object], end: bytes = b"data: [DONE]\n\n", kind: str = "text/event-stream") -> Answer:
    """A streamed answer received in pieces of seven bytes."""
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + end
    pieces = [(float(i), body[i : i + 7]) for i in range(0, len(body), 7)]
    return Answer(ID, 0.0, 200, {"x-request-id": ID, "content-type": kind}, pieces)


ERROR = {"error": {"message": "Too long.", "type": "invalid_request_error", "param": "prompt", "code": "x"}}


def reply_to(request: Request, payload: dict[str, Any]) -> Reply:
    reply = checked_reply(request, answer_of(payload))[0]
    assert reply is not None
    return reply


def reply_of_stream() -> Reply:
    reply = checked_reply(STREAM_REQUEST, stream_of(chunks()))[0]
    assert reply is not None
    return reply


def metrics_of(**values: float) -> str:
    names = ("num_requests_running", "num_requests_waiting", "num_requests_held", "kv_cache_usage_perc")
    metrics = dict.fromkeys((f"logprobd:{name}" for name in names), 0.0)
    metrics |= {"process_resident_memory_bytes": 1e9, "process_open_fds": 16, "process_start_time_seconds": 5}
    metrics |= {name if name.startswith("process") else f"logprobd:{name}": value for name, value in values.items()}
    return "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in metrics.items())
