"""Finds the compiled kernels and makes them known to XLA."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

TARGET = "logprobd_linear"
ATTENTION_TARGET = "logprobd_attention"
NORM_TARGET = "logprobd_norm"
SWIGLU_TARGET = "logprobd_swiglu"
ROTATE_TARGET = "logprobd_rotate"
NUMBERS_TARGET = "logprobd_numbers"
SCORE_TARGET = "logprobd_score"
INT8_TARGET = "logprobd_linear_int8"
SCORE_INT8_TARGET = "logprobd_score_int8"
TARGETS = (
    TARGET,
    ATTENTION_TARGET,
    NORM_TARGET,
    SWIGLU_TARGET,
    ROTATE_TARGET,
    NUMBERS_TARGET,
    SCORE_TARGET,
    INT8_TARGET,
    SCORE_INT8_TARGET,
)
# One result to the last bit on three paths: AVX512_BF16, AVX512F, and plain C++.
PATHS = ("pairs", "floats", "portable")


@dataclass(frozen=True)
class CpuKernels:
    """The loaded library: the paths of the linear kernel that this CPU can run, each also a target `TARGET_path`."""

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
    for name in (*TARGETS, *(f"{TARGET}_{path}" for path in paths)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return CpuKernels(paths)


def require() -> CpuKernels:
    """The kernels. Raises RuntimeError where `load()` gives None."""
    kernels = load()
    if kernels is None:
        raise RuntimeError("the CPU kernels are not built, or this CPU has no AVX-512: leave the work to XLA")
    return kernels
