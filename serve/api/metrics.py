"""/metrics: Prometheus metrics of the engine and of HTTP, under our own names and optionally under vLLM's."""

import re
from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.gc_collector import GCCollector

from serve.api.middleware import AnswerRecord
from serve.api.vllm_metrics import VllmMetrics
from serve.engine.observer import EngineFault, EngineGauges, Observer
from serve.engine.request import FinishReason
from serve.engine.request_state import RequestState

CONTENT_TYPE = CONTENT_TYPE_LATEST

OWN_PREFIX = "logprobd:"
_OWN_NAME = re.compile(rf"^(# (?:HELP|TYPE) )?{OWN_PREFIX}".encode(), re.MULTILINE)
ERRORS_TEXT = "Errors sent in responses and streams, and client disconnects"

# Buckets of vLLM 0.33.
_SECONDS = (1, 2.5, 5, 7.5, 10, 20, 40, 80)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, *_SECONDS, 160, 640, 2560)
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, *_SECONDS)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP = (1.0, *(float(1 << n) for n in range(3, 15)))
_CHOICES = (1, 2, 5, 10, 20)
_HTTP = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Metrics(Observer):
    """Collects the metrics of the engine, as its `Observer`, and of the app."""

    def __init__(self, model_name: str, *, max_model_len: int, vllm_names: bool) -> None:
        """`max_model_len` bounds the buckets of token counts. `vllm_names` adds vLLM's name for each metric."""
        self._engine, self._process = CollectorRegistry(), CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        tokens = _one_two_five(max_model_len)
        self._vllm = VllmMetrics(self._labels, tokens) if vllm_names else None
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = self._counter("num_preemptions", "Preempted requests")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens")
        self._scored_tokens = self._counter("prompt_logprobs_tokens", "Prompt tokens whose log-probs were returned")
        self._generated_tokens = self._counter("generation_tokens", "Generated tokens")
        self._forced_tokens = self._counter("forced_tokens", "Generated tokens that were the only ones allowed")
        self._grammar_errors = self._counter("grammar_errors", "Requests whose grammar could not continue")
        success = self._counters("request_success", "Finished requests", "finished_reason")
        self._success = {reason: success(str(reason)) for reason in FinishReason}
        rejections = Counter(
            f"{OWN_PREFIX}admission_rejections",
            "Requests rejected because the queue was full",
            ("model_name", "reason"),  # before any engine
            registry=self._engine,
        )
        self._rejections = {
            name: rejections.labels(model_name, name) for name in ("max_num_queued_reqs", "max_num_queued_tokens")
        }
        failures = self._counters("engine_failures", "Engine failures", "kind")
        self._faults = {kind: failures(kind) for kind in EngineFault}
        self._error = self._counters("request_errors", ERRORS_TEXT, "code")
        self._step = self._histogram("iteration_tokens_total", "Tokens per step", _STEP)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN)
        self._gap = self._histogram("inter_token_latency_seconds", "Time between tokens", _GAP)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a request, 0 for one token", _GAP
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end of the request", _REQUEST)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step", _REQUEST)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token", _REQUEST
        )
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last", _REQUEST)
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the first step to the last token", _REQUEST
        )
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens per request", tokens)
        self._output_size = self._histogram("request_generation_tokens", "Generated tokens per request", tokens)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens per request", tokens)
        self._n = self._histogram("request_params_n", "Choices per prompt", _CHOICES)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Generated tokens of the longest choice of a prompt", tokens
        )
        self._add_http_metrics()

    def _add_http_metrics(self) -> None:
        self._http_count = Counter(
            "http_requests", "HTTP responses", ("handler", "method", "status"), registry=self._process
        )
        self._http_time = Histogram(
            "http_request_duration_seconds",
            "From the request to the end of the response",
            ("handler", "method"),
            buckets=_HTTP,
            registry=self._process,
        )

    def watch(self, gauges: Callable[[], EngineGauges], cache: dict[str, str]) -> None:
        """Read `gauges` at every scrape; `cache` becomes labels of cache_config_info."""

        engine, gauge = self._engine, self._gauge
        gauge("num_requests_running", "Running requests", lambda: gauges().running, engine)
        gauge("num_requests_waiting", "Waiting requests", lambda: gauges().waiting, engine)
        gauge("kv_cache_usage_perc", "Fraction of KV cache pages in use, 0 to 1", lambda: gauges().cache_usage, engine)
        gauge("cache_config_info", "Configuration of the KV cache, as labels", lambda: 1, engine, **cache)
        text = "Finished requests whose pages are pinned for full-vocabulary log-probs"  # vLLM has no such metric
        gauge("num_requests_held", text, lambda: gauges().pinned, self._process)
        if self._vllm is not None:
            self._vllm.watch(lambda: gauges().waiting)

    def watch_unsent(self, size: Callable[[], int]) -> None:
        """Read the bytes of unsent answers at every scrape."""
        self._gauge("unsent_bytes", "Counted bytes of answers in memory (--max-unsent-bytes)", size, self._process)

    def text(self) -> bytes:
        engine = generate_latest(self._engine)
        text = generate_latest(self._process) + engine
        if self._vllm is not None:
            text += _OWN_NAME.sub(rb"\1vllm:", engine) + generate_latest(self._vllm.registry)
        return text

    def on_step(self, tokens: int) -> None:
        self._step.observe(tokens)

    def on_scheduled(self, request: RequestState) -> None:
        self._prefix_queries.inc(len(request.prompt_token_ids))
        self._prefix_hits.inc(request.num_cached or 0)
        if self._vllm is not None:
            self._vllm.on_scheduled(request)

    def on_preempted(self, count: int) -> None:
        self._preemptions.inc(count)

    def on_token(self, request: RequestState, gap: float | None, *, forced: bool = False) -> None:
        self._generated_tokens.inc()
        self._forced_tokens.inc(forced)
        if gap is None:
            self._first.observe(request.times.first - request.times.arrived)
            self._on_prompt(request)
        else:
            self._gap.observe(gap)

    def on_grammar_error(self) -> None:
        self._grammar_errors.inc()

    def on_finished(self, request: RequestState, reason: FinishReason) -> None:
        self._success[reason].inc()
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        times, prompt, output = request.times, len(request.prompt_token_ids), len(request.output_token_ids)
        if not output:
            self._on_prompt(request)
        if self._vllm is not None:
            self._vllm.on_success(request)
        if request.params.prompt is not None:
            self._scored_tokens.inc(prompt - request.params.prompt.start)
        self._e2e.observe(times.last - times.arrived)
        self._queue.observe(times.scheduled - times.arrived)
        self._inference.observe(times.last - times.scheduled)
        if output:
            self._prefill.observe(times.first - times.scheduled)
            self._decode.observe(times.last - times.first)
            self._per_token.observe((times.last - times.first) / max(output - 1, 1))
        self._prompt_size.observe(prompt)
        self._output_size.observe(output)
        self._max_tokens.observe(request.params.max_tokens)

    def on_rejected(self, reason: str) -> None:
        """A request was rejected because the queue is full; `reason` is the limit."""
        self._rejections[reason].inc()

    def on_fault(self, kind: EngineFault) -> None:
        self._faults[kind].inc()

    def on_refused_connection(self, code: str) -> None:
        """Count a connection that was closed before a request, or because its client did not read."""
        self._error(code).inc()

    def on_answers(self, tokens: Sequence[int]) -> None:
        """Record a prompt whose choices have all finished; `tokens` per choice."""
        self._n.observe(len(tokens))
        self._longest.observe(max(tokens))

    def on_http(self, record: AnswerRecord) -> None:
        method = record.method if record.method in _METHODS else "other"  # clients can send any method
        self._http_count.labels(record.handler, method, str(record.status)).inc()
        self._http_time.labels(record.handler, method).observe(record.seconds)
        if record.error is not None:
            self._error(record.error).inc()

    def _on_prompt(self, request: RequestState) -> None:
        self._prompt_tokens.inc(len(request.prompt_token_ids))
        if self._vllm is not None:
            self._vllm.on_prompt(request)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(OWN_PREFIX + name, text, self._labels, registry=self._engine).labels(**self._labels)

    def _counters(self, name: str, text: str, label: str) -> Callable[[str], Counter]:
        """The counter of each value of a label."""
        family = Counter(OWN_PREFIX + name, text, [*self._labels, label], registry=self._engine)
        return lambda value: family.labels(**self._labels, **{label: value})

    def _gauge(
        self, name: str, text: str, value: Callable[[], float], registry: CollectorRegistry, **more: str
    ) -> None:
        labels = self._labels | more
        Gauge(OWN_PREFIX + name, text, labels, registry=registry).labels(**labels).set_function(value)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        labels, registry = self._labels, self._engine
        return Histogram(OWN_PREFIX + name, text, labels, buckets=buckets, registry=registry).labels(**labels)


def _one_two_five(maximum: int) -> tuple[float, ...]:
    """1, 2, 5, 10 ... up to `maximum`."""
    steps = (float(digit * 10**power) for power in range(len(str(maximum))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= maximum)
