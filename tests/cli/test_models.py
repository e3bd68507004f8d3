"""`logprobd models`: which models it finds, and what it reports about them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from model.weights import source
from serve.cli.models import find_models, main, parse_args
from tests.support.hub_server import COMMIT, Hub, hub_and_cache
from tests.support.tiny_checkpoints import TinyModel


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache; no default model."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(source, "installed_default_model", lambda: None)
    return folder


def listed(capsys: pytest.CaptureFixture[str], *folders: Path) -> list[dict[str, Any]]:
    """The models after the default one, which is not downloaded."""
    capsys.readouterr()
    assert main(parse_args([*map(str, folders), "--json"])) == 0
    models: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    default = models.pop(0)
    assert (default["model"], default["path"]) == ("(default)", None)
    assert default["problem"].startswith("not downloaded yet")
    return models


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    TinyModel().write_hf(folder)
    return folder


def test_models_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_model(tmp_path / "all/good")
    unknown, pickled = write_model(tmp_path / "all/unknown"), write_model(tmp_path / "all/pickled")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["Mamba9"]}))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    incomplete = write_model(tmp_path / "all/truncated")
    weights = incomplete / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "all/broken.gguf").write_bytes(b"no GGUF")
    models = {Path(model["path"]).name: model for model in listed(capsys, tmp_path / "all")}
    assert models.keys() == {"good", "unknown", "pickled", "truncated", "broken.gguf"}
    assert models["good"]["problem"] is None
    assert models["good"]["model"] == str(good)
    assert models["good"]["family"] == "llama"
    assert (models["good"]["format"], models["good"]["dtype"]) == ("safetensors", "F32")
    assert [models[name]["format"] for name in ("pickled", "broken.gguf")] == ["pickle", "GGUF"]
    assert models["good"]["bytes"] == (good / "model.safetensors").stat().st_size
    assert models["unknown"]["family"] == "Mamba9"
    assert "Mamba9" in models["unknown"]["problem"]
    assert "pickled" in models["pickled"]["problem"]
    assert models["truncated"]["problem"]
    assert models["broken.gguf"]["family"] is None
    assert models["broken.gguf"]["problem"]


def test_models_of_the_hub_cache(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = cache / "models--org--tiny"
    shutil.copytree(write_model(tmp_path / "tiny"), repo / "snapshots/0123")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    (model,) = listed(capsys)
    assert (model["model"], model["problem"]) == ("org/tiny", None)


def test_models_table_shows_why_a_model_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no GGUF")
    assert main(parse_args([str(tmp_path)])) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "GGUF" in output
    assert "(default) - - - not downloaded yet: fetched by" in output
    assert main(parse_args([str(tmp_path / "nowhere")])) == 1


def test_find_models_lists_a_model_in_several_files_once(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"a-0000{part}-of-00002.gguf").touch()
    assert [path.name for path in find_models(tmp_path)] == ["a-00001-of-00002.gguf"]


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with org/tiny: two GGUF models."""
    file = TinyModel().write_gguf(tmp_path / "a.gguf").read_bytes()
    with hub_and_cache(cache, monkeypatch) as hub:
        hub.files["org/tiny"] = {"a-F32.gguf": file, "q/b-F16.gguf": b"no GGUF"}
        yield hub


def command(line: str) -> int:
    return main(parse_args(line.split()))


def test_models_pull_list_and_rm(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("pull org/tiny:f32") == 0
    assert "org/tiny:f32 llama GGUF F32" in " ".join(capsys.readouterr().out.split())
    assert command("pull org/tiny/q/b-F16.gguf") == 1  # cannot be served
    assert "not a GGUF file" in " ".join(capsys.readouterr().out.split())
    models = listed(capsys)
    assert [(model["model"], model["problem"] is None) for model in models] == [
        ("org/tiny/a-F32.gguf", True),
        ("org/tiny/q/b-F16.gguf", False),
    ]
    assert (models[0]["format"], models[0]["dtype"]) == ("GGUF", "F32")
    assert models[0]["bytes"] == len(hub.files["org/tiny"]["a-F32.gguf"])
    for model in models:  # the names are arguments
        assert source.resolve_model(model["model"], None).path == Path(model["path"])
    assert command("rm org/tiny:F32 --yes") == 0
    assert [model["model"] for model in listed(capsys)] == ["org/tiny/q/b-F16.gguf"]
    assert sum(file.stat().st_size for file in cache.glob("models--org--tiny/blobs/*")) == len(b"no GGUF")
    assert command("rm org/tiny --yes") == 0
    assert listed(capsys) == []
    assert not (cache / "models--org--tiny").exists()


def test_command_in_a_process_uses_hf_endpoint(hub: Hub, tmp_path: Path) -> None:
    variables = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    variables = {name: value for name, value in variables.items() if name not in ("HF_HUB_CACHE", "HF_HUB_OFFLINE")}
    line = [sys.executable, "-m", "serve", "models", "pull", "org/tiny:F32"]
    run = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "home/hub/models--org--tiny").glob("snapshots/*/a-F32.gguf"))


def test_models_of_a_download_that_is_not_complete(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.cuts["a-F32.gguf"] = [100, 0, 0, 0, 0, 0]
    assert command("pull org/tiny:F32") == 1
    assert "run the command again to continue" in capsys.readouterr().err
    (model,) = listed(capsys)
    assert (model["model"], model["bytes"]) == ("org/tiny", 100)
    assert "`logprobd models pull` continues" in model["problem"]
    assert command("rm org/tiny --yes") == 0
    assert listed(capsys) == []
    assert not (cache / "models--org--tiny").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pull org/tiny", "contains 2 GGUF models"),
        ("pull org/other", "not a public model"),
        ("rm org/other --yes", "org/other: not in the hub cache"),
        ("rm org/tiny:F16 --yes", "not in the hub cache: org/tiny contains no .gguf file whose name contains F16"),
        ("rm {folder} --yes", "only downloads in the hub cache are deleted"),
        ("rm org/tiny", "MB in {folder}/hub/models--org--tiny? Confirm with --yes"),
    ],
)
def test_models_refuses(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert command("pull org/tiny:F32") == 0
    assert command(line.format(folder=tmp_path)) == 1
    assert message.format(folder=tmp_path) in capsys.readouterr().err
    assert hub.files["org/tiny"].keys() - {path for path, _ in hub.downloads()} == {"q/b-F16.gguf"}
    assert len(listed(capsys)) == 1


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 1), ("n", 1)])
def test_models_rm_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    assert command("pull org/tiny:F32") == 0
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert command("rm org/tiny") == code
    assert len(listed(capsys)) == code


@pytest.mark.usefixtures("hub")
def test_models_rm_of_a_file_deletes_it_in_all_revisions(cache: Path) -> None:
    assert command("pull org/tiny:F32") == 0
    snapshots = cache / "models--org--tiny/snapshots"
    shutil.copytree(snapshots / COMMIT, snapshots / "old", symlinks=True)
    assert command("rm org/tiny:F32 --yes") == 0
    assert not [*cache.glob("models--org--tiny/blobs/*"), *snapshots.glob("*/*")]


def test_models_help_names_pull_and_rm(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--help", "pull --help", "rm --help"):
        with pytest.raises(SystemExit):
            command(line)
    output = capsys.readouterr().out
    assert "logprobd models pull MODEL" in output
    assert "org/name:Q4_K_M" in output
    with pytest.raises(SystemExit):
        command("pull")
    assert "required: MODEL" in capsys.readouterr().err
