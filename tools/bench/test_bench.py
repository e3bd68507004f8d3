"""The bench with a fake server, its bandwidth limit, and host times."""

import json
import math
from pathlib import Path

import httpx2
import pytest

from model.kernels.dispatch import load_kernels
from serve.config.engine_config import EngineConfig
from tests.support.tiny_checkpoints import TinyModel
from tools.bench.__main__ import measure, product_line, show
from tools.bench.bandwidth import decode_bytes, is_here
from tools.bench.host import host_ms_of_decisions, host_ms_per_step
from tools.bench.load import FailedError, Figures
from tools.bench.packed import distinct_tokens
from tools.bench.products import Product, measured_products


def peer(request: httpx2.Request) -> httpx2.Response:
    """A server that streams and completes, but does not support prompt_logprobs."""
    if request.url.path == "/v1/models":
        return httpx2.Response(200, json={"data": [{"id": "m", "max_model_len": 1000}]})
    if request.url.path != "/v1/completions":
        return httpx2.Response(404, json={})
    body = json.loads(request.content)
    prompt = body["prompt"]
    if "prompt_logprobs" in body or isinstance(prompt, str):
        return httpx2.Response(400, json={"error": "neither prompt_logprobs nor texts"})
    assert isinstance(prompt[0], list) or len(prompt) + body["max_tokens"] <= 1000
    if not body.get("stream"):
        return httpx2.Response(200, json={"choices": []})
    events = ['data: {"choices": [{"text": "a"}]}'] * body["max_tokens"] + ["data: [DONE]"]
    return httpx2.Response(200, text="\n\n".join(events))


async def test_measure_reports_refused_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing listens at this address; one scenario opens its own connection.
    async with httpx2.AsyncClient(base_url="http://127.0.0.1:1", transport=httpx2.MockTransport(peer)) as client:
        rows = {name: figures async for name, figures in measure(client, 200, lambda: 1e10)}
    refused = [name for name, figures in rows.items() if figures.note.startswith("refused: ")]
    assert refused == [
        "prefill of 512, prompt_logprobs=5",
        "score 900, uncached",
        "score 900, 800 cached, not scored",
        "score 900, 800 scored before",
        "15 streams next to an unread one",
        "100 decisions on 600 tokens",
    ]
    pauses = rows.pop("1 stream next to bodies of 1 MB and of 1.5 million keys")
    assert pauses.note.startswith("longest gap ")
    assert all((figures.tokens_per_second is None) == (name in refused) for name, figures in rows.items())
    assert "1 stream next to a prompt of 999" in rows  # limited by max_model_len
    show(rows, None)
    table = capsys.readouterr().out
    assert all(name in table for name in rows)
    assert "%" not in table


def test_share_is_of_the_bandwidth_limit(capsys: pytest.CaptureFixture[str]) -> None:
    step = Figures(itl_ms=50.0, bandwidth=20e9)  # 800 MB take 40 ms
    assert step.share(800e6) == pytest.approx(0.8)
    assert Figures(itl_ms=50.0).share(800e6) is None
    show({"1 stream": step}, 800e6)
    assert "80%" in capsys.readouterr().out


def test_decode_bytes_of_the_default_model() -> None:
    elements = decode_bytes(EngineConfig(dtype="float32", quantization="none")) / 4
    assert 134e6 < elements < 135e6
    # Norms stay float32.
    assert decode_bytes(EngineConfig(dtype="bfloat16", quantization="none")) / elements == pytest.approx(2, rel=1e-3)
    assert decode_bytes(EngineConfig(quantization="int8")) / elements == pytest.approx(34 / 32, rel=1e-3)
    assert decode_bytes(EngineConfig()) / elements == pytest.approx(0.718, rel=1e-2)  # Q4_1, its embedding Q8_0


def test_decode_bytes_leave_out_an_untied_embedding(tmp_path: Path) -> None:
    tied, untied = (
        decode_bytes(EngineConfig(model=str(TinyModel(tied=tied).write_gguf(tmp_path / f"{tied}.gguf", "Q8_0"))))
        for tied in (True, False)
    )
    assert tied == untied > 0


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost", True),
        ("http://127.0.0.1.example.org", False),
        ("http://gpu:8000", False),
    ],
)
def test_is_here_of_a_url(url: str, here: bool) -> None:
    assert is_here(url) is here


async def test_measure_stops_at_a_failing_server() -> None:
    def failing(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(500) if request.method == "POST" else peer(request)

    async with httpx2.AsyncClient(base_url="http://peer", transport=httpx2.MockTransport(failing)) as client:
        with pytest.raises(FailedError, match="500"):
            await anext(measure(client, 200, lambda: 1e10))


def test_host_ms_per_step_without_a_device() -> None:
    assert host_ms_per_step(rows=2, vocab_size=100, max_logprobs=5, requested_ids=3) > 0


def test_distinct_tokens_are_counted_once() -> None:
    assert distinct_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3], [6]]) == 3 + 2 + 1


def test_host_ms_of_decisions_without_a_device() -> None:
    first, further = host_ms_of_decisions(questions=3, rows=2)
    assert first > 0
    assert math.isfinite(further)


def test_products_are_a_share_of_the_multiply_add_peak() -> None:
    line = product_line(Product("Q4_1", (3072, 576), 150e9, 200e9))
    assert line == (
        "product of 512 rows with Q4_1 [3072 x 576]: 150 GFLOP/s, "
        "75% of 200 GFLOP/s of float32 multiply-adds in registers"
    )


@pytest.mark.skipif(load_kernels().cpu is None, reason="no kernels here")
def test_products_are_of_the_largest_matrix_of_a_layer_in_each_format(tmp_path: Path) -> None:
    path = TinyModel(width=8).write_gguf(tmp_path / "a.gguf", "Q4_K", kinds={"v_proj": "Q6_K", "down_proj": "MXFP4"})
    products = measured_products(EngineConfig(model=str(path)))
    shapes = {product.format: product.shape for product in products}
    assert shapes == {"Q4_K": (1536, 512), "Q6_K": (1024, 512), "MXFP4": (512, 768)}
    assert all(product.rate > 0 and product.peak > 0 for product in products)
    [rounded] = measured_products(EngineConfig(model=str(path), quantization="none", dtype="bfloat16"))
    assert rounded.format == "BF16"


def test_products_are_left_out_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert measured_products(EngineConfig()) == []
