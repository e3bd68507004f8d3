"""MaskUpdates: computes the masks of grammars, slow ones on threads."""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from serve.engine.request_state import RequestState, RequestStatus

logger = logging.getLogger(__name__)

_MAX_WAIT = 0.005  # seconds that a step waits for the masks of its rows
_SLOW = 0.001  # seconds of an update; most take 0.05 ms, which is less than to hand them to a thread and back


class MaskUpdates:
    """Computes the masks of requests with grammars: on a few threads the first mask of each, and all later ones after a
    slow one; the others at once.
    """

    def __init__(self, max_forced: int) -> None:
        self._max_forced = max_forced
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="mask")
        self._futures: dict[RequestState, Future[float]] = {}  # seconds of the update

    @property
    def in_progress(self) -> bool:
        """True if collect() may return a request without another step."""
        return any(not future.done() or _decodes(request) for request, future in self._futures.items())

    def close(self) -> None:
        """End the threads after the masks that they compute now."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, request: RequestState) -> None:
        """Compute the mask after the output, which has been read; until then no step has a row of the request."""
        mask, output = request.mask, request.output_token_ids
        assert mask is not None
        limit = min(self._max_forced, request.max_output_tokens - len(output))

        def update() -> float:
            start = time.thread_time()
            mask.update(output, limit)
            return time.thread_time() - start

        request.waits_for_mask = True
        self._futures[request] = _run(update) if mask.is_quick else self._pool.submit(update)

    def collect(self) -> list[RequestState]:
        """Requests whose masks are done; waits a moment for those that are needed now.

        One whose output is complete is not returned before its prompt is computed.
        """
        needed = [future for request, future in self._futures.items() if _decodes(request) and not future.done()]
        if needed:
            wait(needed, _MAX_WAIT)
        collected = []
        for request, future in list(self._futures.items()):
            mask = request.mask
            assert mask is not None
            if not future.done() or (mask.is_complete and not mask.forced and _is_early(request)):
                continue
            del self._futures[request]
            request.waits_for_mask = False
            if (failure := future.exception()) is not None:
                logger.error("a grammar failed", exc_info=failure)
                mask.forced, mask.error = [], "the grammar failed"
            elif mask.is_quick is not False:
                mask.is_quick = future.result() < _SLOW
            collected.append(request)
        return collected


def _run[T](call: Callable[[], T]) -> Future[T]:
    """The future of a call that is made now."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  # as a thread pool does
        future.set_exception(error)
    return future


def _decodes(request: RequestState) -> bool:
    return request.status is RequestStatus.DECODE


def _is_early(request: RequestState) -> bool:
    return request.status in (RequestStatus.WAITING, RequestStatus.PREFILL)
