"""Quantized safetensors: exact values in packed form, columns in another order, and what is refused."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from compiled.shapes import Buckets
from model.config import ConfigError
from model.formats import FORMATS
from model.kernels.dispatch import Kernels, load_kernels
from model.linear import matmul, take_rows
from model.packed import StackedWeight
from model.weights import loader
from model.weights.checkpoint import ModelLoadError, TensorInfo
from model.weights.hf_packing import quantized_tensors
from model.weights.hf_quantization import quantization_of
from model.weights.rows import Arena, BlockRows, Rows
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, check_headers, load_weights, open_checkpoint
from serve.engine.request import PromptScoring, SamplingParams
from tests.support.in_process import run
from tests.support.packed import values_of
from tests.support.quantized_tensors import Layout, awq, fp8, gptq, int8, packed, write_quantized
from tests.support.runners import make_runner
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint
from tests.support.tiny_checkpoints import BF16, F32, TinyModel

BUCKETS = Buckets(decode_rows=(1,), prefill_chunks=(16,), score_rows=16, pages_per_row=2)
EXPERTS: dict[str, Any] = tiny_configs()["qwen3moe"] | {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [],
    "num_hidden_layers": 1,
}
IN_ORDER = gptq(is_ordered=True)
LAYOUTS = {
    "gptq": gptq(),
    "gptq of 64": gptq(64),
    "gptq of 128": gptq(128),
    "gptq of columns": gptq(-1),
    "gptq v2": gptq(version=2),
    "gptq, bfloat16": gptq(dtype="bfloat16"),
    "gptq, 8 bits": gptq(bits=8),
    "gptq, 8 bits of 128": gptq(128, bits=8),
    "gptq in order": IN_ORDER,
    "awq": awq(),
    "awq of 64": awq(64),
    "awq of 128": awq(128),
    "packed": packed(),
    "packed of 64": packed(64),
    "packed of 128": packed(128),
    "packed of rows": packed(-1),
    "packed with zero points": packed(has_zeros=True),
    "packed in order": packed(is_ordered=True),
    "packed, 8 bits": packed(bits=8),
    "packed, 8 bits with zero points": packed(128, bits=8, has_zeros=True),
    "int8": int8(),
    "int8 with zero points": int8(has_zeros=True),
    "int8, one scale": int8("tensor"),
    "int8, one scale and zero point": int8("tensor", has_zeros=True),
    "fp8 of blocks": fp8("block"),
    "fp8 of blocks, bfloat16": fp8("block", dtype=BF16),
    "fp8, one scale": fp8("tensor"),
    "compressed fp8 of rows": fp8("row", is_ct=True, dtype=BF16),
    "compressed fp8 of blocks": fp8("block", is_ct=True),
    "compressed fp8, one scale": fp8("tensor", is_ct=True),
}
UP = "model.layers.1.mlp.up_proj"
NOT_FINITE = "holds scales that are not finite, or values too large for [A-Z0-9_]+"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
QKV = "layers.0.attention.qkv.weight"


def load(path: Path, storage: Storage) -> Mapping[str, Any]:
    """Formats and values of all weights."""
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        return load_weights(checkpoint, storage, lambda _, rows: read(rows))


def read(rows: Rows | Sequence[BlockRows]) -> tuple[set[str], NDArray[Any]]:
    if isinstance(rows, Rows):
        return set(), rows.read()
    values = []
    for part in rows:
        with np.errstate(all="ignore"):  # the loader refuses what is not finite
            blocks = values_of(part.format.name, np.concatenate(list(part.runs)), part.shape[1])
        values.append(blocks if part.order is None else blocks[:, np.argsort(part.order)])
    return {part.format.name for part in rows}, np.concatenate(values)


def loaded(path: Path, name: str) -> Any:
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        return load_weights(
            checkpoint, Storage(F32), lambda path, rows: loader._put(rows, Arena(0)) if path == name else read(rows)
        )[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_those_of_the_definition_to_the_bit(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    tiny = write_quantized(tmp_path, layout)
    packed, plain = load(tmp_path, Storage(F32)), load(tmp_path, Storage(F32, "none"))
    for path, expected in tiny.expected().items():
        np.testing.assert_array_equal(packed[path][1], expected, err_msg=path)
        np.testing.assert_array_equal(plain[path][1], expected, err_msg=path)
        if ".attention." in path or ".mlp." in path:
            assert packed[path][0] == {layout.format}, path
    name = f"{UP}.weight"
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint:
        for start, stop in ((0, 1), (3, 5), (7, 17), (90, len(tiny.tensors[name]))):
            np.testing.assert_array_equal(checkpoint.read(name, start, stop), tiny.tensors[name][start:stop])


@pytest.mark.parametrize("form", ["kernels", "XLA"])
def test_products_and_rows_with_columns_in_another_order(tmp_path: Path, form: str) -> None:
    kernels = load_kernels() if form == "kernels" else Kernels()
    values = write_quantized(tmp_path, IN_ORDER).expected()[QKV]
    weight = loaded(tmp_path, QKV)
    assert isinstance(weight, StackedWeight)  # q, k and v have orders of their own
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, values.shape[1]), np.float32))
    np.testing.assert_allclose(matmul(x, weight, kernels), x @ values.T, atol=1e-5)
    ids = jnp.asarray([5, 0, 31])
    np.testing.assert_array_equal(take_rows(weight.parts[0], ids), values[np.asarray(ids)])


def test_columns_in_another_order_are_not_sharded_in_blocks(tmp_path: Path) -> None:
    write_quantized(tmp_path, IN_ORDER)
    assert load(tmp_path, Storage(F32, packs=True, stacks=False))[QKV][0] == {"F32"}


@pytest.mark.parametrize("layout", [int8(dtype=F32), packed(bits=4, dtype=F32), gptq(24)])
def test_what_no_block_holds_exactly_becomes_float32(tmp_path: Path, layout: Layout) -> None:
    """Scales of more than 11 bits, and groups of other sizes."""
    tiny = write_quantized(tmp_path, layout)
    for path, expected in tiny.expected().items():
        formats, values = load(tmp_path, Storage(F32, packs=True))[path]
        np.testing.assert_array_equal(values, expected, err_msg=path)
        assert formats <= {"F32", "BF16"}


def answer_of(path: Path) -> Any:
    request = {"mine": ([1, 5, 17, 40, 3, 9, 22], SamplingParams(8, temperature=0, prompt=PromptScoring()))}
    return run(make_runner(path, "float32", BUCKETS), request)["mine"]


@pytest.mark.parametrize("name", ["gptq in order", "fp8 of blocks"])
@pytest.mark.usefixtures("kernels")
def test_logprobs_are_those_of_dequantized_weights(tmp_path: Path, name: str) -> None:
    values = write_quantized(tmp_path / "packed", LAYOUTS[name])
    packed, plain = answer_of(tmp_path / "packed"), answer_of(values.write_hf(tmp_path / "plain"))
    assert packed.token_ids == plain.token_ids
    np.testing.assert_allclose(packed.prompt.logprob, plain.prompt.logprob, rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    assert np.ptp(plain.prompt.logprob) > 0.1


def refused(path: Path) -> list[str]:
    """The problems that the headers show."""
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint, pytest.raises(ModelLoadError) as caught:
        check_headers(checkpoint)
    return str(caught.value).splitlines()[1:]


def test_missing_and_misshapen_parts_are_listed(tmp_path: Path) -> None:
    layout = gptq()
    write_quantized(tmp_path / "a", layout, changes={f"{UP}.scales": np.zeros(0)})
    assert refused(tmp_path / "a") == [
        f"  {UP}.weight: missing",
        *sorted(f"  {UP}.{kind}: unexpected" for kind in ("qweight", "qzeros", "g_idx")),
    ]
    for change in (
        {f"{UP}.scales": np.zeros((3, 192), np.float16)},
        {f"{UP}.qzeros": np.zeros((4, 23), np.int32)},
        {f"{UP}.g_idx": np.full(128, 4, np.int32)},
        {f"{UP}.g_idx": np.zeros(127, np.int32)},
    ):
        write_quantized(tmp_path / "b", layout, changes=change)
        message = f"{UP}.weight: stored as gptq tensors whose shapes do not fit, which is not supported"
        assert refused(tmp_path / "b") == [f"  {message}"], change


def test_biases_of_zeros_are_ignored(tmp_path: Path) -> None:
    name, layout = f"{UP}.bias", gptq()
    write_quantized(tmp_path / "a", layout, changes={name: np.zeros(192, np.float16)})
    load(tmp_path / "a", Storage(F32))
    write_quantized(tmp_path / "b", layout, changes={name: np.ones(192, np.float16)})
    assert refused(tmp_path / "b") == [f"  {name}: unexpected"]


def test_damaged_values_are_refused(tmp_path: Path) -> None:
    for layout, change, problem in (
        (gptq(), {"scales": np.full((4, 192), np.nan, np.float16)}, NOT_FINITE),
        (awq(), {"scales": np.full((4, 192), np.inf, np.float16)}, NOT_FINITE),
        (gptq(), {"qzeros": np.full((4, 24), -1, np.int32)}, "holds a zero point that some libraries read as 16 .*"),
        (fp8("row", is_ct=True), {"weight": np.full((384, 256), 0x7F, np.uint8).view(E4M3)}, NOT_FINITE),
        (fp8("block"), {"weight_scale_inv": np.full((3, 2), 2.0**100, np.float32)}, NOT_FINITE),
        (int8(), {"weight_scale": np.full((96, 1), np.nan, np.float32)}, "holds values that are not finite"),
    ):
        write_quantized(tmp_path, layout, changes={f"{UP}.{kind}": values for kind, values in change.items()})
        with pytest.raises(ModelLoadError, match=f"  {UP}.weight: {problem}$"):
            load(tmp_path, Storage(F32))


@pytest.mark.parametrize("name", ["gptq of 128", "gptq in order", "fp8 of blocks"])
def test_experts_have_the_values_of_the_definition(tmp_path: Path, name: str) -> None:
    """In one format; as floats if their columns are in different orders."""
    tensors, values, layout = random_weights(EXPERTS, 1), random_weights(EXPERTS, 1), LAYOUTS[name]
    random = np.random.default_rng(2)
    for key in [key for key in tensors if ".experts." in key]:
        n, k = tensors.pop(key).shape
        parts, values[key] = layout.write(n, k, random)
        tensors |= {f"{key.removesuffix('weight')}{kind}": np.ascontiguousarray(part) for kind, part in parts.items()}
    for kind in ("plain", "coded"):
        (tmp_path / kind).mkdir()
    write_checkpoint(tmp_path / "plain", EXPERTS, values)
    write_checkpoint(tmp_path / "coded", EXPERTS | {"quantization_config": layout.config}, tensors)
    found, formats = load(tmp_path / "coded", Storage(F32, packs=True)), set[str]()
    for path, (_, expected) in load(tmp_path / "plain", Storage(F32)).items():
        np.testing.assert_array_equal(found[path][1], expected, err_msg=path)
        formats |= found[path][0]
    assert formats == ({"F32"} if name == "gptq in order" else {"F32", layout.format})


def test_mxfp4_of_experts() -> None:
    """Two codes per byte, the first in its low half; rows of all experts together, from any row on."""
    random, (experts, n, groups) = np.random.default_rng(1), (3, 5, 2)
    tensors = {"up_blocks": random.integers(0, 256, (experts, n, groups, 16), np.uint8)}
    tensors["up_scales"] = random.integers(100, 130, (experts, n, groups), np.uint8)
    stored = {f"mlp.{name}": TensorInfo(values.shape, "U8", False, 0) for name, values in tensors.items()}
    quantization = quantization_of({"quantization_config": {"quant_method": "mxfp4"}})
    assert quantization is not None
    found, parts = quantized_tensors(quantization, stored, lambda name, *index: tensors[name[4:]][index])
    assert parts == stored.keys()
    up = found["mlp.up"]
    assert up.info.shape == (experts, n, 32 * groups)
    assert up.info.nbytes == sum(values.nbytes for values in tensors.values())
    steps = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = np.stack([tensors["up_blocks"] & 15, tensors["up_blocks"] >> 4], axis=-1).reshape(experts, n, groups, 32)
    values = steps[codes] * np.exp2(tensors["up_scales"].astype(np.float32) - 127)[..., None]
    values = values.reshape(experts * n, -1)
    assert up.info.block_format == FORMATS["MXFP4"]
    for start, stop in ((0, 15), (2, 4), (5, 10), (7, 8), (3, 12)):
        np.testing.assert_array_equal(up.read(start, stop), values[start:stop])
        np.testing.assert_array_equal(values_of("MXFP4", up.read_blocks(start, stop), 64), values[start:stop])
    stored["mlp.up_scales"] = TensorInfo((experts, n, 3), "U8", False, 0)
    assert not quantized_tensors(quantization, stored, lambda name, *_: tensors[name])[0]["mlp.up"].info.supported


def settings(layout: Layout, **changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**layout.config, **changes}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": []}, None),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "quant_method 'hqq' is not supported"),
        ({"quantization_config": 3}, "quantization_config must be an object"),
        ({"quantization_config": {"bits": 4}}, "quant_method None is not supported; known: awq, compressed-tensors"),
        *(
            ({"quantization_config": {"quant_method": name}}, f"quant_method '{name}' is not supported; known: awq")
            for name in ("torchao", "hqq", "modelopt", "aqlm", "quanto")
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes is not supported: load the original"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes is not supported"),
        (settings(gptq(), bits=3), "quantization_config.bits 3 is not supported; known: 4, 8"),
        (settings(gptq(), bits=True), "quantization_config.bits True is not supported"),
        (
            settings(gptq(), checkpoint_format="marlin"),
            "checkpoint_format 'marlin' is not supported; known: gptq, gptq_v2",
        ),
        (settings(gptq(), format="gptq_v2"), "checkpoint_format and format differ"),
        (settings(gptq(), group_size=0), "group_size must be positive or -1"),
        (settings(gptq(), group_size="32"), "group_size must be an integer"),
        (settings(gptq(), sym="yes"), "sym 'yes' is not supported"),
        (settings(gptq(), dynamic={"-:lm_head": {}}), "quantization_config.dynamic .* is not supported"),
        (settings(gptq(), rotation="hadamard"), "quantization_config.rotation 'hadamard' is not supported"),
        (settings(awq(), version="gemv"), "version 'gemv' is not supported; known: gemm"),
        (settings(awq(), zero_point=False), "zero_point False is not supported; known: True"),
        (settings(awq(), bits=8), "bits 8 is not supported; known: 4"),
        (settings(fp8("block"), fmt="e5m2"), "fmt 'e5m2' is not supported; known: e4m3"),
        (settings(fp8("block"), activation_scheme="none"), "activation_scheme 'none' is not supported"),
        (settings(fp8("block"), weight_block_size=[128]), "weight_block_size must be two positive integers"),
        (settings(fp8("block"), expert_dtype="fp4"), "quantization_config.expert_dtype 'fp4' is not supported"),
        (settings(packed(), format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        (settings(packed(), sparsity_config={"format": "sparse-24"}), "sparsity_config .* is not supported"),
        (settings(packed(), transform_config={"config_groups": {}}), "transform_config .* is not supported"),
        (settings(packed(), config_groups={}), "config_groups is missing or empty"),
        (settings(packed(), config_groups={"a": 3}), r"config_groups\.a must be an object"),
        (settings(packed(), config_groups={"a": {"weights": None}}), "config_groups quantizes no weights"),
        (
            settings(packed(), config_groups={"a": {"weights": {"num_bits": 4, "type": "float"}}}),
            "num_bits 4 of type float",
        ),
        (
            settings(packed(), config_groups={"a": {"weights": {"num_bits": 3}}}),
            r"config_groups\.a\.weights\.num_bits 3 is",
        ),
        (settings(packed(), config_groups={"a": {"weights": {"scale": 2}}}), r"a\.weights\.scale 2 is not supported"),
        (
            settings(packed(), config_groups={"a": {"weights": {"strategy": "tensor_group"}}}),
            "strategy 'tensor_group' is",
        ),
        ({"quantization_config": {"quant_method": "mxfp4", "rotation": 1}}, "quantization_config.rotation 1 is not"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(config: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert quantization_of(config) is None
        return
    with pytest.raises(ConfigError, match=message):
        quantization_of(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 128, "desc_act": True, "static_groups": False, "sym": True, "true_sequential": True}
        | {"model_name_or_path": None, "model_file_base_name": "model", "damp_percent": 0.1, "quant_method": "gptq"},
        {"batch_size": 1, "bits": 8, "block_name_to_quantize": None, "cache_block_outputs": True, "dataset": None}
        | {"exllama_config": {"version": 1}, "max_input_length": None, "model_seqlen": None, "tokenizer": None}
        | {"modules_in_block_to_quantize": None, "pad_token_id": None, "use_exllama": True, "quant_method": "gptq"},
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
        | {"weight_block_size": [128, 128]},
        {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"},
        {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "GEMM"}
        | {"zero_point": True},
    ],
)
def test_settings_of_published_models_are_accepted(settings: dict[str, Any]) -> None:
    """As in models of Qwen and of AutoGPTQ's and AutoAWQ's users."""
    assert quantization_of({"quantization_config": settings}) is not None


def test_a_model_without_settings_is_read_as_before(tmp_path: Path) -> None:
    path = TinyModel().write_hf(tmp_path)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert not checkpoint.quantizes_activations
