"""Traces: a real OTLP exporter and receiver, and the client's trace context."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serve.api.access_log import fields_of
from serve.api.keys import ApiKeys
from serve.api.middleware import AnswerRecord
from serve.config.api_keys import ApiKey
from serve.config.config import ServeConfig
from serve.server.model_files import StartupError
from serve.server.traces import OtlpTracer, open_tracer
from tests.support.http_client import CHAT, COMPLETIONS, MODEL, chat_body, completion_body, serving

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


class Receiver:
    """An OTLP/HTTP collector."""

    def __init__(self) -> None:
        requests: Queue[tuple[str, bytes]] = Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                requests.put((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._requests = requests
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def spans(self) -> list[Any]:
        """The spans of all requests so far, by the time of their ends."""
        found = []
        while not self._requests.empty():
            path, body = self._requests.get()
            assert path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                assert values(resource.resource)["service.name"] == "logprobd"
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return sorted(found, key=lambda span: span.end_time_unix_nano)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def values(attributed: Any) -> dict[str, Any]:
    """Attributes of a span or a resource."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributed.attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def tracer_to(url: str) -> OtlpTracer:
    tracer = open_tracer(ServeConfig(otlp_traces_endpoint=url))
    assert tracer is not None
    return tracer


async def test_span_of_a_generation(receiver: Receiver) -> None:
    tracer, records, keys = tracer_to(receiver.url), list[AnswerRecord](), ApiKeys([ApiKey(name="alice", key="a")])
    async with serving(tracer=tracer, on_answer=records.append, api_keys=keys) as server:
        body = completion_body(prompt=[1] * 10, max_tokens=3, n=2, temperature=0.5, seed=1)
        response = await server.post(COMPLETIONS, body, traceparent=PARENT, **{"X-Api-Key": "a"})
        assert (await server.client.get("/health")).status_code == 200  # is not traced
    tracer.close()
    [span] = receiver.spans()
    assert (span.name, span.kind, span.status.code) == (f"POST {COMPLETIONS}", span.SPAN_KIND_SERVER, 0)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert response.headers["traceresponse"] == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    assert fields_of(records[0])["trace_id"] == TRACE_ID
    attributes = values(span)
    names = ("time_in_queue", "time_in_model_prefill", "time_to_first_token", "time_in_model_decode")
    times = [attributes.pop(f"gen_ai.latency.{name}") for name in names]
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in times)
    work = records[0].work
    assert work is not None
    assert times == [work.queue_seconds, work.prefill_seconds, work.first_token_seconds, work.decode_seconds]
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": COMPLETIONS,
        "url.path": COMPLETIONS,
        "client.address": "127.0.0.1",
        "logprobd.request_id": response.headers["x-request-id"],
        "logprobd.key": "alice",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "logprobd",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": response.json()["id"],
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }


async def test_spans_without_a_parent_and_of_errors(receiver: Receiver) -> None:
    tracer, records = tracer_to(receiver.url), list[AnswerRecord]()
    async with serving(tracer=tracer, on_answer=records.append) as server:
        responses = [await server.post(CHAT, chat_body(), traceparent="00-xyz"), await server.post(CHAT, {"n": 0})]
        server.runner.fail_once("decode")
        responses.append(await server.post(CHAT, chat_body(stream=True)))
        responses.append(await server.client.get("/nowhere"))
    tracer.close()
    spans = receiver.spans()
    assert len({span.trace_id for span in spans}) == 4
    assert all(not span.parent_span_id for span in spans)
    sent = [f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01" for span in spans]
    assert [response.headers["traceresponse"] for response in responses] == sent
    assert [fields_of(record)["trace_id"] for record in records] == [span.trace_id.hex() for span in spans]
    found = [(span.name, span.status.code, values(span).get("error.type")) for span in spans]
    assert found == [
        (f"POST {CHAT}", 0, None),
        (f"POST {CHAT}", 0, "integer_below_min_value"),  # a mistake of the client
        (f"POST {CHAT}", 2, "engine_error"),
        ("GET", 0, "not_found"),
    ]
    assert values(spans[0])["gen_ai.operation.name"] == "chat"


async def test_unsampled_trace_is_not_exported(receiver: Receiver) -> None:
    tracer = tracer_to(receiver.url)
    async with serving(tracer=tracer) as server:
        response = await server.post(CHAT, chat_body(), traceparent=PARENT[:-1] + "0")
    tracer.close()
    assert receiver.spans() == []
    assert response.headers["traceresponse"].startswith(f"00-{TRACE_ID}-")
    assert response.headers["traceresponse"].endswith("-00")


async def test_disabled_sdk_leaves_the_trace_of_the_client(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracer, records = tracer_to(receiver.url), list[AnswerRecord]()
    async with serving(tracer=tracer, on_answer=records.append) as server:
        responses = [await server.post(CHAT, chat_body(), **headers) for headers in ({"traceparent": PARENT}, {})]
    tracer.close()
    assert receiver.spans() == []
    assert [response.status_code for response in responses] == [200, 200]
    assert not any("traceresponse" in response.headers for response in responses)  # there is no span of the server
    assert [fields_of(record).get("trace_id") for record in records] == [TRACE_ID, None]


async def test_failing_collector_does_not_fail_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.1")  # seconds, for all attempts
    closed = Receiver()
    closed.close()
    tracer = tracer_to(closed.url)
    async with serving(tracer=tracer) as server:
        assert (await server.post(CHAT, chat_body())).status_code == 200
    tracer.close()  # gives up


@pytest.mark.parametrize(
    ("sent", "trace_id"),
    [
        ([PARENT], TRACE_ID),
        ([f" {PARENT} "], TRACE_ID),
        ([f"cc-{TRACE_ID}-{SPAN_ID}-01-later"], TRACE_ID),
        ([f"cc-{TRACE_ID}-{SPAN_ID}-01"], TRACE_ID),
        ([], None),
        ([""], None),
        ([PARENT, PARENT], None),
        ([f"{PARENT}-later"], None),
        ([f"cc{PARENT[2:]}later"], None),
        ([f"ff{PARENT[2:]}"], None),
        ([PARENT.upper()], None),
        ([PARENT.replace(TRACE_ID, "0" * 32)], None),
        ([PARENT.replace(SPAN_ID, "0" * 16)], None),
        ([PARENT[:-1]], None),
    ],
)
async def test_client_trace_is_logged_without_a_tracer(sent: list[str], trace_id: str | None) -> None:
    records: list[AnswerRecord] = []
    async with serving(on_answer=records.append) as server:
        response = await server.client.get("/v1/models", headers=[("traceparent", value) for value in sent])
    assert fields_of(records[0]).get("trace_id") == trace_id
    assert "traceresponse" not in response.headers  # there is no span


def test_missing_packages_are_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"--otlp-traces-endpoint: .*'logprobd\[otel\]'"):
        open_tracer(ServeConfig(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces"))


def test_endpoint_must_be_a_url() -> None:
    with pytest.raises(StartupError, match="--otlp-traces-endpoint: 'localhost:4317' does not start"):
        open_tracer(ServeConfig(otlp_traces_endpoint="localhost:4317"))
    assert open_tracer(ServeConfig()) is None
