"""Two replicas of the default model on a real Ray of this machine, through the same API."""

import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.support.ray_process import RayProcess
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="Ray is not installed: `make ray` does it")

_DEADLINE = 60  # seconds; only reached if something hangs
_MAX_UNSENT = 2_500_000  # bytes, about two answers to _REPEATED
_REPEATED: dict[str, Any] = {"prompt": "word " * 400, "max_tokens": 1, "n": 14, "prompt_logprobs": 20, "temperature": 0}
_STORY = "Once upon a time"
_LONG = {"prompt": _STORY, "max_tokens": 450, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def flags(compilation_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    sizes = ("--max-num-seqs", "2", "--max-model-len", "512", "--max-num-batched-tokens", "18")
    limits = ("--max-unsent-bytes", str(_MAX_UNSENT))
    store = ("--response-store", str(tmp_path_factory.mktemp("responses") / "store.db"))
    return ("--dtype", "float32", *sizes, *limits, *store, "--compilation-cache-dir", str(compilation_cache))


@pytest.fixture(scope="module")
def server(flags: tuple[str, ...]) -> Iterator[ServerProcess]:
    """A single server with the replicas' flags."""
    process = ServerProcess(*flags)
    yield process
    assert process.terminate() == 0


@pytest.fixture(scope="module")
def replicas(flags: tuple[str, ...], server: ServerProcess) -> Iterator[RayProcess]:
    """The replicas; they read the programs that the single server has compiled."""
    assert server.process.poll() is None
    process = RayProcess("--num-replicas", "2", "--num-cpus-per-replica", "0.5", *flags)
    yield process
    if process.process.poll() is None:
        assert process.terminate() == 0


def post(server: ServerProcess, body: dict[str, Any], **headers: str) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=_DEADLINE)


def numbers(server: RayProcess, name: str, **labels: str) -> dict[str, float]:
    """The samples of one name in /metrics, by replica, summed over all other labels; empty without replicas."""
    answer = httpx2.get(f"{server.url}/metrics", timeout=_DEADLINE)
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text if answer.status_code == 200 else ""):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                replica = sample.labels["replica"]
                found[replica] = found.get(replica, 0) + sample.value
    return found


def until(condition: Callable[[], bool]) -> None:
    """Poll over HTTP until the condition holds."""
    end = time.monotonic() + _DEADLINE
    while not condition():
        assert time.monotonic() < end


def idle(server: RayProcess) -> bool:
    return not any(numbers(server, "logprobd:num_requests_running").values())


def test_ray_listens_on_the_host_only(replicas: RayProcess) -> None:
    addresses = replicas.listening()
    assert len(addresses) >= 2  # IPv4, and IPv4 mapped to IPv6
    assert all(address.endswith("0100007F") for address in addresses)  # 127.0.0.1


def test_every_replica_equals_a_single_server(replicas: RayProcess, server: ServerProcess) -> None:
    body = {
        "prompt": "The capital of France is",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 3,
        "prompt_logprobs": 3,
    }
    alone = post(server, body).json()["choices"]
    before = numbers(replicas, "logprobd:prompt_tokens_total")
    for _ in range(2):  # the replicas alternate
        assert post(replicas, body).json()["choices"] == alone
    after = numbers(replicas, "logprobd:prompt_tokens_total")
    assert len(before) == 2
    assert {replica: after[replica] - before[replica] for replica in before} == dict.fromkeys(before, 5)


def test_decisions_equal_those_of_a_single_server(replicas: RayProcess, server: ServerProcess) -> None:
    """Compressed, and of one state, which one replica has in its cache afterwards."""
    question = {"type": "predicate", "name": "q", "instructions": "Is it about money?"}
    body = {"input": "I was charged twice. " * 40, "questions": [question, question | {"name": "r"}]}

    def decide(served: ServerProcess) -> Any:
        content, headers = gzip.compress(json.dumps(body).encode()), {"Content-Type": "application/json"}
        headers["Content-Encoding"] = "gzip"
        answer = httpx2.post(f"{served.url}/v1/decisions", content=content, headers=headers, timeout=_DEADLINE)
        assert answer.status_code == 200, answer.text
        return answer.json()

    alone = [answer["probability"] for answer in decide(server)["answers"]]
    assert [answer["probability"] for answer in decide(replicas)["answers"]] == alone
    again = decide(replicas)
    assert [answer["probability"] for answer in again["answers"]] == alone
    assert min(answer["evidence"]["cached_tokens"] for answer in again["answers"]) >= 192
    odd = httpx2.post(f"{replicas.url}/v1/systemone", json={"state": "a", "questions": {}}, timeout=_DEADLINE)
    assert (odd.status_code, odd.json()["detail"][0]["loc"]) == (422, ["body", "questions"])
    assert odd.headers["x-typesafe-request-id"]


def test_openai_client_streams(replicas: RayProcess) -> None:
    options: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
    }
    with OpenAI(base_url=f"{replicas.url}/v1", api_key="none", max_retries=0) as client:
        completion = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == completion.choices[0].message.content
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert len(entries) > 5
    assert [entry.logprob for entry in entries] == [entry.logprob for entry in completion.choices[0].logprobs.content]


def test_replicas_share_stored_responses(replicas: RayProcess) -> None:
    options: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "max_output_tokens": 12,
        "temperature": 0,
        "store": True,
        "include": ["message.output_text.logprobs"],
    }
    with OpenAI(base_url=f"{replicas.url}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(input="Say hello.", **options)
        for _ in range(2):  # the replicas alternate
            assert client.responses.retrieve(first.id) == first
            follow_up = client.responses.create(input="Again.", previous_response_id=first.id, **options)
            with client.responses.stream(input="Again.", previous_response_id=first.id, **options) as stream:
                *_, last = stream
            assert last.type == "response.incomplete"  # of its maximum length
            assert last.response.output_text == follow_up.output_text
        client.responses.delete(first.id)
        for _ in range(2):
            assert httpx2.get(f"{replicas.url}/v1/responses/{first.id}", timeout=_DEADLINE).status_code == 404


def test_errors_of_messages_have_their_envelope(replicas: RayProcess) -> None:
    """Those of the front and those of a replica."""
    unknown = b'{"messages": [{"role": "user", "content": "Hi"}], "model": "claude"}'
    for content, kind in ((b"{", "invalid_request_error"), (unknown, "not_found_error")):
        headers = {"Content-Type": "application/json"}
        refused = httpx2.post(f"{replicas.url}/v1/messages", content=content, headers=headers, timeout=_DEADLINE)
        assert (refused.json()["type"], refused.json()["error"]["type"]) == ("error", kind)
        assert refused.headers["request-id"] == refused.headers["x-request-id"]


def test_errors_and_request_ids_are_relayed(replicas: RayProcess) -> None:
    refused = post(replicas, {"prompt": "Hi", "max_tokens": -1}, **{"x-request-id": "mine"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"
    assert refused.headers.get_list("x-request-id") == ["mine"]
    assert httpx2.get(f"{replicas.url}/health").status_code == 200
    assert httpx2.get(f"{replicas.url}/nowhere").json()["error"]["type"] == "invalid_request_error"


def test_unfinished_bodies_of_open_paths_and_of_others_block_nothing(replicas: RayProcess) -> None:
    head = "{} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
    address = httpx2.URL(replicas.url)
    with ExitStack() as stack:
        for line in ("POST /health", "OPTIONS /v1/completions", "POST /v1/completions"):
            for _ in range(100):
                client = stack.enter_context(socket.create_connection((address.host, address.port), _DEADLINE))
                client.sendall(head.format(line).encode())
                if line != "POST /v1/completions":
                    assert client.recv(12) == b"HTTP/1.1 405"
        assert post(replicas, {"prompt": "Hi", "max_tokens": 1}).status_code == 200


def test_prompt_is_routed_to_its_cached_prefix(replicas: RayProcess) -> None:
    def cached(prompt: str, **more: str) -> int:
        answer = post(replicas, {"prompt": prompt, "max_tokens": 1} | more).json()
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    texts = [f"{name} went to the market to buy apples and pears. " * 10 for name in ("Anna", "Bertha", "Clara")]
    assert [cached(text) for text in texts] == [0, 0, 0]
    assert all(cached(text + "Then") >= 64 for text in texts * 2)
    # Another salt has its own cache entries.
    assert [cached(texts[0], cache_salt="another") for _ in range(2)] != [0, 0]
    assert cached(texts[0], cache_salt="a third") == 0


def test_disconnect_frees_the_request(replicas: RayProcess) -> None:
    def aborted() -> float:
        return sum(numbers(replicas, "logprobd:request_success_total", finished_reason="abort").values())

    before = aborted()
    with httpx2.stream("POST", f"{replicas.url}/v1/completions", json=_LONG | {"stream": True}) as response:
        next(response.iter_lines())
    until(lambda: aborted() == before + 1)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{replicas.url}/v1/completions", json=_LONG, timeout=1)
    until(lambda: aborted() == before + 2)
    assert idle(replicas)
    assert httpx2.get(f"{replicas.url}/load").json() == {"server_load": 0}


def unread(server: RayProcess, body: dict[str, Any], stack: ExitStack) -> HTTPResponse:
    """The response of a request, of which only the head has been read; closed with `stack`."""
    address = httpx2.URL(server.url)
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(_DEADLINE)
    client.connect((address.host, address.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    response = stack.enter_context(HTTPResponse(client))
    response.begin()
    return response


def test_answers_that_are_not_read_are_limited_per_replica(replicas: RayProcess) -> None:
    def unsent() -> list[float]:
        return list(numbers(replicas, "logprobd:unsent_bytes").values())

    with ExitStack() as stack:
        readers = [unread(replicas, _REPEATED, stack)]
        while (last := unread(replicas, _REPEATED, stack)).status == 200:
            readers.append(last)
            assert len(readers) < 6
        assert (last.status, json.loads(last.read())["error"]["code"]) == (429, "unsent_answers")
        # Others are served, and an answer that is read needs room for no longer than that.
        assert post(replicas, {"prompt": "Hi", "max_tokens": 1}).status_code == 200
        assert max(unsent()) > _MAX_UNSENT / 2
        assert max(unsent()) <= _MAX_UNSENT
        choices = json.loads(readers[0].read())["choices"]
        assert [len(choice["prompt_logprobs"]) for choice in choices] == [401] * 14
    until(lambda: not any(unsent()))  # the others have disconnected
    assert idle(replicas)
    assert post(replicas, _REPEATED).json()["choices"] == choices


def test_killed_replica_fails_only_its_streams(replicas: RayProcess) -> None:
    # Long enough that all four still run when the metrics are read, on any machine.
    body = {"prompt": _STORY, "max_tokens": 120, "ignore_eos": True, "temperature": 0, "logprobs": 1}
    right = post(replicas, body).json()["choices"][0]
    url = f"{replicas.url}/v1/completions"
    killed, _ = replicas.replicas()
    with (
        httpx2.Client(timeout=_DEADLINE) as client,
        ThreadPoolExecutor() as pool,
        client.stream("POST", url, json=body | {"stream": True}) as first,
        client.stream("POST", url, json=body | {"stream": True}) as second,
    ):
        streams = [each.iter_lines() for each in (first, second)]
        first_lines = [next(lines) for lines in streams]
        # One after the other, so that the router counts the third request when it places the fourth.
        responses = []
        for _ in range(2):
            responses.append(pool.submit(post, replicas, body))
            until(lambda: sum(numbers(replicas, "logprobd:num_requests_running").values()) == 2 + len(responses))
        assert list(numbers(replicas, "logprobd:num_requests_running").values()) == [2, 2]
        replicas.kill(killed)
        events = [
            [line.removeprefix("data: ") for line in (line_one, *lines) if line]
            for line_one, lines in zip(first_lines, streams, strict=True)
        ]
        # One of the other two was at work there: it is not sent to the surviving replica.
        lost, answered = sorted((response.result() for response in responses), key=lambda each: -each.status_code)
        assert (lost.status_code, lost.json()["error"]["message"]) == (500, "The replica that answered has died.")
        assert answered.json()["choices"][0] == right
    assert [each[-1] for each in events] == ["[DONE]", "[DONE]"]
    chunks = [[json.loads(event) for event in each[:-1]] for each in events]
    broken, complete = sorted(chunks, key=lambda each: "error" not in each[-1])
    assert broken.pop()["error"] == {
        "message": "The replica that answered has died.",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    for each in (broken, complete):
        text = "".join(chunk["choices"][0]["text"] for chunk in each)
        logprobs = [number for chunk in each for number in chunk["choices"][0]["logprobs"]["token_logprobs"]]
        assert right["text"].startswith(text)
        assert logprobs == right["logprobs"]["token_logprobs"][: len(logprobs)]
    assert len(broken) < len(complete)
    assert complete[-1]["choices"][0]["finish_reason"] == "length"

    until(lambda: len(numbers(replicas, "logprobd:num_requests_running")) == 2)
    assert killed not in replicas.replicas()
    assert post(replicas, body).json()["choices"][0] == right


def test_without_replicas_requests_get_503_until_one_is_ready(replicas: RayProcess) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    for each in replicas.replicas():
        replicas.kill(each)
    end = time.monotonic() + _DEADLINE
    while (answer := post(replicas, body)).status_code != 200:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["type"] == "service_unavailable"
        assert time.monotonic() < end
    assert answer.json()["choices"][0]["text"] == " Paris"


def test_sigterm_drains_and_exits_0(replicas: RayProcess) -> None:
    body = {"prompt": _STORY, "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{replicas.url}/v1/completions", json=body, timeout=_DEADLINE) as response:
        lines = response.iter_lines()
        next(lines)  # the stream has started: stop the server
        replicas.process.terminate()
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2]
    assert replicas.terminate() == 0
