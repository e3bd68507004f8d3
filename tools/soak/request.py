"""Request: one request of the traffic and the outcomes it allows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

type Body = dict[str, Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class ClientBehavior(Enum):
    """How a client behaves; `Request.patience` has a meaning for each."""

    READS = auto()  # reads everything at once; patience is not used
    READS_SLOWLY = auto()  # patience: seconds between reads
    LEAVES_WAITING = auto()  # disconnects before the first byte; patience: seconds
    LEAVES_READING = auto()  # disconnects in the answer; patience: chunks read
    LEAVES_SENDING = auto()  # disconnects in the body; patience: fraction sent


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Properties of the server under test."""

    model: str
    max_model_len: int
    max_logprobs: int
    vocab_size: int
    fingerprint: str
    version: str

    @property
    def is_exact(self) -> bool:
        """True if the same token after the same prefix has bit-identical log-probs, which the CPU guarantees."""
        return "_cpu_" in self.fingerprint


@dataclass(frozen=True, slots=True)
class Request:
    """A request and how to judge its answer."""

    kind: str
    path: str
    body: Body | bytes | None = None  # None: a GET
    status: int = 200  # expected status; 429 is allowed as well, and none if the client leaves
    behavior: ClientBehavior = ClientBehavior.READS
    patience: float = 0.0
    times: int = 1  # concurrent copies
    headers: Mapping[str, str] = field(default_factory=dict)
    # For answers that are not generated: problems of a body, and the next request.
    check: Callable[[bytes], Iterable[str]] = lambda _: ()
    follow_up: Callable[[bytes], "Request"] | None = None

    @property
    def is_get(self) -> bool:
        """True for a GET."""
        return self.body is None

    @property
    def generates(self) -> bool:
        """True if the answer is a chat or text completion."""
        return self.path in (CHAT, COMPLETIONS) and isinstance(self.body, dict) and self.status == 200

    @property
    def streams(self) -> bool:
        """True if the answer is a stream of events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def leaves(self) -> bool:
        """True if the client disconnects before the end of the answer."""
        return self.behavior not in (ClientBehavior.READS, ClientBehavior.READS_SLOWLY)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the answer to a generating request must contain, derived from its body."""

    chat: bool
    stream: bool
    prompts: int
    n: int
    max_tokens: int | None  # generated tokens; None: not limited by the request
    echo: bool
    alternatives: int | None  # per generated token; None: no log-probs
    named: tuple[int, ...]  # requested alternatives; empty: the most likely ones
    prompt_alternatives: int | None
    prompt_named: tuple[int, ...]
    prompt_start: int  # earlier tokens have no log-probs
    usage: bool

    @classmethod
    def of(cls, request: Request) -> "Expectation":
        """Derive it from a generating request."""
        body, chat = request.body, request.path == CHAT
        assert isinstance(body, dict)
        logprobs = body.get("logprobs")
        alternatives = (body.get("top_logprobs", 0) if logprobs else None) if chat else logprobs
        named, prompt_named = (tuple(body.get(name, ())) for name in ("logprob_token_ids", "prompt_logprob_token_ids"))
        prompt = body.get("prompt_logprobs", logprobs if body.get("echo") else None)
        many = not chat and isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int)
        return cls(
            chat=chat,
            stream=request.streams,
            prompts=len(body["prompt"]) if many else 1,
            n=body.get("n", 1),
            max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
            echo=bool(body.get("echo")),
            alternatives=len(named) if named and alternatives is not None else alternatives,
            named=named,
            prompt_alternatives=len(prompt_named) or prompt,
            prompt_named=prompt_named,
            prompt_start=max(1, body.get("prompt_logprobs_start", 0)),
            usage=not request.streams or bool(body.get("stream_options", {}).get("include_usage")),
        )
