"""MaskUpdates: computes the masks of grammars on threads, while the device works."""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait

from serve.engine.request_state import RequestState, RequestStatus

logger = logging.getLogger(__name__)

_MAX_WAIT = 0.005  # seconds that a step waits for the masks of its rows


class MaskUpdates:
    """Computes the masks of requests with grammars on a few threads; those of one request one after another."""

    def __init__(self, max_forced: int) -> None:
        self._max_forced = max_forced
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="mask")
        self._futures: dict[RequestState, Future[None]] = {}

    @property
    def in_progress(self) -> bool:
        """True if collect() may return a request without another step."""
        return any(not future.done() or _decodes(request) for request, future in self._futures.items())

    def start(self, request: RequestState) -> None:
        """Compute the mask after the output, which has been read; until then no step has a row of the request."""
        assert request.mask is not None
        request.waits_for_mask = True
        output = request.output_token_ids
        limit = min(self._max_forced, request.max_output_tokens - len(output))
        self._futures[request] = self._pool.submit(request.mask.update, output, limit)

    def collect(self) -> list[RequestState]:
        """Requests whose masks are done; waits a moment for those that are needed now.

        One whose output is complete is not returned before its prompt is computed.
        """
        if needed := [future for request, future in self._futures.items() if _decodes(request)]:
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
            collected.append(request)
        return collected


def _decodes(request: RequestState) -> bool:
    return request.status is RequestStatus.DECODE


def _is_early(request: RequestState) -> bool:
    return request.status in (RequestStatus.WAITING, RequestStatus.PREFILL)
