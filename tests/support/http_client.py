"""The ASGI app with a real engine and a scripted runner, for tests of the HTTP layer.

The tokenizer has a token for each of the 256 bytes, whose id is the byte, so that texts, ids and offsets can be read
off; after them come BEGIN, END (the end of a sequence) and TWIN, which reads like the byte 0xFF.
"""

import asyncio
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.applications import Starlette

from compiled.state import (
    MAX_REQUESTED_IDS,
    DecodeInput,
    SamplingArrays,
    ScoreInput,
    SlotPenalties,
    StepOutput,
    mask_words,
)
from model.kv_cache import NULL_PAGE, PAGE_SIZE
from model.token_logprobs import NO_ID, TokenLogprobs
from serve.api.app import create_app
from serve.api.context import ServedModel
from serve.api.keys import ApiKeys
from serve.api.metrics import Metrics
from serve.api.middleware import OnAnswer, Readiness, Tracer
from serve.config.config import ServeConfig
from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions, Request, TokenEvent
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer, byte_characters
from tests.support import fake_runner
from tests.support.engines import assert_idle
from tests.support.fake_runner import MAX_MODEL_LEN, FakeRunner, K, Unread

MODEL = "org/bytes"
VOCAB_SIZE = 260
BEGIN, END, TWIN = 256, 257, 258
IMPOSSIBLE = 7  # a byte whose log-prob is minus infinity
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_TIMEOUT = 20  # seconds; only reached if something hangs

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('It is refused.') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}{{ mark or ';' }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@functools.cache
def byte_tokenizer(*, add_bos: bool = False, chat_template: str | None = TEMPLATE, pre: str = "gpt-2") -> Tokenizer:
    """Return the tokenizer of the module's docstring; with `add_bos`, texts start with BEGIN."""
    characters = byte_characters()
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*characters, "<begin>", "<end>", "\\xff", characters[0] + characters[1]],
        "token_type": [_NORMAL] * 256 + [_CONTROL, _CONTROL, _USER_DEFINED, _NORMAL],
        "merges": [f"{characters[0]} {characters[1]}"],  # at least one is required; no text contains these bytes
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "add_bos_token": add_bos,
    }
    keys: dict[str, Any] = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    return tokenizer_from_gguf(keys | ({} if chat_template is None else {"tokenizer.chat_template": chat_template}))


class ScriptedRunner(FakeRunner):
    """A runner that generates a script and then END; without a script, a FakeRunner.

    A forbidden token gives way to the next id. The token of step s has log-prob -(s + 1) / 10 and rank 2; before it
    stands the next id with half of that, after it the id after next, whose probability is 0. Ids that a request names
    have the FakeRunner's numbers.
    """

    def __init__(self, script: Sequence[int] | None, *, pages: int, pages_per_row: int) -> None:
        super().__init__(pages=pages, pages_per_row=pages_per_row)
        self.script = script
        self.vocab_size = VOCAB_SIZE

    def set_penalties(self, slot: int, adjustment: SlotPenalties) -> None:
        """Fill a slot of the FakeRunner's vocabulary."""
        size = fake_runner.VOCAB_SIZE
        assert len(adjustment.bias) == VOCAB_SIZE
        columns = (adjustment.bias, adjustment.counts, adjustment.seen)
        super().set_penalties(slot, SlotPenalties(*(column[:size] for column in columns)))

    def score(self, inputs: ScoreInput) -> Any:
        """Return the FakeRunner's log-probs, except for IMPOSSIBLE."""
        result = super().score(inputs)
        if self.script is not None:
            result.tree.logprob[inputs.targets == IMPOSSIBLE] = -np.inf
        return result

    def _choose(self, hidden: list[int], inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        if self.script is None:
            mask = sampling.mask[:, : mask_words(fake_runner.VOCAB_SIZE)]
            return super()._choose(hidden, inputs, replace(sampling, mask=mask))
        steps = np.asarray(sampling.step, np.int64)
        wanted = [self.script[s] if s < len(self.script) else END for s in steps]
        tokens = np.array(
            [_allowed(token, words) for token, words in zip(wanted, sampling.mask, strict=True)], np.int32
        )
        own = (-(steps + 1) / 10).astype(np.float32)
        own[tokens == IMPOSSIBLE] = -np.inf
        scored = np.where(inputs.requested_ids == NO_ID, 0, inputs.requested_ids)
        numbers = replace(
            fake_runner.numbers(hidden, tokens.tolist(), scored),
            logprob=own,
            rank=np.full(len(own), 2, np.int32),
            top_ids=np.stack([tokens + 1, tokens, tokens + 2], axis=1),
            top_logprobs=np.stack([own / np.float32(2), own, np.full_like(own, -np.inf)], axis=1),
        )
        return StepOutput(
            tokens, numbers, numbers, fake_runner.logmass(sampling.mask), fake_runner.experts_after(hidden)
        )


def _allowed(token: int, words: NDArray[np.uint32]) -> int:
    while not int(words[token // 32]) >> token % 32 & 1:
        token = (token + 1) % VOCAB_SIZE
    return token


class ExactRunner(ScriptedRunner):
    """A runner whose prompt log-probs, ranks and alternatives follow from full rows."""

    def row(self, hidden: int) -> NDArray[np.float32]:
        """Return log-probs [V] after a hidden state. Many are equal, and one is minus infinity."""
        row = (-((np.arange(VOCAB_SIZE) * 37 + hidden) % 101) / 8).astype(np.float32)
        row[hidden % VOCAB_SIZE] = -np.inf
        return row

    def score(self, inputs: ScoreInput) -> Any:
        """Return values derived from the rows."""
        numbers = super().score(inputs).tree
        for i, hidden in enumerate(self._hidden_at(inputs.cache_indices[_live(inputs.cache_indices)])):
            row, token = self.row(hidden), inputs.targets[i]
            order = np.argsort(-row, kind="stable")
            numbers.logprob[i], numbers.rank[i] = row[token], 1 + int(np.flatnonzero(order == token)[0])
            numbers.top_ids[i], numbers.top_logprobs[i] = order[:K], row[order[:K]]
        return Unread(numbers)

    def full_vocab_logprobs(self, places: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return values derived from the rows."""
        rows = np.zeros((len(super().full_vocab_logprobs(places)), VOCAB_SIZE), np.float32)
        for i, hidden in enumerate(self._hidden_at(places[_live(places)])):
            rows[i] = self.row(hidden)
        return rows


def _live(places: NDArray[np.int32]) -> NDArray[np.bool_]:
    live: NDArray[np.bool_] = places // PAGE_SIZE != NULL_PAGE
    return live


class Gate:
    """As `runner.before_call`, block the engine at the (after + 1)th call of a name until opened."""

    def __init__(self, name: str, after: int = 0) -> None:
        self._name, self._left = name, after
        self._reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, name: str) -> None:
        if name == self._name:
            self._left -= 1
            if self._left < 0:
                self._reached.set()
                assert self._opened.wait(_TIMEOUT)

    def open(self) -> None:
        """Let the engine continue, permanently."""
        self._opened.set()

    def wait(self) -> None:
        """Wait until the engine is blocked."""
        assert self._reached.wait(_TIMEOUT)

    async def reached(self) -> None:
        """Wait without blocking the event loop."""
        await asyncio.to_thread(self.wait)


@dataclass(slots=True)
class Server:
    """A running app and its client."""

    runner: ScriptedRunner
    engine: Engine
    app: Starlette
    client: httpx2.AsyncClient

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """POST JSON; bytes are sent unchanged."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with asyncio.timeout(_TIMEOUT):
            return await self.client.post(path, content=content, headers={"content-type": "application/json"} | headers)

    async def chat(self, **fields: Any) -> Any:
        """Send a greedy chat request and return its successful answer."""
        return answered(await self.post("/v1/chat/completions", chat_body(**fields)))

    async def complete(self, **fields: Any) -> Any:
        """Send a greedy completions request and return its successful answer."""
        return answered(await self.post("/v1/completions", completion_body(**fields)))

    async def chat_stream(self, **fields: Any) -> list[Any]:
        """Return the chunks of a streamed `chat`, without the final [DONE]."""
        return chunks_of(await self.post("/v1/chat/completions", chat_body(**fields, stream=True)))

    async def complete_stream(self, **fields: Any) -> list[Any]:
        """Return the chunks of a streamed `complete`."""
        return chunks_of(await self.post("/v1/completions", completion_body(**fields, stream=True)))

    def stop(self) -> None:
        """Stop the engine, even if a test holds its runner."""
        self.runner.before_call = lambda _: None
        self.engine.stop()

    async def assert_idle(self) -> None:
        """Stop the engine and assert that it has no request and all pages are free."""
        await asyncio.to_thread(self.engine.stop)
        assert_idle(self.engine)


def start_server(
    script: Sequence[int] | None = b"Hello",
    *,
    runner: type[ScriptedRunner] = ScriptedRunner,
    pages: int = 64,
    full_vocab: bool = False,
    routing: tuple[int, int] | None = None,
    max_waiting: int = 64,
    max_waiting_tokens: int | None = None,
    add_bos: bool = False,
    vllm_names: bool = False,
    max_model_len: int = MAX_MODEL_LEN,
    readiness: Readiness | None = None,
    api_keys: ApiKeys | None = None,
    on_answer: OnAnswer | None = None,
    tracer: Tracer | None = None,
    **config: Any,
) -> Server:
    """A running server whose model generates `script` and then END. `Server.stop` ends it.

    Args:
        config: fields of ServedModel and ServeConfig; `pre` is the tokenizer's pre-tokenizer.
    """
    runs = runner(script, pages=pages, pages_per_row=-(-max_model_len // PAGE_SIZE))
    limits = EngineLimits(
        max_model_len=max_model_len,
        max_logprobs=K,
        vocab_size=VOCAB_SIZE,
        cache_tokens=(pages - 1) * PAGE_SIZE,
        max_requested_ids=MAX_REQUESTED_IDS,
        full_vocab=full_vocab,
        routing=routing,
    )
    metrics = Metrics(MODEL, max_model_len=max_model_len, vllm_names=vllm_names)
    options = EngineOptions(
        max_num_batched_tokens=68, max_num_queued_reqs=max_waiting, max_num_queued_tokens=max_waiting_tokens
    )
    engine = Engine(runs, limits, options, metrics)
    metrics.watch(lambda: engine.gauges, {"block_size": str(PAGE_SIZE)})
    engine.start()
    facts = {name: config.pop(name) for name in ("system_fingerprint", "defaults") if name in config}
    tokenizer = byte_tokenizer(
        add_bos=add_bos, chat_template=config.pop("chat_template", TEMPLATE), pre=config.pop("pre", "gpt-2")
    )
    model = ServedModel(config.get("served_model_name", (MODEL, "alias")), tokenizer, **facts)
    settings = ServeConfig(**{"allowed_hosts": ("*",)} | config)
    app = create_app(
        engine,
        model,
        settings,
        metrics,
        readiness=readiness,
        api_keys=api_keys,
        on_answer=on_answer,
        tracer=tracer,
    )
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    client = httpx2.AsyncClient(transport=transport, base_url="http://test")
    return Server(runs, engine, app, client)


@contextmanager
def shared_server(script: Sequence[int] | None = b"Hello", **options: Any) -> Iterator[Server]:
    """A server for several tests, each with an event loop of its own; arguments as in `start_server`."""
    server = start_server(script, **options)
    try:
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def serving(script: Sequence[int] | None = b"Hello", **options: Any) -> AsyncIterator[Server]:
    """A server for one test; arguments as in `start_server`."""
    server = start_server(script, **options)
    try:
        async with server.client:
            yield server
    finally:
        await asyncio.to_thread(server.stop)


def alternatives(ids: NDArray[np.int32], tops: NDArray[np.float32], own: NDArray[np.float32], rank: int) -> Unread:
    """Return the result of a runner's score(): own [R], ids and tops [R, K]."""
    none = np.zeros((len(own), MAX_REQUESTED_IDS))
    ranks = np.full(len(own), rank, np.int32)
    return Unread(TokenLogprobs(own, ranks, ids, tops, none.astype(np.float32), none.astype(np.int32)))


def wrap_admit(server: Server, wrap: Callable[[RequestHandle], RequestHandle]) -> None:
    """Apply `wrap` to the handles of all requests admitted from now on."""
    admit = server.engine.admit

    def wrapped(request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        return wrap(admit(request, bypass_limits=bypass_limits))

    server.engine.admit = wrapped  # type: ignore[method-assign]


def record_handles(server: Server) -> list[RequestHandle]:
    """Return a list that receives the handles of all requests admitted from now on."""
    handles: list[RequestHandle] = []

    def record(handle: RequestHandle) -> RequestHandle:
        handles.append(handle)
        return handle

    wrap_admit(server, record)
    return handles


def submitted(server: Server) -> list[Request]:
    """Return a list that receives all requests admitted from now on."""
    requests: list[Request] = []

    def record(handle: RequestHandle) -> RequestHandle:
        requests.append(handle.request)
        return handle

    wrap_admit(server, record)
    return requests


class AlteredHandle(RequestHandle):
    """A handle whose events are modified."""

    def __init__(self, handle: RequestHandle, change: Callable[[TokenEvent], TokenEvent]) -> None:
        super().__init__(handle._engine, handle._state)
        self._handle = handle
        self._change = change

    async def __anext__(self) -> TokenEvent:
        """Return the next event, modified."""
        return self._change(await anext(self._handle))


def alter_events(server: Server, change: Callable[[TokenEvent], TokenEvent]) -> None:
    """Modify all events of requests admitted from now on."""
    wrap_admit(server, lambda handle: AlteredHandle(handle, change))


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    """Return a greedy request for either endpoint."""
    return (chat_body if path == CHAT else completion_body)(**fields)


def chat_body(**fields: Any) -> dict[str, Any]:
    """Return a greedy chat request."""
    return {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0} | fields


def completion_body(**fields: Any) -> dict[str, Any]:
    """Return a greedy completions request."""
    return {"prompt": "Hi", "temperature": 0} | fields


def answered(response: httpx2.Response) -> Any:
    """Return the JSON of a successful answer."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return parse_unique(response.text)


def parse_unique(text: str) -> Any:
    """Parse JSON and reject duplicate keys, of which parsers silently use the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({name for name, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def events_of(response: httpx2.Response) -> list[str]:
    """Return the data of all server-sent events."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def chunks_of(response: httpx2.Response) -> list[Any]:
    """Return the JSON of all events before the final [DONE]."""
    *events, last = events_of(response)
    assert last == "[DONE]"
    return [parse_unique(event) for event in events]


def error_of(response: httpx2.Response, status: int) -> Any:
    """Check the envelope of an error and return its error object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 1000
    return error


@dataclass(slots=True)
class Connection:
    """An ASGI-level client that receives each message when it is sent and can disconnect at any time."""

    path: str
    body: Any
    sent: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    _incoming: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def run(self, app: Starlette) -> None:
        """Send the request and wait until the app has finished."""
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(self.body).encode()})
        await self.talk(app)

    async def talk(self, app: Starlette) -> None:
        """Run the app without sending the body."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), *self.headers],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        async with asyncio.timeout(_TIMEOUT):
            await app(scope, self._incoming.get, self._send)

    async def data(self) -> bytes:
        """Return the next chunk of the answer's body."""
        async with asyncio.timeout(_TIMEOUT):
            while (message := await self.sent.get())["type"] != "http.response.body":
                pass
        return bytes(message["body"])

    def leave(self) -> None:
        """Disconnect."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        self.sent.put_nowait(dict(message))
