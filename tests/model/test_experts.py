"""Mixtures of experts: the router's choice, products by expert, and the independence of a token from its company."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from safetensors.numpy import load_file, save_file

from model.config import Experts, ModelConfig
from model.config_hf import config_from_hf
from model.experts import Routes, combine, expert_matmul, route
from model.kernels import cpu
from model.kernels.dispatch import Kernels, load_kernels
from model.kv_cache import PAGE_SIZE, CacheLayout
from model.layers import ExpertMLP
from model.packed import PackedWeight
from model.sharding import TensorParallel
from model.transformer import BoundModel
from model.weights.checkpoint import ModelLoadError
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import check_headers, open_checkpoint
from tests.support.packed import random_weight
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

COUNT, N = 5, 64
TOKENS = 40
CONFIG: dict[str, Any] = tiny_configs()["qwen3moe"] | {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 6,
    "mlp_only_layers": [],
    "num_hidden_layers": 1,
}


def normal(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def part_of(weight: PackedWeight, expert: int) -> PackedWeight:
    blocks = slice(expert * N // 32, (expert + 1) * N // 32)
    return PackedWeight(weight.words[blocks], weight.scales[blocks], weight.format, N, weight.k)


@pytest.fixture(params=["kernels", "xla"])
def either(request: pytest.FixtureRequest) -> Kernels:
    return Kernels() if request.param == "xla" else Kernels(request.getfixturevalue("kernels"))


def routed(logits: Array, live: int, experts: Experts, kernels: Kernels) -> Routes:
    return route(logits, jnp.int32(live), experts, kernels)


def test_route_chooses_the_lower_of_equal_experts(either: Kernels) -> None:
    logits = jnp.array([[0.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    routes = routed(logits, 2, Experts(5, 3, 8, normalized=True), either)
    assert routes.ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    chosen = np.exp([2.0, 2.0, 1.0])
    np.testing.assert_allclose(routes.weights, [chosen / chosen.sum(), [1 / 3] * 3], rtol=1e-6)
    routes = routed(logits, 2, Experts(5, 3, 8, normalized=False), either)
    np.testing.assert_allclose(routes.weights, [chosen / np.exp(logits[0]).sum(), [0.2] * 3], rtol=1e-6)


def test_weights_of_logits_that_are_no_numbers_are_none(either: Kernels) -> None:
    logits = jnp.array([[0.0, jnp.nan, 1.0, 2.0], [0.0, -jnp.inf, -jnp.inf, 2.0]])
    routes = routed(logits, 2, Experts(4, 3, 8, normalized=False), either)
    assert np.isnan(routes.weights[0]).all()
    assert len(set(routes.ids[1].tolist())) == 3
    assert routes.weights[1, 2] == 0


ROUTERS = {
    "normalized": Experts(40, 6, 8, normalized=True),
    "softmax": Experts(40, 6, 8, normalized=False),
    "groups": Experts(40, 6, 8, normalized=False, groups=5, open_groups=2, scale=3.5),
    "sigmoid": Experts(40, 6, 8, normalized=True, scoring="sigmoid", groups=8, open_groups=3, scale=2.5),
    "plain sigmoid": Experts(40, 6, 8, normalized=False, scoring="sigmoid"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_route_follows_its_definition(either: Kernels, name: str) -> None:
    """The weights of the papers, in float64; of equal experts and groups the lower is chosen."""
    experts, live = ROUTERS[name], 290
    logits, bias = jnp.round(4 * normal(300, 40)) / 2, jnp.round(normal(40, seed=1)) / 2  # many are equal
    routes = route(logits, jnp.int32(live), experts, either, bias)
    for token in range(0, live, 7):
        x = np.asarray(logits[token], np.float64)
        sigmoids = 1 / (1 + np.exp(-x))
        scores, keys_of_all = (
            (sigmoids, sigmoids + bias) if experts.scoring == "sigmoid" else (np.exp(x) / np.exp(x).sum(), x)
        )
        keys = np.array(keys_of_all, np.float32).reshape(experts.groups, -1)
        best = np.sort(keys, axis=1)[:, ::-1]
        values = best[:, :2].sum(axis=1) if experts.scoring == "sigmoid" else best[:, 0]
        keys[np.argsort(-values, kind="stable")[experts.open_groups :]] = -np.inf
        ids = np.argsort(-keys.reshape(-1), kind="stable")[: experts.per_token]
        weights = scores[ids] / (scores[ids].sum() if experts.normalized else 1) * experts.scale
        assert routes.ids[token].tolist() == ids.tolist()
        np.testing.assert_allclose(routes.weights[token], weights, rtol=2e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_kernel_and_xla_choose_the_same_experts(kernels: cpu.CpuKernels, name: str) -> None:
    logits = jnp.round(4 * normal(300, 40))  # many are equal
    ours, reference = (routed(logits, 290, ROUTERS[name], each) for each in (Kernels(kernels), Kernels()))
    assert (ours.ids == reference.ids)[:290].all()
    np.testing.assert_allclose(ours.weights[:290], reference.weights[:290], rtol=2e-6)
    assert (ours.starts == reference.starts).all()
    assert (ours.places == reference.places).all()
    assert (ours.order == reference.order).all()


@pytest.mark.parametrize(
    "experts",
    [
        Experts(6, 3, 8, normalized=True),
        Experts(6, 3, 8, normalized=False),
        Experts(64, 8, 8, normalized=False),
        Experts(64, 8, 8, normalized=True, scoring="sigmoid", groups=4, open_groups=2),
    ],
)
def test_route_gives_a_token_the_same_bits_in_any_company(either: Kernels, experts: Experts) -> None:
    run = jax.jit(partial(routed, experts=experts, kernels=either))
    logits = 3 * normal(256, experts.count)
    full = run(logits, 256).weights
    for size in (1, 7, 80):
        for start in range(0, 256 - size, 59):
            np.testing.assert_array_equal(run(logits[start : start + size], size).weights, full[start : start + size])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_weights_of_one_logit_that_is_no_number_are_none(either: Kernels, scoring: Any) -> None:
    experts = Experts(6, 2, 8, normalized=True, scoring=scoring, groups=3, open_groups=2)
    routes = routed(jnp.array([[0.0, jnp.nan, 1.0, 2.0, 5.0, 4.0]] * 2).at[1, 1].set(0.0), 2, experts, either)
    assert np.isnan(routes.weights[0]).all()
    assert np.isfinite(routes.weights[1]).all()


def test_routes_are_sorted_by_expert_with_padding_last(either: Kernels) -> None:
    logits = jnp.array([[0.0, 8, 0, 9, 0], [9, 8, 0, 0, 0], [0, 0, 0, 9, 8], [0, 0, 9, 8, 0]])
    routes = routed(logits, 3, Experts(5, 2, 8, normalized=True), either)
    assert routes.starts.tolist() == [0, 1, 3, 3, 5, 6]
    assert routes.order.tolist() == [2, 1, 3, 0, 4, 5, 6, 7]
    sorted_rows = jnp.arange(8, dtype=jnp.float32)[routes.order][:, None]
    expected = [[2 * m * share + (2 * m + 1) * (1 - share)] for m, share in enumerate([1 / (1 + np.exp(-1))] * 3)]
    np.testing.assert_allclose(combine(sorted_rows, routes, jnp.int32(3), either)[:3], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("F32", "float32"), ("BF16", "bfloat16"), ("Q4_0", "float32"), ("Q6_K", "float32")]
)
def test_expert_products_have_the_bits_of_linear(kernels: cpu.CpuKernels, name: str, dtype: str) -> None:
    """However many rows an expert has; the weight of one without rows is not read."""
    del kernels
    k = 256 if name == "Q6_K" else 96
    weight, _ = random_weight(name, COUNT * N, k)
    x = normal(60, k).astype(dtype)
    starts = [0, 1, 1, 4, 21, 55]  # the second has none; five rows are padding
    unused = jnp.asarray(weight.words).at[N // 32 : 2 * N // 32].set(0x7FC07FC0)  # NaN in the formats of floats
    weight = PackedWeight(unused, weight.scales, weight.format, weight.n, k)
    y = np.asarray(cpu.expert_linear(x, weight, jnp.array(starts, jnp.int32)))
    for expert in range(COUNT):
        rows = slice(starts[expert], starts[expert + 1])
        if rows.stop > rows.start:
            np.testing.assert_array_equal(y[rows], np.asarray(cpu.linear(x[rows], part_of(weight, expert))))
    assert not y[55:].any()


def test_expert_products_check_their_arguments(kernels: cpu.CpuKernels) -> None:
    del kernels
    weight, _ = random_weight("F32", COUNT * N, 96)
    with pytest.raises(ValueError, match="has shape"):
        cpu.expert_linear(normal(3, 64), weight, jnp.zeros(COUNT + 1, jnp.int32))
    for starts in ([0, 2, 1, 3, 3, 3], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 4]):
        with pytest.raises(Exception, match="starts"):
            jax.block_until_ready(cpu.expert_linear(normal(3, 96), weight, jnp.array(starts, jnp.int32)))


@pytest.mark.parametrize("name", ["array", "F32", "Q4_0"])
def test_products_without_kernels_are_those_of_each_expert(name: str) -> None:
    packed, values = random_weight("F32" if name == "array" else name, COUNT * N, 96)
    weight = jnp.asarray(values) if name == "array" else packed
    x = normal(70, 96)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, COUNT - 1, (70, 1)))  # the last has no rows
    routes = routed(100 * jax.nn.one_hot(ids[:, 0], COUNT), 66, Experts(COUNT, 1, N, normalized=True), Kernels())
    y = expert_matmul(x[routes.order], weight, routes, Kernels())
    for place, row in enumerate(routes.order.tolist()[:66]):
        expected = values.reshape(COUNT, N, 96)[int(ids[row, 0])].astype(np.float64) @ np.asarray(x)[row]
        np.testing.assert_allclose(y[place], expected, rtol=0, atol=2e-4)


def model_of(folder: Path, quantization: str, dtype: str, kernels: Kernels) -> BoundModel:
    with closing(open_checkpoint(ModelSource("m", folder))) as checkpoint:
        return load_model(checkpoint, dtype, quantization=quantization, kernels=kernels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_checkpoint(path, CONFIG, random_weights(CONFIG, 1))
    return path


@pytest.mark.parametrize(
    ("quantization", "dtype", "has_kernels"),
    [("auto", "float32", True), ("auto", "bfloat16", True), ("Q4_K", "float32", True), ("none", "float32", False)],
)
def test_a_token_has_the_same_bits_in_any_company(
    folder: Path, quantization: str, dtype: str, has_kernels: bool
) -> None:
    model = model_of(folder, quantization, dtype, load_kernels() if has_kernels else Kernels())

    @jax.jit
    def run(leaves: tuple[Array, ...], x: Array, live: Array) -> Array:
        mlp = model.merge(leaves).layers[0].mlp
        assert isinstance(mlp, ExpertMLP)
        return mlp(x[None], live)[0][0]

    x = normal(TOKENS, 256)
    full = np.asarray(run(model.leaves, x, jnp.int32(TOKENS)))
    assert np.isfinite(full).all()
    for size in (1, 5, 16):
        for start in (0, 7, 24):
            part = run(model.leaves, x[start : start + size], jnp.int32(size))
            np.testing.assert_array_equal(np.asarray(part), full[start : start + size], err_msg=f"{size} from {start}")
    padded = jnp.concatenate([x[3:10], jnp.full((9, 256), jnp.nan)])
    np.testing.assert_array_equal(np.asarray(run(model.leaves, padded, jnp.int32(7)))[:7], full[3:10])


@pytest.mark.parametrize(("count", "dtype", "size"), [(8, "uint8", 1), (256, "uint8", 1), (257, "int16", 2)])
def test_pages_have_the_ids_of_experts(count: int, dtype: str, size: int) -> None:
    config = config_from_hf(CONFIG | {"num_experts": count})
    assert config.experts is not None

    def layout(config: ModelConfig) -> CacheLayout:
        return CacheLayout(TensorParallel(config, 2), jnp.dtype("float32"), jnp.dtype("float32"))

    experts, dense = layout(config), layout(replace(config, experts=None))
    pages = experts.shape(9).experts
    assert (pages.shape, pages.dtype) == ((9, PAGE_SIZE, config.num_layers, config.experts.per_token), dtype)
    assert dense.shape(9).experts is None
    ids = PAGE_SIZE * config.num_layers * config.experts.per_token
    assert experts.bytes_per_page - dense.bytes_per_page == size * ids


def test_missing_experts_and_another_router_are_listed_together(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, 1)
    weights["model.layers.0.mlp.gate.weight"] = weights["model.layers.0.mlp.gate.weight"][:5]
    for name in ("gate_proj", "up_proj", "down_proj"):
        del weights[f"model.layers.0.mlp.experts.4.{name}.weight"]
    weights["model.layers.0.mlp.experts.6.up_proj.weight"] = np.zeros((256, 256), np.float32)
    write_checkpoint(tmp_path, CONFIG, weights)
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint, pytest.raises(ModelLoadError) as caught:
        check_headers(checkpoint)
    first, *problems = str(caught.value).split("\n")
    assert first.endswith("5 problems with the weights")
    assert [line.strip() for line in problems] == [
        "model.layers.0.mlp.gate.weight: has shape [5, 256], must be [6, 256]",
        *(f"model.layers.0.mlp.experts.4.{name}_proj.weight: missing" for name in ("gate", "up", "down")),
        "model.layers.0.mlp.experts.6.up_proj.weight: unexpected",
    ]


def test_a_value_of_an_expert_that_is_not_finite_is_refused(tmp_path: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[name][3, 5] = np.inf
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"{name}: holds values that are not finite"):
        model_of(tmp_path, "auto", "float32", load_kernels())
