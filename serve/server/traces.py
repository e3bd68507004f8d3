"""OpenTelemetry traces: a span for each HTTP request, exported over OTLP by a thread.

Attributes follow OpenTelemetry's conventions for HTTP servers and generative AI; those of latency have vLLM's names.
"""

import os
import threading
from typing import TYPE_CHECKING, Any

from serve import __version__
from serve.api.middleware import NO_ROUTE, AnswerRecord, Work
from serve.api.trace_context import TraceContext
from serve.config.config import ServeConfig
from serve.server.model_files import StartupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_CLOSE_SECONDS = 3.0  # for the last spans, if the collector does not answer


def open_tracer(config: ServeConfig) -> "OtlpTracer | None":
    """The tracer of --otlp-traces-endpoint; None without the flag.

    Raises:
        StartupError: the flag is no URL, or the packages are missing.
    """
    endpoint = config.otlp_traces_endpoint
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise StartupError(f"--otlp-traces-endpoint: {endpoint!r} does not start with http:// or https://")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        message = "OpenTelemetry is not installed: pip install 'logprobd[otel]'"
        raise StartupError(f"--otlp-traces-endpoint: {message}") from None
    service = {SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "logprobd"), SERVICE_VERSION: __version__}
    provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return OtlpTracer(provider)


class OtlpTracer:
    """See `Tracer`."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("logprobd", __version__)

    def start(self, record: AnswerRecord) -> None:
        """Start the span of a request, a child of the client's span."""
        from opentelemetry import trace

        context = None
        if (parent := record.trace) is not None:
            ids, flags = (int(parent.trace_id, 16), int(parent.span_id, 16)), trace.TraceFlags(parent.is_sampled)
            remote = trace.SpanContext(*ids, is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        span = self._tracer.start_span(record.method, context, trace.SpanKind.SERVER)
        own = span.get_span_context()
        if own.is_remote or not own.is_valid:  # with OTEL_SDK_DISABLED it is the client's or none
            return
        record.span = span
        record.trace = TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", own.trace_flags.sampled)

    def end(self, record: AnswerRecord) -> None:
        """End the span of a complete record. The exporter's thread sends it; if its queue is full, it is dropped."""
        from opentelemetry.trace import StatusCode

        span = record.span
        if span is None:
            return
        if record.handler != NO_ROUTE:
            span.update_name(f"{record.method} {record.handler}")
        span.set_attributes(_attributes(record))
        if record.status >= 500 or (record.error is not None and record.status < 400):
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send the last spans."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)


def _attributes(record: AnswerRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "http.route": None if record.handler == NO_ROUTE else record.handler,
        "client.address": record.client,
        "error.type": record.error,
        "logprobd.request_id": record.request_id,
        "logprobd.key": record.key,
        **record.generation,
        **(_work_attributes(record.work) if record.work is not None else {}),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _work_attributes(work: Work) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": work.prompt_tokens,
        "gen_ai.usage.output_tokens": work.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": work.cached_tokens,
        "gen_ai.latency.time_in_queue": work.queue_seconds,
        "gen_ai.latency.time_in_model_prefill": work.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": work.decode_seconds,
        "gen_ai.latency.time_to_first_token": work.first_token_seconds,
    }
