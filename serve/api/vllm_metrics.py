"""VllmMetrics: the metrics of vLLM 0.33 that have no counterpart here; the others only have two names."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from serve.engine.request_state import RequestState

_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_TIERS = ("device", "host", "p2p", "disk", "external_unspecified")
_ZERO = ("external_prefix_cache_queries", "external_prefix_cache_hits", "mm_cache_queries", "mm_cache_hits")


class VllmMetrics:
    def __init__(self, labels: dict[str, str], token_buckets: Sequence[float]) -> None:
        self.registry = CollectorRegistry()
        self._labels = labels
        for name in _ZERO:
            self._one(Counter, name, "Always 0")
        self._cached = self._one(Counter, "prompt_tokens_cached", "Cached prompt tokens")
        self._by_source = self._each(Counter, "prompt_tokens_by_source", "Prompt tokens by source", "source", _SOURCES)
        self._by_tier = self._each(
            Counter, "prompt_tokens_cached_by_source", "Cached prompt tokens, when scheduled", "source", _TIERS
        )
        states = self._each(
            Gauge, "engine_sleep_state", "Always awake", "sleep_state", ("awake", "weights_offloaded", "discard_all")
        )
        states["awake"].set(1)
        self._reasons = self._each(
            Gauge, "num_requests_waiting_by_reason", "Waiting requests by reason", "reason", ("capacity", "deferred")
        )
        self._preemptions = self._one(
            Histogram, "request_num_preemptions", "Preemptions per request", buckets=_PREEMPTIONS
        )
        self._computed = self._one(
            Histogram, "request_prefill_kv_computed_tokens", "Computed prompt tokens per request", buckets=token_buckets
        )

    def watch(self, waiting: Callable[[], float]) -> None:
        self._reasons["capacity"].set_function(waiting)

    def on_scheduled(self, request: RequestState) -> None:
        self._by_tier["device"].inc(request.num_cached or 0)

    def on_prompt(self, request: RequestState) -> None:
        """The prompt of `request` is computed."""
        cached = request.num_cached or 0
        self._cached.inc(cached)
        self._by_source["local_cache_hit"].inc(cached)
        self._by_source["local_compute"].inc(len(request.prompt_token_ids) - cached)

    def on_success(self, request: RequestState) -> None:
        self._preemptions.observe(request.num_preemptions)
        self._computed.observe(len(request.prompt_token_ids) - (request.num_cached or 0))

    def _one[M: MetricWrapperBase](self, kind: type[M], name: str, text: str, **options: Sequence[float]) -> M:
        family = kind(f"vllm:{name}", text, [*self._labels], registry=self.registry, **options)  # type: ignore[arg-type]
        return family.labels(**self._labels)

    def _each[M: MetricWrapperBase](
        self, kind: type[M], name: str, text: str, label: str, values: Sequence[str]
    ) -> dict[str, M]:
        family = kind(f"vllm:{name}", text, [*self._labels, label], registry=self.registry)
        return {value: family.labels(**self._labels, **{label: value}) for value in values}
