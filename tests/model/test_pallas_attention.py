"""The attention kernels of GPU and TPU against XLA's, run operation by operation on this CPU.

These tests compare the kernels' arithmetic and addressing; tools/portability/test_portability.py compiles them for
their chips. A chip's products of bfloat16 are exact in float32, as here, but it may add them in another order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas as pl

from model.attention import attend_in_xla
from model.kernels import ScoreOptions, gpu, tpu
from model.kv_cache import PAGE_SIZE, CacheLayout, JoinedPages, LayerPages, SplitPages, addresses_of
from model.sharding import TensorParallel
from tests.support.crowd import Crowd, Floats, compiled, crowd
from tools.portability.test_portability import qwen

# H, K, E: SmolLM2's and Qwen2.5's, Llama-3's, one of Phi-3's odd size, and one with a single key/value head.
HEADS = [(9, 3, 64), (14, 2, 64), (32, 8, 128), (6, 2, 96), (4, 1, 256)]
LENGTHS = (200, 64, 1, 130)
KINDS: list[dict[str, Any]] = [{}, {"window": 50}, {"cap": 5.0}]
CASES = [(heads, KINDS[0]) for heads in HEADS] + [(HEADS[0], kind) for kind in KINDS[1:]]
# Queries and weights keep 16 of float32's 24 digits on a GPU; on a TPU all, as far as this CPU can tell.
TOLERANCE = {"gpu": 1e-5, "tpu": 4e-6}
type Run = Callable[..., Floats]


def takes(platform: str, head_dim: int) -> bool:
    return gpu.supports_pages(head_dim, "bfloat16") if platform == "gpu" else tpu.supports_pages(head_dim, "bfloat16")


def joined(rows: Crowd) -> JoinedPages:
    """The same pages in a TPU's layout."""
    N, K, S, E = rows.keys.shape
    heads = jnp.stack([rows.keys, rows.values], axis=2).transpose(0, 3, 1, 2, 4).reshape(N, S, 2 * K, E)
    fill = ((0, 0), (0, 0), (0, 2 * (tpu.padded_kv_heads(K) - K)), (0, tpu.padded_head_dim(E) - E))
    return JoinedPages(jnp.pad(heads, fill), K)


def in_xla(rows: Crowd, queries: Floats, tables: Any, positions: Any, **kind: Any) -> Floats:
    form = compiled(attend_in_xla, options=ScoreOptions(queries.shape[-1] ** -0.5, **kind))
    return np.asarray(form(queries, SplitPages(rows.keys, rows.values), tables, positions))


def on_gpu(rows: Crowd, queries: Floats, tables: Any, positions: Any, **kind: Any) -> Floats:
    options = ScoreOptions(queries.shape[-1] ** -0.5, **kind)
    form = compiled(gpu.attend, optimized=False, options=options, interpret=True)
    return np.asarray(form(queries, rows.keys, rows.values, tables, positions))


def on_tpu(rows: Crowd, queries: Floats, tables: Any, positions: Any, **kind: Any) -> Floats:
    pages = joined(rows)
    options = ScoreOptions(queries.shape[-1] ** -0.5, **kind)
    form = compiled(tpu.attend, optimized=False, kv_heads=pages.kv_heads, options=options)
    return np.asarray(form(queries, pages.heads, tables, positions))


@pytest.fixture(params=["gpu", "tpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "tpu":  # JAX's kernel has no switch of its own; and its interpreter takes no plain numbers for indices
        monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
        monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    return name


@pytest.fixture
def run(platform: str) -> Run:
    return {"gpu": on_gpu, "tpu": on_tpu}[platform]


def last_tokens(rows: Crowd) -> tuple[Floats, Any]:
    """A decode step of all rows: queries [R, 1, H, E] and positions [R, 1]."""
    ends = np.array(rows.lengths, np.int32) - 1
    return rows.queries[np.arange(len(ends)), ends][:, None], ends[:, None]


@pytest.mark.parametrize(
    ("platform", "heads", "kind"),
    [(platform, heads, kind) for platform in TOLERANCE for heads, kind in CASES if takes(platform, heads[2])],
    indirect=["platform"],
)
def test_attend_decode_step_equals_xla(platform: str, run: Run, heads: Any, kind: Any) -> None:
    rows = crowd(heads, LENGTHS)
    queries, positions = last_tokens(rows)
    ours = run(rows, queries, rows.tables, positions, **kind)
    np.testing.assert_allclose(
        ours, in_xla(rows, queries, rows.tables, positions, **kind), rtol=0, atol=TOLERANCE[platform]
    )


@pytest.mark.parametrize(("heads", "kind"), [(HEADS[0], KINDS[1]), (HEADS[3], KINDS[0])])
def test_attend_chunk_in_the_middle_of_a_row_equals_xla(platform: str, run: Run, heads: Any, kind: Any) -> None:
    rows = crowd(heads, LENGTHS)
    positions = rows.positions(0, 70, 214)  # 14 of padding
    queries = np.pad(rows.queries[:1, 70:], ((0, 0), (0, 14), (0, 0), (0, 0)))
    ours = run(rows, queries, rows.tables[:1], positions, **kind)[0, :130]
    theirs = in_xla(rows, queries, rows.tables[:1], positions, **kind)[0, :130]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[platform])


@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 2, 128)])
def test_attend_has_the_same_bits_in_chunk_and_batch(run: Run, heads: Any) -> None:
    rows = crowd(heads, LENGTHS)
    queries, positions = last_tokens(rows)
    crowded = run(rows, queries, rows.tables, positions)
    alone = run(rows, queries[:1], rows.tables[:1], positions[:1])
    np.testing.assert_array_equal(crowded[0], alone[0])
    for start, end in ((136, 200), (199, 200)):
        chunk = run(rows, rows.queries[:1, start:end], rows.tables[:1], rows.positions(0, start, end))
        np.testing.assert_array_equal(chunk[0, 199 - start], alone[0, 0])


def test_attend_of_a_row_of_several_parts(run: Run, platform: str) -> None:
    """More pages than one part of a row has, or one block of keys."""
    rows = crowd((2, 1, 16), (1500,))
    queries, positions = last_tokens(rows)
    ours, theirs = (form(rows, queries, rows.tables, positions) for form in (run, in_xla))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[platform])


def test_attend_with_sinks_equals_xla_on_a_gpu() -> None:
    rows, sinks = crowd((6, 2, 16), (700,)), np.linspace(-3, 6, 6, dtype=np.float32)  # of more parts than one
    options = ScoreOptions(0.25, window=600)
    ours = compiled(gpu.attend, optimized=False, options=options, interpret=True)
    for start in (660, 699):
        arguments = (rows.queries[:, start:], rows.keys, rows.values, rows.tables, rows.positions(0, start, 700), sinks)
        xla = compiled(attend_in_xla, options=options)
        theirs = xla(arguments[0], SplitPages(rows.keys, rows.values), *arguments[3:])
        np.testing.assert_allclose(ours(*arguments), theirs, rtol=0, atol=TOLERANCE["gpu"])


def test_attend_with_padding_is_finite(run: Run) -> None:
    rows = crowd((9, 3, 64), LENGTHS)
    queries, positions = last_tokens(rows)
    positions = np.where(np.arange(4)[:, None] < 2, positions, -1)
    ours = run(rows, queries, rows.tables, positions)
    np.testing.assert_array_equal(ours[:2], run(rows, queries, rows.tables, last_tokens(rows)[1])[:2])
    assert np.isfinite(ours).all()


def test_attend_propagates_nan(run: Run) -> None:
    rows = crowd((2, 1, 16), (3,))
    queries, positions = last_tokens(rows)
    assert np.isnan(run(rows, queries * np.float32(np.nan), rows.tables, positions)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_attend_of_a_packed_prefill_equals_that_of_one_row(run: Run, kind: dict[str, Any]) -> None:
    """Rows of 16 tokens of two requests, the second with padding, and a row of padding."""
    rows = crowd((9, 3, 64), LENGTHS)
    queries, positions = (np.zeros((4, 16, *shape), dtype) for shape, dtype in (((9, 64), np.float32), ((), np.int32)))
    positions -= 1
    packed = [(0, 100, 116), (0, 116, 132), (3, 120, 127)]
    for i, (row, start, end) in enumerate(packed):
        queries[i, : end - start] = rows.queries[row, start:end]
        positions[i, : end - start] = np.arange(start, end)
    tables = rows.tables[[0, 0, 3, 1]]
    together = run(rows, queries, tables, positions, **kind)
    assert np.isfinite(together).all()
    for i, (row, start, end) in enumerate(packed):
        places = slice(start, start + 16)
        alone = run(rows, rows.queries[row : row + 1, places], rows.tables[[row]], positions[i : i + 1], **kind)
        np.testing.assert_array_equal(together[i, : end - start], alone[0, : end - start])


@pytest.mark.parametrize("heads", [(9, 3, 64), (14, 2, 64), (5, 5, 98)])
def test_joined_pages_equal_split_pages(heads: tuple[int, int, int]) -> None:
    rows = crowd(heads, (130,), dtype="float32")
    K, E = heads[1:]
    split, both = SplitPages(rows.keys, rows.values), joined(rows)
    addresses = addresses_of(jnp.array([[1, 2]]), jnp.array([[3, 127]]))
    keys, values = (jnp.asarray(np.random.default_rng(seed).normal(size=(1, 2, K, E)), jnp.float32) for seed in (5, 6))
    for before, after in ((split, both), (split.store(keys, values, addresses), both.store(keys, values, addresses))):
        for ours, theirs in zip(before.take(jnp.arange(4)), after.take(jnp.arange(4)), strict=True):
            np.testing.assert_array_equal(ours, theirs[..., :E])
            assert not theirs[..., E:].any()


@pytest.mark.parametrize("layout", ["split", "split in whole lanes", "joined"])
def test_attend_in_xla_reads_pages_of_every_layout(layout: str) -> None:
    rows = crowd((9, 3, 64), LENGTHS)
    queries, positions = last_tokens(rows)
    fill = ((0, 0),) * 3 + ((0, 64 if "lanes" in layout else 0),)
    split = SplitPages(jnp.pad(rows.keys, fill), jnp.pad(rows.values, fill))
    pages: LayerPages = joined(rows) if layout == "joined" else split
    ours = compiled(attend_in_xla, options=ScoreOptions(0.125))(queries, pages, rows.tables, positions)
    np.testing.assert_allclose(ours, in_xla(rows, queries, rows.tables, positions), rtol=0, atol=1e-6)


@pytest.fixture
def layouts() -> Callable[..., CacheLayout]:
    return lambda platform, kv_dtype, shards=1, hidden_dtype="bfloat16": CacheLayout(
        TensorParallel(qwen().config, shards), jnp.dtype(kv_dtype), jnp.dtype(hidden_dtype), platform
    )


def test_cache_layout_on_a_tpu_has_full_lanes_and_joined_pages(layouts: Callable[..., CacheLayout]) -> None:
    assert layouts("tpu", "bfloat16").shape(9).layers[0].heads.shape == (9, PAGE_SIZE, 4, 128)
    assert layouts("tpu", "bfloat16", 4).shape(9).layers[0].heads.shape == (9, PAGE_SIZE, 8, 128)
    assert layouts("tpu", "float32").shape(9).layers[0].keys.shape == (9, 2, PAGE_SIZE, 128)
    assert layouts("tpu", "float32", 4).shape(9).hidden.shape == (9, PAGE_SIZE, 4 * 256)
    for platform in ("gpu", "cpu"):
        assert layouts(platform, "bfloat16").shape(9).layers[0].keys.shape == (9, 2, PAGE_SIZE, 64)
        assert layouts(platform, "bfloat16", 4).shape(9).hidden.shape == (9, PAGE_SIZE, 4 * 224)


def test_takes_and_reads_on_a_tpu() -> None:
    assert tpu.supports_pages(128, "bfloat16")
    assert not tpu.supports_pages(128, "float32")
    assert not tpu.supports_pages(256, "bfloat16")  # Mosaic refuses them
    assert tpu.supports_tables((16, 2048))
    assert not tpu.supports_tables((128, 2048))  # they would fill all scalar memory


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_bytes_per_page_equal_its_arrays(
    layouts: Callable[..., CacheLayout], platform: str, shards: int, dtypes: tuple[str, str]
) -> None:
    layout = layouts(platform, dtypes[0], shards, dtypes[1])
    shape = layout.shape(7)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shape.layers)} == {dtypes[0]}
    assert shape.hidden.dtype == dtypes[1]
    one, two = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layout.shape(pages))) for pages in (7, 8)
    )
    assert two - one == shards * layout.bytes_per_page
