"""All choices of a request as one: their deltas as they come, or their whole answers."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from serve.api.errors import APIError
from serve.api.generation import Choice, Delta, Engine, Finished
from serve.engine.request import Place, Request
from serve.text.tokenizer import Tokenizer

_TOO_SLOW = "The answer was read too slowly: too many of its tokens were waiting to be sent."
_AT_ONCE = 64  # of the choices of one HTTP request: a long list of prompts leaves room in the queue for others


async def finish_all(choices: Sequence[Choice], deltas: AsyncGenerator[tuple[Choice, Delta]]) -> list[Finished]:
    """Reads the deltas of all choices to their ends."""
    results = [Finished(choice) for choice in choices]
    async with aclosing(deltas):
        async for choice, delta in deltas:
            results[choice.index].add(delta)
    return results


async def merge(
    choices: Sequence[Choice], engine: Engine, tokenizer: Tokenizer, max_unread: int | None = None
) -> AsyncGenerator[tuple[Choice, Delta]]:
    """The deltas of all choices as they come, but of a prompt's choices the first one's first: it has the scores.

    The failure of one ends all. So does a reader that leaves `max_unread` deltas waiting: the engine is freed at once,
    and the reader is told when it has read them.
    """
    queue: asyncio.Queue[tuple[Choice, Delta] | Exception | None] = asyncio.Queue()  # None: a choice has ended
    places = _Places()
    opened = {choice.prompt_index: asyncio.Event() for choice in choices}

    async def forward(choice: Choice) -> None:
        async with aclosing(choice.deltas(engine, tokenizer)) as deltas:
            async for delta in deltas:
                if not choice.first:
                    await opened[choice.prompt_index].wait()
                if max_unread is not None and queue.qsize() >= max_unread:
                    raise APIError(503, _TOO_SLOW, None, "slow_reader")
                queue.put_nowait((choice, delta))
                opened[choice.prompt_index].set()

    async def run(choice: Choice) -> None:
        try:
            await places.run(choice.request, lambda: forward(choice))
        except Exception as error:  # noqa: BLE001 - raised again by whoever reads, after what came before it
            queue.put_nowait(error)
            for task in tasks:
                task.cancel()
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(run(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Places:
    """The places that one HTTP request has in the engine's queue: so many at once at most.

    Where the queue is full only the first choice is refused, and nothing is lost by that. The others wait, in their
    order, for one of theirs to end; when none is left, the next one gets a place beyond the limit. In their order: a
    choice that ran before the first one of its prompt would wait for that, and that for it.
    """

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._turn = asyncio.Lock()  # of those that wait: one tries, the others are behind it
        self._ended = asyncio.Event()
        self._begun = False
        self._running = self._waiting = 0

    async def run(self, request: Request, forward: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a choice's request, which `forward` submits at once, to its end.

        Raises:
            APIError: as `forward` does; 429 for the first request only.
        """
        async with self._slots:
            task = await self._tried(request, forward, waited=False)
            if task is None:
                try:
                    async with self._turn:
                        while (task := await self._tried(request, forward, waited=True)) is None:
                            if self._running:
                                await self._ended.wait()
                finally:
                    self._waiting -= 1
            await task

    async def _tried(
        self, request: Request, forward: Callable[[], Coroutine[Any, Any, None]], *, waited: bool
    ) -> asyncio.Task[bool] | None:
        """The request as it runs; None if it has to wait."""
        request.place = Place.REFUSED if not self._begun else Place.WAITS if self._running else Place.GIVEN
        self._begun = True
        self._running += 1
        self._ended.clear()
        task = asyncio.create_task(self._taken(request, forward, waited=waited))
        try:
            await asyncio.sleep(0)  # one step: the engine has taken it by then, or not
        except asyncio.CancelledError:
            task.cancel()
            raise
        refused = task.done() and not task.cancelled() and task.exception() is None and not task.result()
        return None if refused else task

    async def _taken(self, request: Request, forward: Callable[[], Coroutine[Any, Any, None]], *, waited: bool) -> bool:
        """False at once for a request that has to wait; else True when it has ended."""
        try:
            if waited or not self._waiting:
                await forward()
                self._ended.set()
                return True
        except APIError as error:
            if error.status != 429 or request.place is not Place.WAITS:
                raise
        finally:
            self._running -= 1
        if not waited:
            self._waiting += 1
        return False
