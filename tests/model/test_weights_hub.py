"""Models of a hub: which files a name selects, and their download."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants

from model.weights import hub as hub_module
from model.weights.checkpoint import ModelLoadError
from model.weights.hub import HubName, parse_name, select_files
from model.weights.source import resolve_model
from tests.support.hub_server import COMMIT, Hub, hub_and_cache
from tests.support.tiny_checkpoints import TinyModel

REPO = "org/name"
GGUF = {
    "README.md": b"text",
    "a-IQ4_XS.gguf": b"1",
    "a-BF16.gguf": b"2",
    "a-F16.gguf": b"3" * 1000,
    "a-Q4_K_M.gguf": b"4" * 300,
    "Q8_0/a-Q8_0-00001-of-00002.gguf": b"5" * 50,
    "Q8_0/a-Q8_0-00002-of-00002.gguf": b"6" * 60,
    "mmproj-a-Q4_K_M.gguf": b"7",
}
PARTS = ["Q8_0/a-Q8_0-00001-of-00002.gguf", "Q8_0/a-Q8_0-00002-of-00002.gguf"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_and_cache(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def error_of(model: str, revision: str | None = None) -> str:
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(model, revision)
    message = str(caught.value)
    assert message.startswith(f"{model}: ")
    assert "\n" not in message
    return message


def fail_downloads(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def http_get(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub_module, "http_get", http_get)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", HubName("org/name")),
        ("org/na.me-1:Q4_K_M", HubName("org/na.me-1", tag="Q4_K_M")),
        ("org/name/dir/a.gguf", HubName("org/name", file="dir/a.gguf")),
        ("org/name:", None),
        ("org/name:a/b", None),
        ("org/name.gguf", None),
        ("org/name/config.json", None),
        ("../name", None),
        ("name", None),
    ],
)
def test_parse_name(name: str, parts: HubName | None) -> None:
    assert parse_name(name) == parts


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (HubName(REPO, tag="q4_k_m"), ["a-Q4_K_M.gguf"]),
        (HubName(REPO, tag="F16"), ["a-F16.gguf"]),  # not BF16
        (HubName(REPO, tag="Q8_0"), PARTS),
        (HubName(REPO, file="a-IQ4_XS.gguf"), ["a-IQ4_XS.gguf"]),
        (HubName(REPO, file=PARTS[1]), PARTS),
    ],
)
def test_select_files_of_a_name(name: HubName, files: list[str]) -> None:
    assert select_files(name, GGUF) == files


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (HubName(REPO, tag="Q9"), [*GGUF], "no .gguf file whose name contains Q9; name one as org/name:TAG or"),
        (HubName(REPO, tag="Q9"), [*GGUF], "a-IQ4_XS.gguf, a-Q4_K_M.gguf"),
        (HubName(REPO, tag="Q4_K"), [*GGUF], "no .gguf file whose name contains Q4_K;"),
        (HubName(REPO, tag="4_XS"), [*GGUF], "no .gguf file whose name contains 4_XS"),
        (HubName(REPO, file="b.gguf"), [*GGUF], "org/name contains no b.gguf;"),
        (HubName(REPO, file="mmproj-a-Q4_K_M.gguf"), [*GGUF], "contains no mmproj-a-Q4_K_M.gguf;"),
        (HubName(REPO), [*GGUF], "contains 5 GGUF models; name one as org/name:TAG or org/name/FILE: Q8_0/a-Q8_0"),
        (HubName(REPO), [*GGUF], f"{PARTS[0]} (2 files), a-BF16.gguf"),
        (
            HubName(REPO, tag="a"),
            [*GGUF],
            "contains 5 GGUF models whose names contain a; name one as org/name:TAG or",
        ),
        (HubName(REPO, tag="Q8_0"), PARTS[1:], "contains 1 of 2 parts"),
        (HubName(REPO), ["config.json", "pytorch_model.bin"], "pickled weights are not supported"),
        (HubName(REPO, tag="Q8_0"), ["config.json", "model.safetensors"], "contains no .gguf files"),
    ],
)
def test_select_files_of_no_or_several_models(name: HubName, files: list[str], message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        select_files(name, files)
    assert message in str(caught.value)


def test_select_files_of_safetensors_that_cannot_run_code() -> None:
    expected = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    refused = ["modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", "tokenizer.pkl", "onnx/config.json", "a.gguf"]
    assert select_files(HubName(REPO), [*expected, *refused]) == expected


def test_resolve_model_downloads_a_gguf_model_once(hub: Hub) -> None:
    hub.files[REPO] = GGUF
    lines: list[str] = []
    for name in ("org/name:q8_0", f"org/name/{PARTS[1]}"):
        resolved = resolve_model(name, None, lines.append)
        assert (resolved.name, resolved.is_gguf) == (name, True)
        assert resolved.path.relative_to(constants.HF_HUB_CACHE).parts[1:3] == ("snapshots", COMMIT)
        assert [(resolved.path.parents[1] / part).read_bytes() for part in PARTS] == [GGUF[part] for part in PARTS]
        assert resolved.path.name == "a-Q8_0-00001-of-00002.gguf"
    assert hub.downloads() == [(part, "") for part in PARTS]
    assert lines == [f"downloading org/name: 2 files, 0.0 MB to {constants.HF_HUB_CACHE}"]


def test_resolve_model_downloads_safetensors(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    TinyModel().write_hf(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.files[REPO] = files | {"pytorch_model.bin": b"x", "modeling.py": b"x", "original/model.safetensors": b"x"}
    path = resolve_model(REPO, None).path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files
    assert resolve_model(REPO, COMMIT).path == path
    assert [name for name, _ in hub.downloads()] == ["model.safetensors"]


def test_resolve_model_checks_config_before_it_downloads_weights(hub: Hub) -> None:
    config = json.dumps({"architectures": ["Mamba9"]}).encode()
    hub.files[REPO] = {"config.json": config, "model.safetensors": b"x"}
    with pytest.raises(ModelLoadError, match="Mamba9"):
        resolve_model(REPO, None)
    assert hub.downloads() == []


def test_resolve_model_resumes_a_broken_download(hub: Hub) -> None:
    hub.files[REPO] = GGUF
    hub.cuts["a-F16.gguf"] = [400]
    assert resolve_model("org/name:F16", None).path.read_bytes() == GGUF["a-F16.gguf"]
    assert hub.downloads() == [("a-F16.gguf", ""), ("a-F16.gguf", "bytes=400-")]


def test_resolve_model_resumes_the_download_of_an_earlier_call(hub: Hub) -> None:
    hub.files[REPO] = GGUF
    hub.cuts["a-F16.gguf"] = [400, 0, 0, 0, 0, 0]  # after which the library gives up
    assert "run the command again to continue" in error_of("org/name:F16")
    assert len(hub.downloads()) == 6
    assert resolve_model("org/name:F16", None).path.read_bytes() == GGUF["a-F16.gguf"]
    assert hub.downloads()[6:] == [("a-F16.gguf", "bytes=400-")]


def test_resolve_model_discards_a_damaged_download(hub: Hub) -> None:
    hub.files[REPO] = GGUF
    hub.cuts["a-F16.gguf"] = [400, 0, 0, 0, 0, 0]
    error_of("org/name:F16")
    [partial] = Path(constants.HF_HUB_CACHE).rglob("*.incomplete")
    partial.write_bytes(b"x" * 400)
    assert "a-F16.gguf is damaged: its SHA-256 differs" in error_of("org/name:F16")
    assert resolve_model("org/name:F16", None).path.read_bytes() == GGUF["a-F16.gguf"]
    assert hub.downloads()[7:] == [("a-F16.gguf", "")]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "access is restricted: accept its terms at {url}/org/name and set HF_TOKEN to a token of that account"),
        ("hf_bad", "the hub rejects the token in HF_TOKEN"),
        ("hf_good", None),
    ],
)
def test_resolve_model_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str | None) -> None:
    hub.files[REPO], hub.gated = GGUF, {REPO}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if message is not None:
        assert message.format(url=hub.url) in error_of("org/name:F16")
        return
    resolve_model("org/name:F16", None)
    sent = {path: headers.get("Authorization") for _, path, headers in hub.requests}
    assert sent[f"/org/name/resolve/{COMMIT}/a-F16.gguf"] == "Bearer hf_good"
    assert sent["/content/org/name/a-F16.gguf"] is None  # another host


def test_resolve_model_gated_without_access(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[REPO], hub.gated, hub.refused = GGUF, {REPO}, {REPO}
    monkeypatch.setenv("HF_TOKEN", hub.token)
    message = error_of("org/name:F16")
    assert message.endswith(f"accept its terms at {hub.url}/org/name with the account of your token")


def test_resolve_model_unknown_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not a public model on the hub; for a private one set HF_TOKEN" in error_of("org/other")
    hub.files[REPO] = GGUF
    assert "revision v9 does not exist on the hub" in error_of(REPO, "v9")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert "nor a private one that your token can read" in error_of("org/other")


@pytest.mark.parametrize("reason", ["offline", "unreachable"])
def test_resolve_model_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    hub.files[REPO] = GGUF
    path = resolve_model("org/name:F16", None).path
    if reason == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    requests = len(hub.requests)
    assert resolve_model("org/name:F16", None).path == path
    assert "incomplete in the local cache, and the hub is unreachable" in error_of("org/name:BF16")
    missing = (
        "HF_HUB_OFFLINE forbids a download" if reason == "offline" else "the hub (http://127.0.0.1:9) is unreachable"
    )
    assert missing in error_of("org/other")
    assert len(hub.requests) == requests


@pytest.mark.usefixtures("hub")
def test_resolve_model_in_a_cache_without_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions of the library leave it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = Path(constants.HF_HUB_CACHE) / "models--org--name"
    folder = repo / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    assert resolve_model("org/name", None).path == folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: httpx2.ReadError("cut off"), "cannot be downloaded: cut off"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
        (lambda: httpx2.ReadTimeout(""), "cannot be downloaded: ReadTimeout"),
    ],
)
def test_resolve_model_download_errors(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception], message: str
) -> None:
    hub.files[REPO] = GGUF
    fail_downloads(monkeypatch, make())
    assert message in error_of("org/name:F16")
