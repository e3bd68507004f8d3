"""Executables in a private directory, found by what they depend on: a start that finds its programs traces nothing.

An index names the executable of a program of a model on a machine for one version of the code. With other code the
program is lowered, and its executable is found by its text. JAX's persistent cache, which always needs that text, is
off meanwhile: lowering takes longer than reading, and an executable that was read from that cache cannot be serialized.
"""

import errno
import hashlib
import logging
import os
import pickle
import platform
import re
import stat
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import flax
import jax
import jaxlib.version
import ml_dtypes
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled, Lowered

from model.private_files import is_private
from model.transformer import BoundModel

logger = logging.getLogger(__name__)

_PROGRAM, _INDEX, _UNFINISHED = ".program", ".index", ".unfinished"
_DIGEST = 64  # characters
_ROOT = Path(__file__).parents[1]
_SOURCES = ("compiled", "model")  # packages whose code determines the programs
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_CPU_FEATURES = re.compile(r"^(?:flags|Features)\s*:.*$", re.MULTILINE)
# Of an executable that this version of the code or of a compiler cannot read or serialize.
_UNUSABLE = (
    jax.errors.JaxRuntimeError,
    pickle.PickleError,
    AttributeError,
    ImportError,
    NotImplementedError,
    ValueError,
)


@contextmanager
def jax_cache_disabled() -> Iterator[None]:
    """Turn JAX's persistent cache off: its option applies to the process, which may be a program that uses jax too."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


class ProgramCache:
    """The directory, private because whoever can write there can run code in this process."""

    def __init__(self, directory: Path) -> None:
        """Make the directory private; delete its programs if other users could have written them.

        A directory that would have to be changed, and is read-only, is not used.

        Raises:
            PermissionError: it belongs to another user.
        """
        self._directory: Path | None = directory
        try:
            _prepare(directory)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            self._directory = None
            _warn_of_compilation(directory, error)

    def programs_of(self, model: BoundModel, *sizes: object) -> "ModelPrograms | None":
        """The executables of a model; `sizes` are what its programs depend on besides, as values with full reprs."""
        if self._directory is None:
            return None
        devices = jax.devices()[:1] if model.mesh is None else list(model.mesh.devices.flat)
        return ModelPrograms(self._directory, repr((_facts_of(model), sizes)), devices)


class ModelPrograms:
    """The executables of one model and one set of sizes."""

    def __init__(self, directory: Path, subject: str, devices: list[jax.Device]) -> None:
        self._directory = directory
        self._subject = _digest_of(subject)
        self._devices = devices
        self._is_unwritable = False
        self._warning = threading.Lock()  # programs are compiled on several threads
        self._environment = _environment()
        self._key = _digest_of(self._subject, _sources(), self._environment)

    def find(self, name: str) -> Compiled | None:
        """The executable of program `name`, unless the code has changed since it was saved."""
        try:
            key, digest = self._index(name).read_text("ascii").split()
        except (OSError, ValueError):
            return None
        return self._read(self._path(name, digest)) if key == self._key else None

    def find_lowered(self, name: str, lowered: Lowered) -> Compiled | None:
        """The executable of a program that equals `lowered`, whichever code it was saved by."""
        digest = self._digest(lowered)
        compiled = self._read(self._path(name, digest))
        if compiled is not None:
            self._write_index(name, digest)
        return compiled

    def save(self, name: str, lowered: Lowered, compiled: Compiled) -> None:
        """Store a new executable. One that the platform cannot serialize is compiled at every start."""
        digest = self._digest(lowered)
        try:
            data = zlib.compress(pickle.dumps(serialize(compiled)), 1)
        except _UNUSABLE as error:
            logger.debug("%s cannot be serialized: %s", name, error)
            return
        self._write(self._path(name, digest), hashlib.sha256(data).hexdigest().encode() + data)
        self._write_index(name, digest)

    def _read(self, path: Path) -> Compiled | None:
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        checksum, data = entry[:_DIGEST], entry[_DIGEST:]
        if checksum != hashlib.sha256(data).hexdigest().encode():
            logger.warning("%s: a cached program is damaged; it is compiled again", path.name)
            with suppress(OSError):
                path.unlink()
            return None
        try:
            serialized, in_tree, out_tree = pickle.loads(zlib.decompress(data))
            compiled: Compiled = deserialize_and_load(serialized, in_tree, out_tree, execution_devices=self._devices)
        except _UNUSABLE as error:
            logger.debug("%s cannot be loaded: %s", path, error)
            return None
        return compiled

    def _write_index(self, name: str, digest: str) -> None:
        self._write(self._index(name), f"{self._key} {digest}".encode())

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file that appears when it is complete."""
        unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
        try:
            unfinished.write_bytes(data)
            with suppress(FileNotFoundError):  # another process has started and removed it
                unfinished.replace(path)
        except OSError as error:  # a full disk, or a read-only file system
            with self._warning:
                if not self._is_unwritable:
                    _warn_of_compilation(self._directory, error)
                self._is_unwritable = True

    def _digest(self, lowered: Lowered) -> str:
        """Of the text, and of the arguments: the text lacks those that the program does not use."""
        return _digest_of(lowered.as_text(), str((lowered.args_info, lowered.out_info)), self._environment)

    def _index(self, name: str) -> Path:
        return self._directory / f"{name}-{self._subject[:32]}{_INDEX}"

    def _path(self, name: str, digest: str) -> Path:
        return self._directory / f"{name}-{digest[:32]}{_PROGRAM}"


def _warn_of_compilation(directory: Path, error: OSError) -> None:
    logger.warning("%s cannot be written (%s): programs are compiled at every start", directory, error.strerror)


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user, who could put programs there", str(directory))
    is_foreign = not is_private(directory.resolve())
    if stat.S_IMODE(directory.stat().st_mode) != 0o700:
        directory.chmod(0o700)
    for path in directory.glob(f"*{_UNFINISHED}"):  # their writers were killed, or compile the program again
        path.unlink(missing_ok=True)
    entries = [path for path in directory.iterdir() if path.suffix in (_PROGRAM, _INDEX)]
    if is_foreign and entries:
        logger.warning("%s: other users could write there: its programs are compiled again", directory)
        for entry in entries:
            entry.unlink(missing_ok=True)


def _facts_of(model: BoundModel) -> tuple[object, ...]:
    """All that the programs of a model depend on, as values with full reprs. The module graph follows from them."""
    mesh = None if model.mesh is None else (model.mesh.axis_names, model.mesh.devices.shape)
    leaves = [(leaf.shape, leaf.dtype.name, str(getattr(leaf.sharding, "spec", None))) for leaf in model.leaves]
    _, tree = model.definition
    return model.config, model.dtype.name, model.kv_dtype.name, model.kernels, mesh, leaves, str(tree)


def _sources() -> list[tuple[str, bytes]]:
    paths = [path for package in _SOURCES for path in sorted((_ROOT / package).rglob("*.py"))]
    return [(str(path.relative_to(_ROOT)), path.read_bytes()) for path in paths]


def _environment() -> tuple[object, ...]:
    """All that compilation depends on besides the code: versions, options, devices and the machine."""
    versions = (sys.version, *(module.__version__ for module in (jax, jaxlib.version, flax, np, ml_dtypes)))
    options = sorted((name, value) for name, value in jax.config.values.items() if "cache" not in name)
    flags = [os.environ.get(name) for name in _FLAGS]
    devices = [(device.platform, device.device_kind) for device in jax.devices()]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = (platform.machine(), threads, _cpu_features(), jax.devices()[0].client.platform_version)
    return versions, options, flags, devices, machine


def _cpu_features() -> str:
    """Features of this machine's CPU, for which code is compiled; empty if the system does not list them."""
    try:
        found = _CPU_FEATURES.search(Path("/proc/cpuinfo").read_text("ascii", "replace"))
    except OSError:
        return ""
    return found[0] if found else ""


def _digest_of(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
