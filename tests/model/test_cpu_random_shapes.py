"""The kernels with random shapes; `make sanitize` runs these tests too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.formats import FORMATS
from model.kernels import cpu
from model.token_logprobs import NO_ID
from tests.model.test_cpu_attention import crowd
from tests.support.packed import CODED, limit, random_weight

SIZES = st.tuples(st.integers(1, 80), st.integers(1, 400), st.integers(1, 300))  # M, N, K
# Format of the weight and dtype of x.
WEIGHTS = st.sampled_from([("BF16", "bfloat16"), *((name, "float32") for name in FORMATS)])
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=60, deadline=None, derandomize=True)

pytestmark = pytest.mark.usefixtures("kernels")


@few
@given(size=SIZES, weights=WEIGHTS, seed=SEEDS)
def test_linear_of_random_shapes(size: tuple[int, int, int], weights: tuple[str, str], seed: int) -> None:
    (m, n, k), random = size, np.random.default_rng(seed)
    name, dtype = weights
    x = jnp.asarray(random.normal(size=(m, k)), dtype)
    weight, matrix = random_weight(name, n, k, seed % 1000)
    values = matrix.astype(np.float64)
    x64, y = np.asarray(x, np.float64), np.asarray(cpu.linear(x, weight))
    assert (np.abs(y - x64 @ values.T) <= limit(x, matrix, weight if name in CODED else None)).all()
    row = int(random.integers(m))
    assert np.asarray(cpu.linear(x[row : row + 1], weight)).tobytes() == y[row].tobytes()


@few
@given(size=SIZES, weights=WEIGHTS, k=st.integers(0, 20), named=st.integers(0, 5), seed=SEEDS)
def test_score_of_random_shapes(
    size: tuple[int, int, int], weights: tuple[str, str], k: int, named: int, seed: int
) -> None:
    (m, vocab, width), random = size, np.random.default_rng(seed)
    name, dtype = weights
    hidden = jnp.asarray(random.normal(size=(m, width)), dtype)
    weight, _ = random_weight(name, vocab, width, seed % 1000)
    ids = jnp.asarray(random.integers(0, vocab, m), jnp.int32)
    requested_ids = random.integers(0, vocab, (m, named)).astype(np.int32)
    requested_ids[random.random(m) < 0.5, named // 2 :] = NO_ID
    live, k = jnp.int32(random.integers(m + 1)), min(k, vocab)
    result = cpu.score(hidden, weight, ids, jnp.asarray(requested_ids), live, k=k)
    expected = cpu.token_logprobs(cpu.linear(hidden, weight), ids, jnp.asarray(requested_ids), live, k=k)
    for mine, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@few
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 9),
    half=st.integers(1, 66),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    window=st.integers(0, 130),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    seed=SEEDS,
)
def test_attend_of_random_shapes(
    kv_heads: int, group: int, half: int, lengths: list[int], window: int, dtype: str, seed: int
) -> None:
    rows = crowd((kv_heads * group, kv_heads, 2 * half), tuple(lengths), dtype, seed)
    row = seed % len(lengths)
    full = rows.full(row, window=window)
    np.testing.assert_allclose(full, rows.in_float64(row, window=window), rtol=0, atol=4e-6)
    cut = seed % lengths[row]
    tail = rows.chunk(row, cut, lengths[row], window=window)
    assert tail.tobytes() == full[cut:].tobytes()
