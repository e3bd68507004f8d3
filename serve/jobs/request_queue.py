"""RequestQueue feeds an engine from one event loop and bounds the work in flight; LoopThread has such a loop."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any

from serve.engine.client import EngineClient
from serve.engine.request import FinishReason, Request, TokenEvent


class RequestError(Exception):
    """One request failed; the engine continues with others."""


class RequestQueue:
    """Runs requests of one event loop on an engine, within bounds."""

    def __init__(self, engine: EngineClient, max_requests: int, max_tokens: int) -> None:
        self._engine = engine
        self._max_requests = max_requests  # in the engine, and items that have been read and have no result yet
        self._max_tokens = max_tokens  # of the prompts of these items; a longer item runs alone
        self._slots = asyncio.Semaphore(max_requests)

    async def events(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Admit a request when a slot is free, and yield its events.

        Raises:
            RequestError: the engine failed on the request, or can never hold it.
            EngineStoppedError: the engine has stopped.
        """
        async with self._slots:
            try:
                handle = self._engine.admit(request)
            except ValueError as error:
                raise RequestError(str(error)) from None
            with handle:
                async for event in handle:
                    if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                        raise RequestError(f"the engine failed: {event.error or 'the request was aborted'}")
                    yield event

    async def run_in_order[T, R](
        self, items: Iterable[T], run: Callable[[T], Coroutine[Any, Any, R]], num_tokens: Callable[[T], int]
    ) -> AsyncGenerator[R]:
        """Run many items at the same time and yield their results in the order of the items.

        Items are read no further ahead than the bounds allow. `num_tokens` returns the prompt tokens of an item.
        """
        pending: deque[tuple[int, asyncio.Task[R]]] = deque()
        tokens = 0  # of the pending items
        try:
            for item in items:
                size = num_tokens(item)
                while pending and (
                    pending[0][1].done() or len(pending) >= self._max_requests or tokens + size > self._max_tokens
                ):
                    result = await pending[0][1]
                    tokens -= pending.popleft()[0]
                    yield result
                pending.append((size, asyncio.create_task(run(item))))
                tokens += size
                await asyncio.sleep(0)  # let the task start before the next item is read
            while pending:
                yield await pending.popleft()[1]
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)


class LoopThread:
    """An event loop in a thread, for callers that have none or whose own is running."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for its result.

        An exception in the waiting thread, such as KeyboardInterrupt, cancels the coroutine and waits for its end.
        """
        result: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []  # the one of `work`, once it is started

        def finish(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                result.cancel()
            elif (error := task.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(task.result())

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(finish)

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # interrupted before `start` was scheduled
                work.close()
                result.cancel()

        try:
            self._loop.call_soon_threadsafe(start)
            return result.result()
        except BaseException:
            if not result.done():
                self._loop.call_soon_threadsafe(cancel)
                with contextlib.suppress(CancelledError):
                    result.exception()  # waits for the end of the task
            raise

    def collect[R](self, stream: AsyncGenerator[R], on_result: Callable[[], None]) -> list[R]:
        """All results of a stream; calls `on_result` after each of them. Raises as `run`."""

        async def collect() -> list[R]:
            results: list[R] = []
            async with contextlib.aclosing(stream):
                async for result in stream:
                    results.append(result)
                    on_result()
            return results

        return self.run(collect())

    def stop(self) -> None:
        """Stop the loop. Coroutines must have ended."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
