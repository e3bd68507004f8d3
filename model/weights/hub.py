"""Models on the Hugging Face hub: the files that a name selects, and their download into the hub's cache."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but without __all__
    WeakFileLock,
    build_hf_headers,
    disable_progress_bars,
    filter_repo_objects,
)

from model.weights.checkpoint import ModelLoadError
from model.weights.safetensors import read_config

# Nothing here can run code when it is opened: no pickle (.bin, .pt) and no Python files.
_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
# Other formats' copies of the same weights.
_IGNORED = ("*/*", "consolidated*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.gguf")
_WEIGHTS = (".safetensors", ".gguf")

OTHER_HALF = "mmproj"  # in the names of GGUF files with the part for images or audio

_ID = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repo>{_ID}/{_ID}(?<!\.gguf))(?::(?P<tag>[\w.-]+)|/(?P<file>.+\.gguf))?")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_NO_MODEL = re.compile(f"{OTHER_HALF}|imatrix", re.IGNORECASE)  # the latter are statistics for quantization
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # ETag of a file in git, or in LFS: its SHA-256
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class HubName:
    """The parts of "org/name", "org/name:TAG" or "org/name/FILE.gguf"."""

    repo: str
    tag: str | None = None  # in the name of a .gguf file, such as Q4_K_M
    file: str | None = None


@dataclass(frozen=True, slots=True)
class _Listing:
    files: Mapping[str, int]  # bytes by path
    commit: str | None  # None: the hub cannot be asked; the files are those of the local cache


def parse_name(name: str) -> HubName | None:
    """The parts of a model's name; None if it cannot be one of the hub."""
    found = _NAME.fullmatch(name)
    return HubName(found["repo"], found["tag"], found["file"]) if found else None


def gguf_models(files: Collection[str]) -> list[list[str]]:
    """The .gguf files of each model among `files`, which has several if it is stored in parts."""
    models = defaultdict[str, list[str]](list)
    for file in sorted(files):
        if file.endswith(".gguf") and not _NO_MODEL.search(PurePosixPath(file).name):
            models[_PART.sub("", file)].append(file)
    return list(models.values())


def select_files(name: HubName, files: Collection[str]) -> list[str]:
    """The files to download: all parts of one GGUF model, or a model of safetensors with its tokenizer.

    A tag must be in the file's name, followed by "-" or "." as in llama.cpp and not preceded by a letter or digit, in
    any case.

    Raises:
        ModelLoadError: no model fits, or several do; lists those that exist.
    """
    models = gguf_models(files)
    top = list(filter_repo_objects(files, allow_patterns=list(_PATTERNS), ignore_patterns=list(_IGNORED)))
    if name.file is not None:
        fitting = [parts for parts in models if name.file in parts]
    elif name.tag is not None:
        tag = re.compile(rf"(?<![a-z\d]){re.escape(name.tag)}[.-]", re.IGNORECASE)
        fitting = [parts for parts in models if tag.search(parts[0])]
    elif "config.json" in top and any(file.endswith(".safetensors") for file in top):
        return top
    else:
        fitting = models
    if len(fitting) == 1:
        return _complete(fitting[0])
    if not models:
        what = "no .gguf files" if name.tag or name.file else "no config.json with *.safetensors and no .gguf file"
        raise ModelLoadError(f"{name.repo} contains {what}; pickled weights are not supported")
    advice = f"name one as {name.repo}:TAG or {name.repo}/FILE"
    if fitting:
        fits = f" whose names contain {name.tag}" if name.tag else ""
        raise ModelLoadError(f"{name.repo} contains {len(fitting)} GGUF models{fits}; {advice}: {_list(fitting)}")
    wanted = name.file or f".gguf file whose name contains {name.tag}"
    raise ModelLoadError(f"{name.repo} contains no {wanted}; {advice}: {_list(models)}")


def _list(models: Sequence[Sequence[str]]) -> str:
    return ", ".join(parts[0] if len(parts) == 1 else f"{parts[0]} ({len(parts)} files)" for parts in models)


def _complete(parts: list[str]) -> list[str]:
    found = _PART.search(parts[0])
    if found and len(parts) != int(found[1]):
        raise ModelLoadError(f"{parts[0]}: the repository contains {len(parts)} of {int(found[1])} parts")
    return parts


def download(name: HubName, revision: str | None, report: Callable[[str], None]) -> Path:
    """The downloaded .gguf file (the first of several), or the folder of config.json and safetensors.

    config.json is checked before weights are downloaded.

    Raises:
        ModelLoadError: one line that says what is missing.
    """
    try:
        listing = _list_files(name.repo, revision)
        files = select_files(name, listing.files)
        if listing.commit is not None:
            _fetch(name.repo, listing.commit, files, listing.files, report)
        folder = _snapshot(name.repo, revision, files, is_local=listing.commit is None)
    except (OSError, ValueError, EntryNotFoundError, httpx2.HTTPError) as error:
        raise ModelLoadError(_problem(error, name.repo, revision)) from error
    return folder / files[0] if files[0].endswith(".gguf") else folder


def _list_files(repo: str, revision: str | None) -> _Listing:
    """The files of a repository, else those that its cached listing or the cache itself has."""
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        return _Listing({file.rfilename: file.size or 0 for file in info.siblings or ()}, info.sha)
    except RevisionNotFoundError:
        raise
    except (httpx2.HTTPError, OSError) as error:
        try:
            return _Listing(_cached_files(repo, revision), None)
        except LocalEntryNotFoundError:
            raise error from None


def _cached_files(repo: str, revision: str | None) -> dict[str, int]:
    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=revision)}
    except CachedRepoTreeNotFoundError:
        folder = _snapshot(repo, revision, [], is_local=True)
        files = (file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _snapshot(repo: str, revision: str | None, files: Sequence[str], *, is_local: bool = False) -> Path:
    """The folder of a commit in the cache, with these files; downloads those that are missing."""
    patterns = [escape(file) for file in files]
    with disable_progress_bars():  # the files are small, or their blobs are in the cache already
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=is_local))


def _fetch(
    repo: str, commit: str, files: Sequence[str], sizes: Mapping[str, int], report: Callable[[str], None]
) -> None:
    """Download the files that the cache lacks: first the small ones, which are checked."""
    missing = [file for file in files if not isinstance(try_to_load_from_cache(repo, file, revision=commit), str)]
    if not missing:
        return
    weights = [file for file in missing if file.endswith(_WEIGHTS)]
    if small := [file for file in files if not file.endswith(_WEIGHTS)]:
        read_config(_snapshot(repo, commit, small) / "config.json")
    total = f"{len(missing)} file{'s'[: len(missing) > 1]}, {sum(sizes[file] for file in missing) / 1e6:,.1f} MB"
    report(f"downloading {repo}: {total} to {constants.HF_HUB_CACHE}")
    for file in weights:
        _fetch_file(repo, commit, file)


def _fetch_file(repo: str, commit: str, file: str) -> None:
    """Download a file into the cache's blobs, from where an earlier download was interrupted.

    `snapshot_download` links it to its name. Its own downloads start again after an interruption.
    """
    url = hf_hub_url(repo, file, revision=commit)
    metadata = get_hf_file_metadata(url)
    etag, size = metadata.etag, metadata.size
    if etag is None or not _DIGEST.fullmatch(etag) or size is None or size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # left to `snapshot_download`
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    blob, lock = cache / folder / "blobs" / etag, cache / ".locks" / folder / f"{etag}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # that of `snapshot_download`
        if blob.exists():
            return
        partial = blob.with_name(f"{etag}.incomplete")
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        with partial.open("ab") as stream:
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=headers,
                expected_size=size,
                displayed_filename=PurePosixPath(file).name,
            )
        with partial.open("rb") as stream:
            if len(etag) == 64 and hashlib.file_digest(stream, "sha256").hexdigest() != etag:
                partial.unlink()
                raise OSError(f"{file} is damaged: its SHA-256 differs from the hub's")
        partial.replace(blob)


def _problem(error: Exception, repo: str, revision: str | None) -> str:
    has_token = get_token() is not None
    match error:
        case GatedRepoError():
            account = "with the account of your token" if has_token else "and set HF_TOKEN to a token of that account"
            return f"access is restricted: accept its terms at {constants.ENDPOINT}/{repo} {account}"
        case HfHubHTTPError() if "Invalid credentials" in error.response.headers.get("X-Error-Message", ""):
            return "the hub rejects the token in HF_TOKEN: it is not valid, or has expired"
        case RepositoryNotFoundError():
            private = "nor a private one that your token can read" if has_token else "for a private one set HF_TOKEN"
            return f"not a local path, and not a public model on the hub; {private}"
        case RevisionNotFoundError():
            return f"revision {revision} does not exist on the hub"
        case OfflineModeIsEnabled():
            return "not a local path, not in the local cache, and HF_HUB_OFFLINE forbids a download"
        case LocalEntryNotFoundError():
            return "not a local path, incomplete in the local cache, and the hub is unreachable"
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return f"not a local path, not in the local cache, and the hub ({constants.ENDPOINT}) is unreachable"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"cannot be downloaded: {reason}; run the command again to continue"
