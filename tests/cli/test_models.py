"""`logprobd models`: which models it finds, and what it reports about them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from model.weights import source
from serve.cli.models import find_models, main, parse_args
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
