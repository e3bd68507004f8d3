"""--root-path: the same answers with and without the prefix, which a proxy may strip or not."""

from collections.abc import Iterator

import httpx2
import pytest

from serve.api.middleware import AnswerRecord
from serve.config.flags import parse_args
from tests.support.http_client import MODEL, chunks_of, completion_body
from tests.support.listening import listening


@pytest.fixture(scope="module", params=["/llm", "/llm/"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with listening(root_path=request.param, api_key=("sk-1",)) as (url, _):
        yield url


@pytest.mark.parametrize("prefix", ["", "/llm", "/llm/", "//llm"])
def test_prefix_may_be_stripped_or_not(url: str, prefix: str) -> None:
    base, headers = url + prefix, {"Authorization": "Bearer sk-1"}
    for path in ("/", "/health", "/web/main.js"):  # need no key
        assert httpx2.get(base + path).status_code == 200
    for path in ("/docs", "/openapi.json", "/metrics", "/load", f"/v1/models/{MODEL}"):
        assert httpx2.get(base + path).status_code == 401
        assert httpx2.get(base + path, headers=headers).status_code == 200
    stream = httpx2.post(f"{base}/v1/completions", json=completion_body(stream=True), headers=headers)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks_of(stream)) == "Hello"
    metrics = httpx2.get(f"{base}/metrics", headers=headers).text
    assert 'handler="/v1/completions",method="POST",status="200"' in metrics
    assert "llm" not in metrics.replace("vllm", "")
    for path in ("/llmx/health", "/nowhere"):
        assert httpx2.get(base + path, headers=headers).status_code == 404


def test_key_is_checked_for_the_path_that_is_served() -> None:
    with listening(root_path="/metrics", api_key=("sk-1",)) as (url, _):
        for count in range(1, 4):
            assert httpx2.get(url + "/metrics" * count).status_code in (307, 401)


def test_prefix_alone_redirects_to_the_page(url: str) -> None:
    response = httpx2.get(f"{url}/llm?x=1")
    assert (response.status_code, response.headers["location"]) == (307, "/llm/")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_prefix_equal_to_that_of_the_api(prefix: str) -> None:
    with listening(root_path="/v1") as (url, _):
        assert httpx2.get(f"{url}{prefix}/v1/models").json()["data"][0]["id"] == MODEL


@pytest.mark.parametrize("root", ["/llm", "/v1", ""])
def test_log_has_the_prefix_once(root: str) -> None:
    records: list[AnswerRecord] = []
    with listening(root_path=root, on_answer=records.append) as (url, _):
        for path in ("/v1/models", "/llm/v1/models", "//llm/v1/models", "/llm", "/llmx"):
            httpx2.get(url + path)
    logged = {
        "/llm": ["/llm/v1/models", "/llm/v1/models", "//llm/v1/models", "/llm", "/llm/llmx"],
        "/v1": ["/v1/models", "/v1/llm/v1/models", "/v1//llm/v1/models", "/v1/llm", "/v1/llmx"],
        "": ["/v1/models", "/llm/v1/models", "//llm/v1/models", "/llm", "/llmx"],
    }
    assert [record.path for record in records] == logged[root]


@pytest.mark.parametrize(("flag", "path"), [("llm", "/llm"), ("/a/b/", "/a/b"), ("/", ""), ("", "")])
def test_flag_is_normalized(flag: str, path: str) -> None:
    assert parse_args(["--root-path", flag]).root_path == path


@pytest.mark.parametrize("flag", ["/a b", "/ä", "https://host/llm", "/llm?x"])
def test_flag_is_a_path(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--root-path", flag])
    assert "argument --root-path" in capsys.readouterr().err
