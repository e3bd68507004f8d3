"""/metrics: counters of the engine and of HTTP, under our names and vLLM's."""

import asyncio
import math
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.engine.core import EngineCore
from serve.engine.request import Request, SamplingParams
from serve.engine.request_state import RequestState
from tests.support.fake_runner import MAX_MODEL_LEN, FakeRunner
from tests.support.grammars import FakeGrammar, sequence
from tests.support.http_client import MODEL, Gate, Server, completion_body, serving

LABELS = f'engine="0",model_name="{MODEL}"'


async def scraped(server: Server) -> dict[str, float]:
    """Samples by name and labels, without buckets."""
    response = await server.client.get("/metrics")
    assert (response.status_code, response.headers["content-type"]) == (200, CONTENT_TYPE)
    lines = [line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def value_of(samples: dict[str, float], name: str, more: str = "", prefix: str = "logprobd:") -> float:
    """The value of an engine's sample; `more` are additional labels."""
    labels = {*LABELS.split(","), *filter(None, [more])}
    values = [
        value
        for key, value in samples.items()
        if key.partition("{")[0] == prefix + name and set(key.partition("{")[2].rstrip("}").split(",")) == labels
    ]
    assert len(values) == 1, (name, [key for key in samples if name in key])
    return values[0]


@pytest.mark.parametrize("vllm_names", [False, True])
async def test_metrics_of_finished_requests(vllm_names: bool) -> None:
    async with serving(vllm_names=vllm_names) as server:
        prompt = "x" * 130
        await server.complete(prompt=prompt, prompt_logprobs=0, max_tokens=3)
        await server.complete(prompt=prompt, n=2)
        await server.complete(prompt=prompt, max_tokens=0, prompt_logprobs=1)
        samples = await scraped(server)
        for prefix in ("logprobd:", "vllm:") if vllm_names else ("logprobd:",):
            counts = {
                "prompt_tokens_total": 4 * 130,
                "generation_tokens_total": 3 + 2 * 6,
                "prompt_logprobs_tokens_total": 2 * 129,
                "prefix_cache_queries_total": 4 * 130,
                "prefix_cache_hits_total": 3 * 128,
                "num_preemptions_total": 0,
                "time_to_first_token_seconds_count": 3,
                "inter_token_latency_seconds_count": 2 + 2 * 5,
                "e2e_request_latency_seconds_count": 4,
                "request_queue_time_seconds_count": 4,
                "request_prompt_tokens_sum": 4 * 130,
                "request_generation_tokens_sum": 15,
                "request_params_n_sum": 4,
                "request_max_num_generation_tokens_count": 3,
                "request_max_num_generation_tokens_sum": 3 + 6,
                "request_params_max_tokens_count": 4,
                "num_requests_running": 0,
                "num_requests_waiting": 0,
                "kv_cache_usage_perc": 0,
            }
            assert {name: value_of(samples, name, prefix=prefix) for name in counts} == counts
            assert value_of(samples, "request_success_total", 'finished_reason="length"', prefix) == 2
            assert value_of(samples, "request_success_total", 'finished_reason="stop"', prefix) == 2
            assert value_of(samples, "cache_config_info", 'block_size="64"', prefix) == 1
            assert value_of(samples, "iteration_tokens_total_sum", prefix=prefix) > 130
        if vllm_names:
            more = {
                ("prompt_tokens_by_source_total", 'source="local_compute"'): 4 * 130 - 3 * 128,
                ("prompt_tokens_by_source_total", 'source="local_cache_hit"'): 3 * 128,
                ("prompt_tokens_cached_total", ""): 3 * 128,
                ("prompt_tokens_cached_by_source_total", 'source="device"'): 3 * 128,
                ("request_num_preemptions_count", ""): 4,
                ("request_num_preemptions_sum", ""): 0,
                ("request_prefill_kv_computed_tokens_sum", ""): 4 * 130 - 3 * 128,
                ("request_time_per_output_token_seconds_count", ""): 3,
                ("engine_sleep_state", 'sleep_state="awake"'): 1,
                ("num_requests_waiting_by_reason", 'reason="capacity"'): 0,
            }
            assert {key: value_of(samples, *key, prefix="vllm:") for key in more} == more
        assert any(name.startswith("vllm:") for name in samples) == vllm_names
        assert any(name.startswith("process_") for name in samples)


@pytest.mark.parametrize("stream", [False, True])
async def test_metrics_stop_string_counts_as_success(stream: bool) -> None:
    async with serving() as server:
        gate = Gate("decode", after=6)  # the engine, which does not see the text, would continue
        server.runner.before_call = gate
        body = completion_body(stop="l", ignore_eos=True, max_tokens=50, stream=stream)
        await server.post("/v1/completions", body)
        gate.open()
        await server.assert_idle()
        samples = await scraped(server)
        assert value_of(samples, "request_success_total", 'finished_reason="stop"') == 1
        assert value_of(samples, "request_success_total", 'finished_reason="abort"') == 0
        assert value_of(samples, "e2e_request_latency_seconds_count") == 1
        assert value_of(samples, "request_max_num_generation_tokens_sum") == 3


async def test_metrics_preemptions() -> None:
    async with serving(pages=5, vllm_names=True) as server:
        gate = server.runner.before_call = Gate("decode")
        body = {"prompt": "x" * 100, "n": 2, "ignore_eos": True, "max_tokens": 90}  # needs 5 pages, of 4
        task = asyncio.create_task(server.complete(**body))
        await gate.reached()
        while server.engine.num_requests < 2:  # both choices run together, however slow this process is
            await asyncio.sleep(0)
        gate.open()
        assert (await task)["usage"]["completion_tokens"] == 180
        samples = await scraped(server)
        preemptions = value_of(samples, "num_preemptions_total")
        assert preemptions >= 1
        assert value_of(samples, "request_num_preemptions_sum", prefix="vllm:") == preemptions
        assert value_of(samples, "prompt_tokens_total") == 2 * 100


def test_metrics_of_grammars() -> None:
    metrics = Metrics("m", max_model_len=100, vllm_names=False)
    params = SamplingParams(8, temperature=0.0, grammar=sequence(7, 8, then=(30, 31)))
    failing = SamplingParams(8, grammar=FakeGrammar(lambda _: (), error=lambda _: "it is wrong"))
    core = EngineCore(FakeRunner(), max_model_len=100, max_num_batched_tokens=68, observer=metrics)
    core.add(RequestState(Request("a", [1, 2, 3], params)))
    core.add(RequestState(Request("b", [1, 2, 3], failing)))
    while core.scheduler.num_requests:
        core.step()
    text = metrics.text().decode()
    assert re.findall(r"^logprobd:(generation_tokens|forced_tokens|grammar_errors)_total\{.*\} (.*)$", text, re.M) == [
        ("generation_tokens", "8.0"),
        ("forced_tokens", "2.0"),
        ("grammar_errors", "1.0"),
    ]


async def test_metrics_gauges() -> None:
    async with serving(max_waiting=5, vllm_names=True) as server:
        gate = Gate("decode")
        server.runner.before_call = gate
        tasks = [asyncio.create_task(server.complete(prompt="abc", n=5))]
        await gate.reached()
        refused = await server.post("/v1/completions", completion_body())
        assert refused.status_code == 429
        samples = await scraped(server)
        assert value_of(samples, "num_requests_running") + value_of(samples, "num_requests_waiting") <= 5
        assert value_of(samples, "num_requests_running") >= 1
        assert value_of(samples, "kv_cache_usage_perc") > 0
        rejected = f'admission_rejections_total{{model_name="{MODEL}",reason="max_num_queued_reqs"}}'
        assert samples[f"logprobd:{rejected}"] == 1
        assert samples[f"vllm:{rejected}"] == 1
        waiting = value_of(samples, "num_requests_waiting", prefix="vllm:")
        assert value_of(samples, "num_requests_waiting_by_reason", 'reason="capacity"', "vllm:") == waiting
        gate.open()
        await asyncio.gather(*tasks)


async def test_metrics_http_by_route_and_status() -> None:
    async with serving() as server:
        await server.complete()
        await server.complete_stream()
        await server.post("/v1/completions", completion_body(n=0))
        for path in ("/nowhere/1", "/nowhere/2", f"/v1/models/{MODEL}"):
            await server.client.get(path)
        samples = await scraped(server)
        for handler, method, status, count in (
            ("/v1/completions", "POST", 200, 2),
            ("/v1/completions", "POST", 400, 1),
            ("none", "GET", 404, 2),
            ("/v1/models/{id:path}", "GET", 200, 1),
        ):
            assert samples[f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}}'] == count
        assert samples['http_request_duration_seconds_count{handler="/v1/completions",method="POST"}'] == 3
        assert not re.search("nowhere", " ".join(samples))


async def test_metrics_token_buckets_end_at_max_model_len() -> None:
    async with serving() as server:
        text = (await server.client.get("/metrics")).text
        bounds = re.findall(r'logprobd:request_prompt_tokens_bucket\{.*le="([0-9.]+)"', text)
        assert [float(bound) for bound in bounds] == [1, 2, 5, 10, 20, 50, 100, 200, 500]
        assert MAX_MODEL_LEN == 512


# vLLM 0.33 without options: names, types, labels besides model_name and engine, and buckets.
VLLM = {
    "counter": """admission_rejections+reason-engine external_prefix_cache_hits external_prefix_cache_queries
        generation_tokens mm_cache_hits mm_cache_queries num_preemptions prefix_cache_hits prefix_cache_queries
        prompt_tokens prompt_tokens_by_source+source prompt_tokens_cached prompt_tokens_cached_by_source+source
        request_success+finished_reason""",
    "gauge": """cache_config_info+block_size engine_sleep_state+sleep_state kv_cache_usage_perc num_requests_running
        num_requests_waiting num_requests_waiting_by_reason+reason""",
    "histogram": """e2e_request_latency_seconds inter_token_latency_seconds iteration_tokens_total
        request_decode_time_seconds request_generation_tokens request_inference_time_seconds
        request_max_num_generation_tokens request_num_preemptions request_params_max_tokens request_params_n
        request_prefill_kv_computed_tokens request_prefill_time_seconds request_prompt_tokens
        request_queue_time_seconds request_time_per_output_token_seconds time_to_first_token_seconds""",
}
OWN = {
    "counter": {
        "prompt_logprobs_tokens",
        "engine_failures+kind",
        "request_errors+code",
        "forced_tokens",
        "grammar_errors",
    }
}
LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
VLLM_BUCKETS = {
    "e2e_request_latency_seconds": LATENCY,
    "request_queue_time_seconds": LATENCY,
    "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
    "request_inference_time_seconds": LATENCY,
    "time_to_first_token_seconds": "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 "
    "640 2560",
    "inter_token_latency_seconds": "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80",
    "iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
    "request_params_n": "1 2 5 10 20",
    "request_num_preemptions": "1 2 3 4 5 10 20",
    "request_prefill_kv_computed_tokens": "1 2 5 10 20 50 100 200 500",
}


async def test_vllm_names_types_labels_and_buckets() -> None:
    async with serving(vllm_names=True) as server:
        await server.complete()
        refused = await server.post("/v1/completions", completion_body(n=0))
        assert refused.status_code == 400
        text = (await server.client.get("/metrics")).text
    families = [family for family in text_string_to_metric_families(text) if family.name.startswith("vllm:")]
    found: dict[str, set[str]] = {"counter": set(), "gauge": set(), "histogram": set()}
    for family in families:
        if family.name.endswith("_created"):
            continue
        labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        more = [f"+{name}" for name in labels - {"model_name", "engine"}] + (["-engine"] * ("engine" not in labels))
        found[family.type].add(family.name.removeprefix("vllm:") + "".join(more))
    assert {kind: names - OWN.get(kind, set()) for kind, names in found.items()} == {
        kind: set(names.split()) for kind, names in VLLM.items()
    }
    bounds = {
        name: [
            float(sample.labels["le"])
            for family in families
            for sample in family.samples
            if sample.name == f"vllm:{name}_bucket"
        ]
        for name in VLLM_BUCKETS
    }
    assert bounds == {name: [*map(float, text.split()), math.inf] for name, text in VLLM_BUCKETS.items()}
