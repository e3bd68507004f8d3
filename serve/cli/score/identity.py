"""Which weights a model has, told without reading all of them."""

import hashlib
from pathlib import Path

from model.weights.source import default_model_path, resolve_model

_SAMPLE = 2**16  # bytes at each end of a file: names and shapes, and some of the values
_KINDS = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")


def model_digest(model: str | None, revision: str | None) -> str:
    """`files_digest` of the model of these flags.

    Raises:
        ModelLoadError: there is no such model.
    """
    return files_digest(default_model_path() if model is None else resolve_model(model, revision).path)


def files_digest(path: Path) -> str:
    """A digest of the names, the sizes and both ends of a file, or of a folder's files; a copy has the same.

    Raises:
        OSError: they cannot be read.
    """
    files = sorted(each for each in path.iterdir() if each.suffix in _KINDS) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(_ends(file))
    return digest.hexdigest()[:16]


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_SAMPLE)
        file.seek(max(len(head), path.stat().st_size - _SAMPLE))
        return head + file.read(_SAMPLE)
