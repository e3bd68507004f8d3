"""Fixtures of the CPU kernels."""

import pytest

from model.kernels import cpu
from model.kernels.cpu import build


@pytest.fixture(scope="session")
def kernels() -> cpu.CpuKernels:
    """The kernels, built if missing; skips the test if they cannot be built."""
    try:
        build.build_all()
    except RuntimeError as error:
        pytest.skip(f"the kernels cannot be built here: {error}")
    loaded = cpu.load_library()
    if loaded is None:
        pytest.skip("there are no kernels for this CPU")
    return loaded
