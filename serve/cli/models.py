"""`logprobd models`: list models on this machine, and whether they can be served. Reads headers, but no weights."""

import dataclasses
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from serve.config.options import CommandLine, option, switch

_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")
_EPILOG = """\
Lists the default model and the models in the Hugging Face hub cache and in each FOLDER, subfolders included: folders
with config.json and weights, and .gguf files. MODEL is the argument of `logprobd serve`.

examples:
  logprobd models
  logprobd models ~/models --json
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsConfig:
    folder: tuple[Path, ...] = option("Models", "folder to search", Path, default=(), repeatable=True, metavar="FOLDER")
    json: bool = switch("Models", "print a JSON list")


@dataclass(frozen=True, slots=True)
class LocalModel:
    model: str  # argument of `logprobd serve`
    path: str | None  # None: not downloaded
    family: str | None  # None: unknown
    bytes: int  # of the weights on disk
    dtype: str | None  # in which most weights are stored
    problem: str | None  # why it cannot be served from these files; None: it can


def parse_args(arguments: Sequence[str]) -> ModelsConfig:
    text = "List the models on this machine."
    line = CommandLine(ModelsConfig, prog="logprobd models", description=text, epilog=_EPILOG, positional="folder")
    return line.read(arguments)


def main(config: ModelsConfig) -> int:
    """Print the list and return the exit code: 1 if a folder does not exist."""
    for folder in config.folder:
        if not folder.expanduser().is_dir():
            print(f"error: {folder}: no such folder", file=sys.stderr)
            return 1
    models = [_default_model(), *_cached_models()]
    models += [_inspect(path, str(path)) for folder in config.folder for path in find_models(folder.expanduser())]
    if config.json:
        print(json.dumps([dataclasses.asdict(model) for model in models], indent=2))
    else:
        _print_table(models)
    return 0


def find_models(folder: Path) -> Iterator[Path]:
    """Folders with config.json and weights, and .gguf files (the first part of several), in and below `folder`."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(root)
        if "config.json" in files and any(any(here.glob(pattern)) for pattern in _WEIGHTS):
            yield here
        yield from (here / name for name in sorted(files) if name.endswith(".gguf") and not _LATER_PART.search(name))


def _default_model() -> LocalModel:
    from model.weights.source import installed_default_model

    if path := installed_default_model():
        return _inspect(path, "(default)")
    return LocalModel("(default)", None, None, 0, None, "not downloaded yet: fetched by the first `logprobd serve`")


def _cached_models() -> Iterator[LocalModel]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        for path in find_models(newest.snapshot_path):
            is_whole_repo = path == newest.snapshot_path
            yield _inspect(path, repo.repo_id if is_whole_repo else str(path))


def _inspect(path: Path, name: str) -> LocalModel:
    from model.config import ConfigError
    from model.weights.checkpoint import ModelLoadError
    from model.weights.source import resolve_model
    from model.weights.weight_table import check_headers, open_checkpoint

    family, dtype, problem = _declared_family(path), None, None
    try:
        with closing(open_checkpoint(resolve_model(str(path), None))) as checkpoint:
            family = checkpoint.config.family
            sizes: Counter[str] = Counter()
            for info in checkpoint.names().values():
                sizes[info.stored_as] += info.nbytes
            dtype = sizes.most_common(1)[0][0] if sizes else None
            check_headers(checkpoint)
    except (ConfigError, ModelLoadError) as error:
        problem = str(error)
    return LocalModel(name, str(path), family, _size(path), dtype, problem)


def _declared_family(path: Path) -> str | None:
    """The name of the architecture in the files, which may not be supported."""
    from model.weights.checkpoint import ModelLoadError
    from model.weights.gguf_header import read_header

    try:
        if path.is_file():
            family = read_header(path).metadata.get("general.architecture")
        else:
            config = json.loads((path / "config.json").read_bytes())
            family = config.get("model_type") or config["architectures"][0]
    except (ModelLoadError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return family if isinstance(family, str) else None


def _size(path: Path) -> int:
    files = path.parent.glob(re.sub(r"-00001-of-", "-?????-of-", path.name)) if path.is_file() else path.iterdir()
    weights = (file for file in files if file.suffix in (".gguf", ".safetensors", ".bin"))
    return sum(file.stat().st_size for file in weights if file.is_file())


def _print_table(models: Sequence[LocalModel]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("MODEL", "FAMILY", "DTYPE"):
        table.add_column(name, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("CAN BE SERVED", overflow="fold")
    for model in models:
        size = f"{model.bytes / 1e6:,.0f}" if model.path else "-"
        table.add_row(model.model, model.family or "-", model.dtype or "-", size, model.problem or "yes")
    Console(highlight=False).print(table)
