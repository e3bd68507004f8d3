"""LoopThread: an event loop in a thread, for callers that have none or whose own is running."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any


class LoopThread:
    """Runs coroutines for any thread."""

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

    def stop(self) -> None:
        """Stop the loop. Coroutines must have ended."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
