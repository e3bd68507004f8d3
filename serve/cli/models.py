"""`logprobd models`: list models on this machine and whether they can be served, download them, and delete them."""

import dataclasses
import json
import os
import re
import shutil
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
with config.json and weights, and .gguf files. MODEL is the argument of `logprobd serve`. Reads headers, but no weights.

  logprobd models pull MODEL   download a model of the hub
  logprobd models rm MODEL     delete a downloaded model

examples:
  logprobd models
  logprobd models list ~/models --json
  logprobd models pull org/name:Q4_K_M
"""
_PULL_EPILOG = """\
Downloads a model into the Hugging Face hub cache, without starting a server. An interrupted download is continued where
it stopped. The exit code is 1 if the model cannot be served. HF_TOKEN is the token for gated and private models.

MODEL is one of:
  org/name             the model's config.json, tokenizer and *.safetensors, or its only GGUF model
  org/name:Q4_K_M      the GGUF model with Q4_K_M in its file name, in all its parts
  org/name/file.gguf   that file, with all parts of its model
"""
_REMOVE_EPILOG = """\
MODEL is org/name for everything of the repository in the Hugging Face hub cache, and org/name:Q4_K_M or
org/name/file.gguf for one GGUF model. Asks before it deletes, except with --yes. Files elsewhere are not touched.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListConfig:
    folder: tuple[Path, ...] = option("Models", "folder to search", Path, default=(), repeatable=True, metavar="FOLDER")
    json: bool = switch("Models", "print a JSON list")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullConfig:
    model: str = option("Models", "name on the hub, see below", default=dataclasses.MISSING, metavar="MODEL")
    revision: str | None = option("Models", "branch, tag or commit", metavar="NAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveConfig:
    model: str = option("Models", "name on the hub, see below", default=dataclasses.MISSING, metavar="MODEL")
    yes: bool = switch("Models", "do not ask")


type ModelsConfig = ListConfig | PullConfig | RemoveConfig


@dataclass(frozen=True, slots=True)
class LocalModel:
    model: str  # argument of `logprobd serve`
    path: str | None  # None: not downloaded
    family: str | None  # None: unknown
    bytes: int  # of the weights on disk
    format: str | None  # GGUF, safetensors or pickle
    dtype: str | None  # in which most weights are stored
    problem: str | None  # why it cannot be served from these files; None: it can


def parse_args(arguments: Sequence[str]) -> ModelsConfig:
    match [*arguments[:1]]:
        case ["pull"]:
            text, prog = "Download a model of the Hugging Face hub.", "logprobd models pull"
            pull = CommandLine(PullConfig, prog=prog, description=text, epilog=_PULL_EPILOG, positional="model")
            return pull.read(arguments[1:])
        case ["rm"]:
            text, prog = "Delete a downloaded model of the Hugging Face hub.", "logprobd models rm"
            remove = CommandLine(RemoveConfig, prog=prog, description=text, epilog=_REMOVE_EPILOG, positional="model")
            return remove.read(arguments[1:])
    text = "List the models on this machine."
    line = CommandLine(ListConfig, prog="logprobd models", description=text, epilog=_EPILOG, positional="folder")
    return line.read(arguments[1:] if arguments[:1] == ["list"] else arguments)


def main(config: ModelsConfig) -> int:
    """List, download or delete models; the exit code is 1 after an error."""
    match config:
        case PullConfig():
            return _pull(config)
        case RemoveConfig():
            return _remove(config)
    for folder in config.folder:
        if not folder.expanduser().is_dir():
            return _fail(f"{folder}: no such folder")
    models = [_default_model(), *_cached_models()]
    models += [_inspect(path, str(path)) for folder in config.folder for path in find_models(folder.expanduser())]
    if config.json:
        print(json.dumps([dataclasses.asdict(model) for model in models], indent=2))
    else:
        _print_table(models)
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _pull(config: PullConfig) -> int:
    from model.weights.checkpoint import ModelLoadError
    from model.weights.source import resolve_model

    try:
        source = resolve_model(config.model, config.revision, lambda line: print(line, file=sys.stderr))
    except ModelLoadError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the command again to continue")
        return 130
    model = _inspect(source.path, config.model)
    _print_table([model])
    return int(model.problem is not None)


def _remove(config: RemoveConfig) -> int:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir
    from huggingface_hub.file_download import repo_folder_name

    from model.weights.checkpoint import ModelLoadError
    from model.weights.hub import parse_name, select_files

    name = parse_name(config.model)
    if name is None or Path(config.model).expanduser().exists():
        return _fail(f"{config.model}: not a model of the hub; only downloads in the hub cache are deleted")
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return _fail(f"{config.model}: not in the hub cache")
    revisions = [revision for repo in cache.repos if repo.repo_path == folder for revision in repo.revisions]
    files = [
        (file.file_path.relative_to(revision.snapshot_path).as_posix(), file)
        for revision in revisions
        for file in revision.files
    ]
    is_repo = name.tag is None and name.file is None
    if not (folder.is_dir() if is_repo else files):
        return _fail(f"{config.model}: not in the hub cache")
    if is_repo:
        strategy = cache.delete_revisions(*(revision.commit_hash for revision in revisions))
        size = sum(blob.stat().st_size for blob in folder.glob("blobs/*"))
    else:
        try:
            selected = select_files(name, {path for path, _ in files})
        except ModelLoadError as error:
            return _fail(f"{config.model}: not in the hub cache: {error}")
        strategy = cache.delete_files(*(file for path, file in files if path in selected))
        size = strategy.expected_freed_size
    if not config.yes and not _is_confirmed(f"delete {config.model}, {size / 1e6:,.1f} MB in {folder}?"):
        return 1
    strategy.execute()
    if is_repo:  # downloads that are not complete are of no revision
        shutil.rmtree(folder, ignore_errors=True)
    if is_repo and folder.exists():
        return _fail(f"{folder}: cannot be deleted")
    print(f"deleted {config.model}: {size / 1e6:,.1f} MB")
    return 0


def _is_confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        _fail(f"{question} Confirm with --yes")
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


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
    return LocalModel(
        "(default)", None, None, 0, None, None, "not downloaded yet: fetched by the first `logprobd serve`"
    )


def _cached_models() -> Iterator[LocalModel]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        for path in find_models(newest.snapshot_path):
            part = path.relative_to(newest.snapshot_path).as_posix()
            is_name = part == "." or path.suffix == ".gguf"
            yield _inspect(path, f"{repo.repo_id}/{part}".removesuffix("/.") if is_name else str(path))
    partial = Counter[Path]()
    for file in cache.incomplete_files:
        partial[file.file_path.parents[1]] += file.size_on_disk
    for folder, size in sorted(partial.items()):
        kind, *words = folder.name.split("--")
        if kind == "models":
            problem = "not completely downloaded: `logprobd models pull` continues"
            yield LocalModel("/".join(words), str(folder), None, size, None, None, problem)


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
    return LocalModel(name, str(path), family, _size(path), _format(path), dtype, problem)


def _format(path: Path) -> str:
    if path.is_file():
        return "GGUF"
    return "safetensors" if any(path.glob("*.safetensors*")) else "pickle"


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
    for name in ("MODEL", "FAMILY", "FORMAT"):
        table.add_column(name, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("CAN BE SERVED", overflow="fold")
    for model in models:
        size = f"{model.bytes / 1e6:,.0f}" if model.path else "-"
        format_ = " ".join(filter(None, (model.format, model.dtype))) or "-"
        table.add_row(model.model, model.family or "-", format_, size, model.problem or "yes")
    Console(highlight=False).print(table)
