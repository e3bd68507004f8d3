"""Rounding to block formats: gguf's own dequantize reads the bytes, and errors are close to a brute-force optimum."""

from itertools import product

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from model.weights.quantize import ENCODERS, quantize

type Floats = NDArray[np.float32]

# Levels of a group and its size, and the largest error relative to that of the best of very many scales. Formats with a
# minimum per group, and those with one scale. Scales of K formats have 6 or 8 bits.
AFFINE = {"Q4_1": (15, 32, 1.06), "Q5_1": (31, 32, 1.06), "Q4_K": (15, 32, 1.027), "Q5_K": (31, 32, 1.09)}
SYMMETRIC = {
    "Q4_0": (-8, 7, 32, 1.03),
    "Q5_0": (-16, 15, 32, 1.06),
    "Q8_0": (-127, 127, 32, 1.25),
    "Q6_K": (-32, 31, 16, 1.2),
}


def rounded(matrix: Floats, kind: str, importance: Floats | None = None) -> Floats:
    blocks = quantize(matrix, kind, importance)
    values: Floats = quants.dequantize(blocks, GGMLQuantizationType[kind])
    assert values.shape == matrix.shape
    return values


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def squares(matrix: Floats, other: Floats) -> float:
    return float(((matrix - other) ** 2).sum())


def best_affine(x: NDArray[np.float64], levels: int) -> float:
    """Least squared error of scale * level + minimum to a group, with any scale and a minimum of at most 0."""
    low, width = min(0.0, x.min()), x.max() - min(0.0, x.min())
    best = np.inf
    for scale, minimum in product(
        np.linspace(0.8, 1.1, 61) * width / levels, low + np.linspace(-0.06, 0.16, 45) * width
    ):
        level = np.clip(np.rint((x - minimum) / scale), 0, levels)
        best = min(best, ((x - scale * level - minimum) ** 2).sum())
    return best


def best_symmetric(x: NDArray[np.float64], low: int, high: int) -> float:
    extreme = np.abs(x).max() / high
    scales = np.concatenate([np.linspace(0.7, 1.2, 800), -np.linspace(0.7, 1.2, 800)]) * extreme
    levels = np.clip(np.rint(x / scales[:, None]), low, high)
    return float(((x - scales[:, None] * levels) ** 2).sum(axis=1).min())


@pytest.mark.parametrize("kind", AFFINE)
def test_affine_formats_are_close_to_the_optimum(kind: str) -> None:
    levels, size, limit = AFFINE[kind]
    matrix = normal(2, 512) * np.float32(0.05)
    optimum = sum(best_affine(group, levels) for group in matrix.astype(np.float64).reshape(-1, size))
    assert squares(matrix, rounded(matrix, kind)) < limit * optimum


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_symmetric_formats_are_close_to_the_optimum(kind: str) -> None:
    low, high, size, limit = SYMMETRIC[kind]
    matrix = normal(2, 512) * np.float32(0.05)
    optimum = sum(best_symmetric(group, low, high) for group in matrix.astype(np.float64).reshape(-1, size))
    assert squares(matrix, rounded(matrix, kind)) < limit * optimum


def test_mxfp4_takes_the_better_power_of_two() -> None:
    matrix = normal(8, 512)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    optimum = 0.0
    for x in np.abs(matrix.astype(np.float64)).reshape(-1, 32):
        grids = [values * 2.0**exponent for exponent in range(-5, 4)]
        optimum += min((np.abs(x[:, None] - grid).min(axis=1) ** 2).sum() for grid in grids)
    assert squares(matrix, rounded(matrix, "MXFP4")) < 1.03 * optimum


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_errors_are_below_those_of_the_gguf_package(kind: str) -> None:
    matrix = normal(64, 256)
    kind_of = GGMLQuantizationType[kind]
    assert squares(matrix, rounded(matrix, kind)) < squares(
        matrix, quants.dequantize(quants.quantize(matrix, kind_of), kind_of)
    )


@pytest.mark.parametrize("kind", ENCODERS)
def test_importance_moves_the_error_to_other_columns(kind: str) -> None:
    matrix = normal(64, 1024)
    importance = np.exp(2 * normal(1024, seed=1))
    error = ((matrix - rounded(matrix, kind)) ** 2 * importance).sum()
    weighted = ((matrix - rounded(matrix, kind, importance)) ** 2 * importance).sum()
    assert weighted < {"MXFP4": 0.995, "Q8_0": 0.9, "Q4_0": 0.9}.get(kind, 0.85) * error


@pytest.mark.parametrize("kind", ENCODERS)
def test_rounded_values_are_rounded_to_themselves(kind: str) -> None:
    matrix = normal(16, 512)
    once = rounded(matrix, kind)
    tolerance = 0.05 if kind.endswith("_K") else 1e-6  # 6-bit scales of a group have other multiples
    assert squares(once, rounded(once, kind)) <= tolerance * squares(matrix, once)


@pytest.mark.parametrize("kind", ENCODERS)
def test_edge_cases(kind: str) -> None:
    matrix = np.zeros((6, 512), np.float32)
    matrix[1] = 1.0
    matrix[2] = -3.0
    matrix[3, 40] = 5.0  # one value per block
    matrix[4] = np.linspace(1, 2, 512)  # a minimum above 0
    matrix[5] = -np.linspace(1, 2, 512)
    values = rounded(matrix, kind, np.zeros(512, np.float32))
    assert np.isfinite(values).all()
    assert (values[0] == 0).all()
    # MXFP4's levels are up to a third apart, and K formats have no minimum above 0.
    tolerance = {"MXFP4": 0.3, "Q4_0": 0.13, "Q4_1": 0.04, "Q4_K": 0.13, "Q5_0": 0.07, "Q5_1": 0.02, "Q5_K": 0.07}
    assert values == pytest.approx(matrix, rel=tolerance.get(kind, 0.04), abs=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_values_that_do_not_fit_are_errors(kind: str) -> None:
    matrix = normal(4, 512)
    values = [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "too large")]
    for value, message in [*values, (9e6, "too large")] if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0") else values:
        matrix[3, 300] = value
        with pytest.raises(ValueError, match=message):
            quantize(matrix, kind)
