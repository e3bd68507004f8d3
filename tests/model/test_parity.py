"""Every sub-layer, and the network in every split into steps, against torch in float32 (see golden/)."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from model.attention import attend, rotary_angles
from model.kernels import ScoreOptions
from model.kernels.dispatch import load_kernels
from model.kv_cache import Addresses, PagedCache, SplitPages, addresses_of
from model.latent_attention import LatentAttention
from model.layers import Attention, ExpertMLP
from model.transformer import BoundModel, bind
from model.weights.source import resolve_model
from model.weights.weight_table import Storage, load_weights, open_checkpoint
from tests.support.tiny import (
    LATENT,
    TOKENS,
    newer_configs,
    random_tokens,
    random_weights,
    seed_of,
    tiny_configs,
    write_checkpoint,
)

type Result = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int16] | None]

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(tiny_configs())
TOLERANCE = 2e-5  # absolute; values have a standard deviation of about 1, so float32 rounds them by 1e-7
# Tokens of a step, few to save compilations. Prefill chunks end in padding, which must not change results.
SIZES = (1, 35, TOKENS + 3)
PAGES = 7  # the null page and two for each of three rows
SUB_LAYERS = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.q_rotated",
    "attention.k_rotated",
    "attention.heads",
    "attention",
    "mlp",
)
SORTED_ROUTERS = {"qwen3moe", "mixtral", "olmoe", "granitemoe", "gpt_oss"}  # transformers has the best expert first
BEFORE, AFTER = ("attention_norm", "mlp_norm"), ("attention_post_norm", "mlp_post_norm")


def names_of(case: str) -> list[str]:
    """Names of the outputs that a case's golden file must have."""
    kind = tiny_configs()[case]["model_type"]
    norms: tuple[str, ...] = (
        () if kind in ("olmo2", "olmo3", "exaone4") else BEFORE[:1] if kind == "cohere2" else BEFORE
    )
    norms += AFTER if kind in ("olmo2", "olmo3", "exaone4", "gemma2", "gemma3_text", "glm4") else ()
    sub_layers = SUB_LAYERS[-3:] if kind in LATENT else SUB_LAYERS
    layers = [f"layers.{i}.{name}" for i in range(2) for name in (*sub_layers, *norms)]
    return ["embed", *layers, "layers.0", "layers.1", "norm", "logits"]


@dataclass(frozen=True)
class Case:
    """One tiny model and torch's outputs of it."""

    name: str
    model: BoundModel
    golden: dict[str, NDArray[Any]]
    traced: dict[str, NDArray[np.float32]]  # name -> [T, n]: our sub-layers' outputs
    step: Callable[..., Any]  # jitted once for all ways
    logits: Callable[..., Array]
    results: "dict[str, Result]" = field(default_factory=dict)  # by way, of `result_of`


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(name: str, folder: Path) -> Case:
    """Write a tiny model into an empty folder and load it."""
    config = tiny_configs()[name]
    write_checkpoint(folder, config, random_weights(config, seed_of(name)))
    with closing(open_checkpoint(resolve_model(str(folder), None))) as checkpoint:
        weights = load_weights(
            checkpoint, Storage(np.dtype(np.float32), "none"), lambda _, rows: jnp.asarray(rows.read())
        )
        config_here = checkpoint.config.for_length(checkpoint.config.max_position_embeddings)
        model = bind(config_here, jnp.dtype(jnp.float32), weights, load_kernels())
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    traced = jax.jit(partial(trace, model))(model.leaves, jnp.asarray(golden["tokens"]))
    step = jax.jit(lambda leaves, *inputs: model.merge(leaves)(*inputs))
    logits = jax.jit(lambda leaves, x: model.merge(leaves).logits(x))
    return Case(name, model, golden, jax.tree.map(np.asarray, traced), step, logits)


def empty_cache(model: BoundModel) -> PagedCache:
    cache: PagedCache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.cache_layout.shape(PAGES))
    return cache


def trace(bound: BoundModel, leaves: tuple[Array, ...], tokens: Array) -> dict[str, Array]:
    """Run the sub-layers one by one: name -> output [T, n]."""
    model = bound.merge(leaves)
    positions, tables = jnp.arange(TOKENS)[None], jnp.array([[1, 2]])
    cache, addresses = empty_cache(bound), addresses_of(tables, positions)
    x = model.embed(tokens[None])
    values = {"embed": x}
    for i, layer in enumerate(model.layers):
        pages = cache.layers[i]
        angles = rotary_angles(positions, bound.config.head_dim, layer.attention.kind.rope)
        normed = x if layer.attention_norm is None else layer.attention_norm(x)
        if isinstance(layer.attention, LatentAttention):
            outputs = {"attention.heads": layer.attention.heads(normed, angles, pages, addresses)[0]}
        else:
            outputs = trace_attention(layer.attention, normed, angles, pages, addresses)
        outputs["attention_norm"] = normed
        outputs["attention"], _ = layer.attention(normed, angles, pages, addresses)
        y = outputs["attention"]
        if layer.attention_post_norm is not None:
            y = outputs["attention_post_norm"] = layer.attention_post_norm(y)
        y = x + y * bound.config.residual_scale
        outputs["mlp_norm"] = normed if layer.is_parallel else y if layer.mlp_norm is None else layer.mlp_norm(y)
        mlp, normed = layer.mlp, outputs["mlp_norm"]
        outputs["mlp"] = mlp(normed)[0] if isinstance(mlp, ExpertMLP) else mlp(normed)
        if layer.mlp_post_norm is not None:
            outputs["mlp_post_norm"] = layer.mlp_post_norm(outputs["mlp"])
        absent = () if layer.mlp_norm is not None else BEFORE[1:] if layer.is_parallel else BEFORE
        values |= {f"layers.{i}.{name}": value for name, value in outputs.items() if name not in absent}
        x, _, _ = layer(x, angles, pages, addresses)
        values[f"layers.{i}"] = x
    values["norm"] = model.norm(x)
    values["logits"] = model.logits(values["norm"][0])
    return {name: value.reshape(TOKENS, -1) for name, value in values.items()}


def trace_attention(
    attention: Attention, x: Array, angles: tuple[Array, Array], pages: SplitPages, addresses: Addresses
) -> dict[str, Array]:
    """The parts of attention up to its output map."""
    config, heads = attention.config, attention.heads(x)
    ends = (config.num_heads, config.num_heads + config.num_kv_heads)
    q, k, v = jnp.split(heads, ends, axis=2)
    options = ScoreOptions(config.attention_scale, attention.kind.window, config.attention_cap)
    q_rotated, k_rotated, _ = jnp.split(attention.rotated(heads, angles), ends, axis=2)
    if attention.kind.query_growth is not None:
        q_rotated *= attention.query_growth(addresses.positions)
    stored = pages.store(k_rotated, v, addresses)
    sinks = None if attention.sinks is None else attention.sinks.get_value()
    return {
        "attention.q": q,
        "attention.k": k,
        "attention.v": v,
        "attention.q_rotated": q_rotated,
        "attention.k_rotated": k_rotated,
        "attention.heads": attend(q_rotated, stored, addresses, attention.kernels, options, sinks),
    }


def test_sublayers_equal_the_golden_values(case: Case) -> None:
    for name in names_of(case.name):
        ours = case.traced[name][case.golden["positions"]]
        np.testing.assert_allclose(ours, case.golden[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_golden_values_are_all_read(case: Case) -> None:
    others = {"tokens", "positions", "token_logprobs", "token_ranks"}
    others |= {"experts"} if case.model.config.experts else set()
    assert case.golden.keys() == case.traced.keys() | others
    assert set(names_of(case.name)) == case.traced.keys()


def test_golden_tokens_follow_from_the_seed(case: Case) -> None:
    config = tiny_configs()[case.name]
    np.testing.assert_array_equal(random_tokens(config, seed_of(case.name)), case.golden["tokens"])


@dataclass(frozen=True)
class Way:
    """A split of a sequence into steps: tokens per step, and rows of the batch, of which the last is compared."""

    lengths: tuple[int, ...]
    rows: int = 1


WAYS = {
    "one_chunk": Way((TOKENS,)),
    "three_chunks": Way((32, 32, 6)),
    "decode_over_the_page_border": Way((61, *[1] * 9)),
    "decode_in_a_batch": Way((61, *[1] * 9), rows=3),
    "one_chunk_in_a_batch": Way((TOKENS,), rows=3),
}


# Attention and cache of the newer families are those of the others, which take all splits.
_NEWER_WAYS = ("one_chunk", "decode_over_the_page_border")
_OLDER_WAYS = ("three_chunks", "decode_in_a_batch", *_NEWER_WAYS)
# Families with arithmetic in XLA that the others do not have, which needs company, too.
_IN_COMPANY = {"apertus", "cohere2", "granite", "hunyuan", "ministral3", "stablelm"}


def ways_of(name: str) -> list[str]:
    ways = _NEWER_WAYS if name in newer_configs() else _OLDER_WAYS
    return [*ways, "one_chunk_in_a_batch"] if name in _IN_COMPANY else [*ways]


_CASE_WAYS = [(name, way) for name in CASES for way in ways_of(name)]


@pytest.mark.parametrize(("case", "way"), _CASE_WAYS, indirect=["case"])
def test_model_equals_the_golden_values(case: Case, way: str) -> None:
    hidden, logits, experts = result_of(case, way)
    golden, positions = case.golden, case.golden["positions"]
    np.testing.assert_allclose(hidden[positions], golden["norm"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits[positions], golden["logits"], rtol=0, atol=TOLERANCE)
    if experts is not None:
        np.testing.assert_array_equal(np.sort(experts), np.sort(golden["experts"]))
        if case.name in SORTED_ROUTERS:
            np.testing.assert_array_equal(experts, golden["experts"])
    own = np.take_along_axis(logits[:-1], golden["tokens"][1:, None], 1)
    logprobs = own[:, 0] - np.logaddexp.reduce(logits[:-1].astype(np.float64), axis=1)
    np.testing.assert_allclose(logprobs, golden["token_logprobs"], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(1 + (logits[:-1] > own).sum(1), golden["token_ranks"])


@pytest.mark.parametrize(("case", "way"), [pair for pair in _CASE_WAYS if pair[1] != "one_chunk"], indirect=["case"])
def test_a_token_has_the_same_bits_in_every_split(case: Case, way: str) -> None:
    for ours, alone in zip(result_of(case, way), result_of(case, "one_chunk"), strict=True):
        np.testing.assert_array_equal(ours, alone)


def result_of(case: Case, way: str) -> Result:
    """The result of `run`, which is kept."""
    if way not in case.results:
        case.results[way] = run(case, WAYS[way])
    return case.results[way]


def run(case: Case, way: Way) -> Result:
    """Final hidden states [T, D], logits [T, V] and experts [T, L, k] of the sequence, beside shifted copies of it."""
    model, tokens = case.model, case.golden["tokens"]
    rows = np.stack([np.roll(tokens, way.rows - 1 - row) for row in range(way.rows)])
    tables = jnp.array([[2 * row + 2, 2 * row + 1] for row in range(way.rows)])
    cache, start = empty_cache(model), 0
    parts = []
    for length in way.lengths:
        size = next(size for size in SIZES if length < size or length == size == 1)
        padding = ((0, 0), (0, size - length))
        new = np.pad(rows[:, start : start + length], padding)
        positions = np.tile(np.arange(start, start + length, dtype=np.int32), (way.rows, 1))
        positions = np.pad(positions, padding, constant_values=-1)
        hidden, cache = case.step(model.leaves, new, positions, tables, cache)
        parts.append(np.asarray(hidden)[-1, :length])
        start += length
    full = np.concatenate(parts)
    table = np.asarray(tables[-1])
    cached = np.asarray(cache.hidden)[table].reshape(-1, full.shape[1])[:start]
    np.testing.assert_array_equal(cached, full)  # input of the head
    experts = None
    if cache.experts is not None:
        experts = np.asarray(cache.experts)[table].astype(np.int16)
        experts = experts.reshape(-1, *experts.shape[2:])[:start]
    return full, np.asarray(case.logits(model.leaves, jnp.asarray(full))), experts
