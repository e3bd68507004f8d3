"""Engine: the thread that owns the core, and the asyncio side that talks to it.

Inbox: a queue of calls. Outbox: one asyncio queue per request, filled through `call_soon_threadsafe`.
"""

import asyncio
import contextlib
import logging
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from model.kv_cache import PAGE_SIZE
from serve.engine.core import Emitted, EngineCore, Runner
from serve.engine.request import (
    EngineLimits,
    EngineStoppedError,
    FinishReason,
    QueueFullError,
    Request,
    TokenEvent,
    empty_scores,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Stream:
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent]

    def send(self, event: TokenEvent) -> None:
        """Hands over an event from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine:
    """Runs requests on one thread. submit and abort may be called from any event loop."""

    def __init__(self, runner: Runner, limits: EngineLimits, *, max_waiting: int) -> None:
        """`max_waiting` unfinished requests may be in the engine before QueueFullError."""
        self.limits = limits
        self.failed = False
        self._runner = runner
        self._max_waiting = max_waiting
        self._core = EngineCore(runner, max_model_len=limits.max_model_len)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._streams_lock = threading.Lock()
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and not self.failed

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step; unfinished requests are aborted."""
        self._inbox.put(self._stop)
        self._thread.join()

    async def submit(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Queues a request and yields its events until the one that has a finish reason.

        Raises:
            EngineStoppedError: the engine takes no more requests.
            QueueFullError: too many requests are unfinished.
            ValueError: the prompt is empty or above the model's length, or the cache could never hold the request.
        """
        if not 1 <= len(request.prompt_token_ids) <= self.limits.max_model_len:
            raise ValueError(
                f"the prompt has {len(request.prompt_token_ids)} of 1 to {self.limits.max_model_len} tokens"
            )
        needed = -(-min(self.limits.max_model_len, request.num_tokens + request.params.max_tokens) // PAGE_SIZE)
        if needed >= self._runner.pages:
            raise ValueError(f"the request needs {needed} pages of cache, there are {self._runner.pages - 1}")
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        with self._streams_lock:
            if self._closed:
                raise EngineStoppedError
            if len(self._streams) >= self._max_waiting:
                raise QueueFullError
            self._streams[request.id] = stream
        seed = request.params.seed
        request.seed = secrets.randbits(64) if seed is None else seed & (2**64 - 1)
        self._inbox.put(lambda: self._core.add(request))
        try:
            while True:
                event = await stream.events.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds. Harmless when it has ended."""
        with self._streams_lock:
            if request_id not in self._streams:
                return
        self._inbox.put(lambda: self._abort(request_id))

    def _loop(self) -> None:
        try:
            while self._drain_inbox():
                for item in self._step():
                    self._emit(item)
        finally:
            self._close_streams()

    def _step(self) -> list[Emitted]:
        try:
            return self._core.step()
        except Exception:
            logger.exception("a step failed; its requests are ended with an error and the cache starts anew")
            return self._recover()

    def _close_streams(self) -> None:
        """Nobody is left waiting: every open stream ends, and no other is opened."""
        with self._streams_lock:
            self._closed = True
            streams = list(self._streams.values())
            self._streams.clear()
        for stream in streams:
            event = TokenEvent([], empty_scores(0, self.limits.max_logprobs), FinishReason.ERROR)
            event.error = "the engine has stopped"
            stream.send(event)

    def _drain_inbox(self) -> bool:
        """Handles all calls; waits for one while there is nothing to run. False: the thread shall end."""
        while not self._stopping:
            try:
                call = self._inbox.get(block=not self._core.scheduler.num_requests)
            except queue.Empty:
                return True
            call()
        return False

    def _recover(self) -> list[Emitted]:
        try:
            return self._core.fail_all("the engine failed on this request")
        except Exception:
            logger.exception("the engine could not recover; it stops")
            self.failed = self._stopping = True
            return []

    def _abort(self, request_id: str) -> None:
        emitted = self._core.abort(request_id)
        if emitted is not None:
            self._emit(emitted)

    def _stop(self) -> None:
        self._stopping = True

    def _emit(self, emitted: Emitted) -> None:
        request, event = emitted
        with self._streams_lock:
            stream = self._streams.get(request.id)
            if event.finish_reason is not None:
                self._streams.pop(request.id, None)
        if stream is not None:
            stream.send(event)
