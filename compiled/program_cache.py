"""The persistent cache of compiled programs: a private directory in which each entry has a SHA-256 checksum.

Compression alone does not detect damage: zlib has a checksum, but zstandard, which jax uses if it is installed, has
none by default, and a damaged entry would be executed.
"""

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from model.private_files import is_private

logger = logging.getLogger(__name__)

# jax has no public option of one compilation: these are the process's.
_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_min_compile_time_secs",
)
_ENTRY, _CHECKSUM = "-cache", ".sha256"


@contextmanager
def cache_options_restored() -> Iterator[None]:
    """Restore jax's options of its persistent cache at the end, since they apply to the whole process.

    They are restored because a model may be loaded into a program that uses jax itself.
    """
    values = {name: getattr(jax.config, name) for name in _OPTIONS}
    try:
        yield
    finally:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def use_persistent_cache(directory: Path) -> None:
    """Keep executables in `directory` and make it private: whoever can write there can run code in this process.

    Deletes the entries if other users could have written them, else those without a valid checksum. A directory that
    would have to be changed, and is read-only, is not used.

    Raises:
        PermissionError: the directory belongs to another user.
    """
    try:
        _prepare(directory)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        logger.warning("%s cannot be written (%s): programs are compiled at every start", directory, error.strerror)
        return
    for name, value in zip(_OPTIONS, (str(directory), -1, 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user, who could put programs there", str(directory))
    is_foreign = not is_private(directory.resolve())
    if stat.S_IMODE(directory.stat().st_mode) != 0o700:
        directory.chmod(0o700)
    entries = list(_entries(directory))
    if is_foreign and entries:
        logger.warning("%s: other users could write there: its programs are compiled again", directory)
    for entry in entries:
        # An entry without a checksum is of a writer that was killed or is still writing.
        if is_foreign or not _checksum(entry).exists() or _is_damaged(entry):
            _delete(entry)


def seal_entries(name: str | None = None) -> None:
    """Write the missing checksums of complete entries: of the program `name`, or of all."""
    for entry in _entries_of(name):
        if not _checksum(entry).exists():
            try:
                _checksum(entry).write_text(_digest(entry), "ascii")
            except OSError as error:  # a full disk, or another process has deleted it: the next start compiles it again
                logger.debug("%s: %s", entry, error)


def delete_damaged_entries(name: str) -> None:
    """Delete entries of the program `name` that do not match their checksum: jax would keep them and only warn."""
    for entry in _entries_of(name):
        if _checksum(entry).exists() and _is_damaged(entry, logging.DEBUG):
            _delete(entry)


def _entries_of(name: str | None) -> Iterator[Path]:
    directory = jax.config.jax_compilation_cache_dir
    return iter(()) if not directory else _entries(Path(directory), "" if name is None else f"jit_{name}-")


def _entries(directory: Path, prefix: str = "") -> Iterator[Path]:
    return directory.glob(f"{prefix}*{_ENTRY}")


def _checksum(entry: Path) -> Path:
    return entry.with_name(entry.name + _CHECKSUM)


def _delete(entry: Path) -> None:
    entry.unlink(missing_ok=True)
    _checksum(entry).unlink(missing_ok=True)


def _is_damaged(entry: Path, level: int = logging.WARNING) -> bool:
    try:
        expected, digest = _checksum(entry).read_text("ascii"), _digest(entry)
    except (OSError, ValueError):
        return True
    if expected and expected != digest:
        logger.log(level, "%s: a cached program is damaged; it is compiled again", entry.name)
    return expected != digest


def _digest(entry: Path) -> str:
    with entry.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
