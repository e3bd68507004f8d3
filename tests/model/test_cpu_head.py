"""The head's kernel gives the bits of log-probs from logits, without storing logits; see also
`tests/compiled/test_logprobs.py`."""

import operator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import cpu
from model.token_logprobs import NO_ID, TokenLogprobs
from tests.support.packed import pack

# K and V: less than a block, parts of blocks and panels, several panels.
SIZES = [(2, 5), (64, 32), (65, 1000), (96, 1024), (96, 1025), (128, 5000)]

pytestmark = pytest.mark.usefixtures("kernels")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def ids_of(rows: int, vocab: int, named: int = 3) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(rows)
    requested_ids = random.integers(0, vocab, (rows, named)).astype(np.int32)
    requested_ids[::2, 1:] = NO_ID
    return jnp.asarray(random.integers(0, vocab, rows), jnp.int32), jnp.asarray(requested_ids)


def check_equal(ours: TokenLogprobs, expected: TokenLogprobs) -> None:
    for name in TokenLogprobs.__slots__:
        assert np.asarray(getattr(ours, name)).tobytes() == np.asarray(getattr(expected, name)).tobytes(), name


@pytest.mark.parametrize(("width", "vocab"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 13, 64])
def test_score_has_the_bits_of_token_logprobs(rows: int, width: int, vocab: int) -> None:
    hidden, weight = normal(0, rows, width), pack(normal(1, vocab, width))
    ids, named = ids_of(rows, vocab)
    live, k = jnp.int32(rows), min(20, vocab)
    expected = cpu.token_logprobs(cpu.linear(hidden, weight), ids, named, live, k=k)
    check_equal(cpu.score(hidden, weight, ids, named, live, k=k), expected)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_score_with_a_cap_equals_soft_cap(rows: int) -> None:
    hidden, weight = normal(0, rows, 96), pack(normal(1, 2100, 96))
    ids, named = ids_of(rows, 2100)
    live = jnp.int32(rows)
    logits = cpu.soft_cap(cpu.linear(hidden, weight, live=live), live, cap=2.0)
    expected = cpu.token_logprobs(logits, ids, named, live, k=20)
    result = cpu.score(hidden, weight, ids, named, live, k=20, cap=2.0)
    check_equal(result, expected)
    uncapped = cpu.score(hidden, weight, ids, named, live, k=20)
    assert not np.array_equal(np.asarray(result.logprob), np.asarray(uncapped.logprob))


def test_score_has_the_same_bits_in_every_batch() -> None:
    hidden, weight = normal(2, 64, 96), pack(normal(3, 5000, 96))
    ids, named = ids_of(64, 5000)
    full = cpu.score(hidden, weight, ids, named, jnp.int32(64), k=20)
    for m in (1, 5, 12, 13, 40):
        for rows in (slice(0, m), slice(64 - m, 64)):
            some = cpu.score(hidden[rows], weight, ids[rows], named[rows], jnp.int32(m), k=20)
            check_equal(some, jax.tree.map(operator.itemgetter(rows), full))


def test_top_ids_of_equal_logits_ascend_on_many_threads() -> None:
    """Most columns are equal, so that every panel of every thread has k candidates."""
    vocab = 20_000
    column = np.where(np.arange(vocab)[:, None] % 7 == 3, 1.0, 0.5)
    weight = pack(jnp.asarray(np.repeat(column, 8, axis=1), jnp.bfloat16))
    ids, named = jnp.asarray([19_995, 3], jnp.int32), jnp.full((2, 1), NO_ID, jnp.int32)
    for _ in range(20):
        result = cpu.score(jnp.ones((2, 8), jnp.bfloat16), weight, ids, named, jnp.int32(2), k=30)
        np.testing.assert_array_equal(result.top_ids, np.broadcast_to(3 + 7 * np.arange(30), (2, 30)))
        equal = np.arange(vocab) % 7 == 3
        assert result.rank.tolist() == [1 + equal[:19_995].sum(), 1]


@pytest.mark.parametrize("live", [-1, 0, 1, 7, 12, 13])
def test_padding_rows_are_zeros_and_change_no_other(live: int) -> None:
    hidden, weight = normal(4, 12, 64), pack(normal(5, 3000, 64))
    ids, named = ids_of(12, 3000)
    full = cpu.score(hidden, weight, ids, named, jnp.int32(12), k=5)
    count = min(max(live, 0), 12)
    torn = hidden.at[count:].set(jnp.nan)
    some = cpu.score(torn, weight, ids, named, jnp.int32(live), k=5)
    for mine, all_ in zip(jax.tree.leaves(some), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(mine[:count], all_[:count])
        assert not np.asarray(mine[count:]).any()


@pytest.mark.parametrize("place", [0, 1023, 1024, 2999])
def test_token_logprobs_propagate_nan(place: int) -> None:
    logits = np.full((1, 3000), -np.inf, np.float32)
    logits[0, [5, 2000]] = 1.0
    logits[0, place] = np.nan
    ids, named = jnp.asarray([5], jnp.int32), jnp.full((1, 1), NO_ID, jnp.int32)
    result = cpu.token_logprobs(jnp.asarray(logits), ids, named, jnp.int32(1), k=4)
    assert np.isnan(result.logprob).all()
    assert np.isnan(result.top_logprobs).all()


def test_token_logprobs_of_a_row_of_nan() -> None:
    ids, named = jnp.asarray([5], jnp.int32), jnp.full((1, 1), NO_ID, jnp.int32)
    result = cpu.token_logprobs(jnp.full((1, 3000), jnp.nan), ids, named, jnp.int32(1), k=4)
    assert np.isnan(result.logprob).all()
    assert np.isnan(result.top_logprobs).all()
    assert not np.asarray(result.top_ids).any()


def test_token_logprobs_in_many_concurrent_calls() -> None:
    hidden, weight = normal(6, 12, 64), pack(normal(7, 6000, 64))
    ids, named = ids_of(12, 6000)

    @jax.jit
    def calls(hidden: jax.Array) -> list[TokenLogprobs]:
        return [cpu.score(hidden + i, weight, ids, named, jnp.int32(12), k=20) for i in range(8)]

    first = calls(hidden)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: calls(hidden), range(20)):
            for mine, expected in zip(result, first, strict=True):
                check_equal(mine, expected)


def test_score_rejects_another_dtype_or_width() -> None:
    weight = pack(normal(8, 40, 8))
    ids, named = ids_of(1, 40)
    with pytest.raises(TypeError, match="x is float16, the weight BF16"):
        cpu.score(jnp.zeros((1, 8), jnp.float16), weight, ids, named, jnp.int32(1), k=1)
    with pytest.raises(ValueError, match=r"\(1, 9\), not \[M, 8\]"):
        cpu.score(jnp.zeros((1, 9), jnp.bfloat16), weight, ids, named, jnp.int32(1), k=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="top k of V at most"):
        jax.block_until_ready(cpu.score(jnp.zeros((1, 8), jnp.bfloat16), weight, ids, named, jnp.int32(1), k=41))
