"""`--tensor-parallel-size` on real servers: two devices answer like one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.test_bad_models import directory
from tests.support.server_process import ROOT, ServerProcess

pytestmark = pytest.mark.slow

BODY = {"prompt": [5, 17, 40, 3, 8, 9, 44], "max_tokens": 8, "temperature": 0, "logprobs": 3, "prompt_logprobs": 3}
FLAGS = ("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def servers(model: Path, compilation_cache: Path) -> Iterator[dict[int, ServerProcess]]:
    """The same model on one CPU device and on two."""
    cache = ("--compilation-cache-dir", str(compilation_cache))
    two = {"JAX_NUM_CPU_DEVICES": "2"}
    started = {
        1: ServerProcess(str(model), *FLAGS, *cache),
        2: ServerProcess(str(model), *FLAGS, *cache, "--tensor-parallel-size", "2", environ=two),
    }
    yield started
    assert [server.terminate() for server in started.values()] == [0, 0]


def ask(server: ServerProcess, body: dict[str, Any]) -> dict[str, Any]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        response = client.post("/v1/completions", json={**body, "model": "tiny"} if "model" in body else body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def numbers(prompt: list[dict[str, dict[str, Any]] | None]) -> list[dict[str, tuple[int, float]]]:
    return [{key: (entry["rank"], entry["logprob"]) for key, entry in each.items()} for each in prompt if each]


def test_two_devices_equal_one(servers: dict[int, ServerProcess]) -> None:
    one, two = (ask(server, BODY)["choices"][0] for server in servers.values())
    assert two["text"] == one["text"]
    assert two["logprobs"]["tokens"] == one["logprobs"]["tokens"]
    assert two["logprobs"]["token_logprobs"] == pytest.approx(one["logprobs"]["token_logprobs"], abs=1e-5)
    for ours, theirs in zip(numbers(two["prompt_logprobs"]), numbers(one["prompt_logprobs"]), strict=True):
        assert {key: rank for key, (rank, _) in ours.items()} == {key: rank for key, (rank, _) in theirs.items()}
        for key, (_, logprob) in ours.items():
            assert logprob == pytest.approx(theirs[key][1], abs=1e-5)


def test_two_devices_generated_logprobs_equal_scored(servers: dict[int, ServerProcess]) -> None:
    body = {**BODY, "return_token_ids": True}
    answer = ask(servers[2], body)["choices"][0]
    ids = answer["token_ids"]
    again = ask(servers[2], {**body, "prompt": BODY["prompt"] + ids, "max_tokens": 1})["choices"][0]
    scored = again["prompt_logprobs"][-len(ids) :]
    assert [entry[str(token)]["logprob"] for token, entry in zip(ids, scored, strict=True)] == answer["logprobs"][
        "token_logprobs"
    ]


def test_startup_reports_the_number_of_devices(servers: dict[int, ServerProcess]) -> None:
    assert any("sharded across 2 devices" in line for line in servers[2].log)
    assert not any("sharded across" in line for line in servers[1].log)
    assert len({ask(server, BODY)["system_fingerprint"] for server in servers.values()}) == 2


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        (
            ("--tensor-parallel-size", "3"),
            {},
            "--tensor-parallel-size 3: there are 1 cpu devices; set JAX_NUM_CPU_DEVICES=3",
        ),
        ((), {"JAX_PLATFORMS": "rocm"}, "JAX finds no device of JAX_PLATFORMS=rocm"),
    ],
)
def test_missing_devices_are_one_error_line(
    model: Path, tmp_path: Path, flags: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    command = [sys.executable, "-m", "serve", str(model), "--port", "0", "--compilation-cache-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"error: {said}" in done.stderr
    assert "Traceback" not in done.stderr
