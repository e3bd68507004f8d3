"""The directory where compiled programs are kept: private, and each entry with the sum that says it is whole.

Compression alone does not: zlib has a checksum, zstandard, which jax takes where it is installed, has none by default.
What is read wrongly from an entry would be run.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

_ENTRY, _SUM = "-cache", ".sha256"


def use_persistent_cache(directory: Path) -> None:
    """Keeps executables in `directory`, made private: whoever can write there can run code in this process.

    What is there is thrown away if others could have put it there, or if it is not what was sealed.

    Raises:
        PermissionError: the directory is another user's.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user, who could put programs there", str(directory))
    directory.chmod(0o700)
    kept = list(_entries(directory))
    if status.st_mode & 0o022 and kept:
        logger.warning("%s: other users could write there: what was kept is compiled anew", directory)
    else:
        kept = [entry for entry in kept if not _is_whole(entry)]
    for entry in kept:
        entry.unlink(missing_ok=True)
        _sum_of(entry).unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def seal_entries(name: str | None = None) -> None:
    """Writes the sums of entries that have none: of the program `name`, or of all. They must be whole by now."""
    for entry in _kept(name):
        if not _sum_of(entry).exists():
            try:
                _sum_of(entry).write_text(_digest(entry), "ascii")
            except OSError as error:  # a full disk, or another process has deleted it: it is compiled anew next time
                logger.debug("%s: %s", entry, error)


def delete_entries(name: str) -> None:
    """Deletes what is kept of the program `name`."""
    for entry in _kept(name):
        entry.unlink(missing_ok=True)
        _sum_of(entry).unlink(missing_ok=True)


def _kept(name: str | None) -> Iterator[Path]:
    directory = jax.config.jax_compilation_cache_dir
    return iter(()) if not directory else _entries(Path(directory), "" if name is None else f"jit_{name}-")


def _entries(directory: Path, prefix: str = "") -> Iterator[Path]:
    return directory.glob(f"{prefix}*{_ENTRY}")


def _sum_of(entry: Path) -> Path:
    return entry.with_name(entry.name + _SUM)


def _is_whole(entry: Path) -> bool:
    """False also for one without a sum, whose writer was killed, or is still at work in another process."""
    try:
        sealed, found = _sum_of(entry).read_text("ascii"), _digest(entry)
    except (OSError, ValueError):
        return False
    if sealed == found or not sealed:
        return bool(sealed)
    logger.warning("%s: a kept program is damaged; it is compiled anew", entry.name)
    return False


def _digest(entry: Path) -> str:
    with entry.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
