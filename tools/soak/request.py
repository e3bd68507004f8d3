"""Ask: one request of the traffic, and what is allowed to come of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

type Body = dict[str, Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Manner(Enum):
    """How the client behaves."""

    READS = auto()  # all, as it comes
    READS_SLOWLY = auto()
    LEAVES_WAITING = auto()  # before the first byte, where it can
    LEAVES_READING = auto()  # after some pieces of the answer
    LEAVES_SENDING = auto()  # in the middle of the body


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server tells of itself, before anything is asked of it."""

    model: str
    max_model_len: int
    max_logprobs: int
    vocab_size: int
    fingerprint: str
    version: str

    @property
    def is_exact(self) -> bool:
        """Whether the same token after the same prefix must have the same number to the last bit: the CPU's promise."""
        return "_cpu_" in self.fingerprint


@dataclass(frozen=True, slots=True)
class Ask:
    """A request."""

    kind: str
    path: str
    body: Body | bytes | None = None  # None: a GET
    status: int = 200  # the only one beside 429, which is the queue's; a client that leaves may see none
    manner: Manner = Manner.READS
    patience: float = (
        0.0  # seconds before it leaves, pieces that it reads, share that it sends, or seconds between reads
    )
    times: int = 1  # as many at once
    headers: Mapping[str, str] = field(default_factory=dict)
    # Of an answer that is none of a model's: what is wrong with it, and what is asked because of it.
    check: Callable[[bytes], Iterable[str]] = lambda _: ()
    then: Callable[[bytes], "Ask"] | None = None

    @property
    def is_get(self) -> bool:
        """Whether it asks for a page."""
        return self.body is None

    @property
    def generates(self) -> bool:
        """Whether a model's answer is due, which has to be right in many ways."""
        return self.path in (CHAT, COMPLETIONS) and isinstance(self.body, dict) and self.status == 200

    @property
    def streams(self) -> bool:
        """Whether the answer comes as events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def leaves(self) -> bool:
        """Whether the client goes away before the answer's end."""
        return self.manner not in (Manner.READS, Manner.READS_SLOWLY)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request to a model asks to be told, read from its body."""

    chat: bool
    stream: bool
    prompts: int
    n: int
    most_tokens: int | None  # generated; None: not said
    echo: bool
    alternatives: int | None  # of each generated token; None: no numbers
    named: tuple[int, ...]  # the alternatives, where they are named; else the best
    prompt_alternatives: int | None
    prompt_named: tuple[int, ...]
    prompt_start: int  # tokens before it have no numbers
    usage: bool

    @classmethod
    def of(cls, ask: Ask) -> "Wanted":
        """Of a request that generates."""
        body, chat = ask.body, ask.path == CHAT
        assert isinstance(body, dict)
        told = body.get("logprobs")
        alternatives = (body.get("top_logprobs", 0) if told else None) if chat else told
        named, prompt_named = (tuple(body.get(name, ())) for name in ("logprob_token_ids", "prompt_logprob_token_ids"))
        prompt = body.get("prompt_logprobs", told if body.get("echo") else None)
        many = not chat and isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int)
        return cls(
            chat=chat,
            stream=ask.streams,
            prompts=len(body["prompt"]) if many else 1,
            n=body.get("n", 1),
            most_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
            echo=bool(body.get("echo")),
            alternatives=len(named) if named and alternatives is not None else alternatives,
            named=named,
            prompt_alternatives=len(prompt_named) or prompt,
            prompt_named=prompt_named,
            prompt_start=max(1, body.get("prompt_logprobs_start", 0)),
            usage=not ask.streams or bool(body.get("stream_options", {}).get("include_usage")),
        )
