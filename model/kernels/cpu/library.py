"""Finds the compiled kernels and makes them known to XLA."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

TARGET = "logprobd_linear"
ATTENTION_TARGET = "logprobd_attention"
# One result to the last bit on three paths: AVX512_BF16, AVX512F, and plain C++.
PATHS = ("pairs", "floats", "portable")


@dataclass(frozen=True)
class CpuKernels:
    """The loaded library: the names of its XLA targets, and the paths of `target` that this CPU can run.

    Each path is a target of its own, `target_path`, for the tests.
    """

    target: str
    attention: str
    paths: tuple[str, ...]


def library_path() -> Path:
    """Where the library of this jaxlib lies: its interface belongs to one version of the headers."""
    return Path(__file__).with_name("_build") / f"kernels-jaxlib-{jaxlib.version.__version__}.so"


@functools.cache
def load() -> CpuKernels | None:
    """Registers the kernels with XLA on the first call; None where XLA does better without them.

    That is where the library is not built or does not load, and on a CPU without AVX-512. To be called before a program
    that holds the kernels is compiled or comes out of the persistent compilation cache.
    """
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError:
        return None
    has = {"pairs": library.logprobd_has_pairs(), "floats": library.logprobd_has_floats(), "portable": 1}
    if not has["floats"]:
        return None
    paths = tuple(path for path in PATHS if has[path])
    for name in (TARGET, ATTENTION_TARGET, *(f"{TARGET}_{path}" for path in paths)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return CpuKernels(TARGET, ATTENTION_TARGET, paths)
