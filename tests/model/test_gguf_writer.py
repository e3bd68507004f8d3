"""Files written by write_gguf: the network and weights of the source, formats by tensor, metadata, errors."""

import math
import struct
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGUFValueType, LlamaFileType
from numpy.typing import NDArray

from model.config import LayerKind, ModelConfig
from model.importance import Importance
from model.rope import Rope
from model.weights.checkpoint import Checkpoint, ModelLoadError
from model.weights.gguf import GgufCheckpoint
from model.weights.gguf_writer import (
    TYPES,
    OutputTensor,
    QuantizedType,
    format_of,
    output_of_folder,
    output_of_gguf,
    write_gguf,
)
from model.weights.quantize import quantize
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, load_weights, open_checkpoint
from tests.model.test_weights_gguf import split
from tests.support.tiny import latent_configs, random_weights, tiny_configs, write_checkpoint
from tests.support.tiny_checkpoints import TinyModel

PLAIN = QuantizedType("F32", "F32", "F32", LlamaFileType.ALL_F32)
# What GGUF files do not say: SmolLM3's and Gemma's kinds of layers have a period.
CHANGES: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},
    "gemma3": {
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "gemma2": {"query_pre_attn_scalar": 16},
}


def weights_of(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    return load_weights(checkpoint, Storage(np.dtype(np.float32), "none"), lambda _, rows: rows.read())


EXPERTS = {"qwen3moe", "mixtral", "olmoe", "granitemoe", "gpt_oss", *latent_configs()}
UNWRITABLE = {"apertus", "cohere2", "exaone4", "granite", "helium", "ministral3", "olmo3", "stablelm"}


def opened(path: Path) -> closing[Checkpoint]:
    return closing(open_checkpoint(ModelSource("m", path)))


def hf_folder(folder: Path, hf: dict[str, Any]) -> Path:
    folder.mkdir()
    write_checkpoint(folder, hf, random_weights(hf, 1))
    return folder


@pytest.mark.parametrize("case", sorted(tiny_configs().keys() - EXPERTS - UNWRITABLE))
def test_a_folder_becomes_the_same_network(tmp_path: Path, case: str) -> None:
    check_folder(tmp_path, case, tiny_configs()[case] | CHANGES.get(case, {}))


@pytest.mark.parametrize("case", ["mistral", "qwen3", "smollm3"])
@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.0}, {"attention_factor": 1.3, "factor": 2.2}])
def test_yarn_becomes_keys(tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    hf = tiny_configs()[case] | CHANGES.get(case, {}) | {"rope_scaling": yarn | changes}
    metadata = check_folder(tmp_path, case, hf)
    rope = {name.split(".rope.scaling.")[1]: value for name, value in metadata.items() if ".rope.scaling." in name}
    assert rope.pop("type") == "yarn"
    factor = changes.get("factor", 4.0)
    scale = {"attn_factor": changes["attention_factor"] / (0.1 * math.log(factor) + 1)} if changes else {}
    assert rope == pytest.approx({"factor": factor, "original_context_length": 64, **scale})


def check_folder(tmp_path: Path, case: str, hf: dict[str, Any]) -> dict[str, Any]:
    """Write a folder as GGUF, compare network and weights, and return the file's metadata."""
    folder, path = hf_folder(tmp_path / "hf", hf), tmp_path / "m.gguf"
    with opened(folder) as checkpoint:
        expected, config = weights_of(checkpoint), checkpoint.config
        write_gguf(path, output_of_folder(checkpoint, {}), PLAIN, {})
    with opened(path) as checkpoint:
        assert checkpoint.config.family == {"mistral": "llama"}.get(case, config.family)
        assert sizes(checkpoint.config) == sizes(config)
        for name, values in weights_of(checkpoint).items():
            np.testing.assert_array_equal(values, expected.pop(name), err_msg=name)
        assert isinstance(checkpoint, GgufCheckpoint)
    assert not expected
    return checkpoint.metadata


def sizes(config: ModelConfig) -> ModelConfig:
    """The network without its family's name; rotary numbers with six digits, since GGUF stores them as float32."""
    layers = []
    for kind in config.layers:
        rope = kind.rope
        if rope is not None:
            short, long = (tuple(float(f"{d:.6g}") for d in values) for values in (rope.divisors, rope.long_divisors))
            theta, scale = float(f"{rope.theta:.6g}"), float(f"{rope.scale:.6g}")
            rope = replace(rope, theta=theta, divisors=short, long_divisors=long, scale=scale)
        layers.append(replace(kind, rope=rope))
    return replace(config, family="llama", layers=tuple(layers))


@pytest.mark.parametrize("case", sorted(UNWRITABLE))
def test_families_whose_keys_are_not_written_are_refused(tmp_path: Path, case: str) -> None:
    problem = r"cannot (be rounded to a GGUF file|express its config.json)"
    folder = hf_folder(tmp_path / "hf", tiny_configs()[case])
    with opened(folder) as checkpoint, pytest.raises(ModelLoadError, match=problem):
        output_of_folder(checkpoint, {})


def test_a_window_becomes_a_key(tmp_path: Path) -> None:
    metadata = check_folder(tmp_path, "mistral", tiny_configs()["mistral"])
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.sliding_window"] == 20


BETA = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}


def test_yarn_with_other_parameters_becomes_divisors_where_llama_cpp_reads_them(tmp_path: Path) -> None:
    metadata = check_folder(tmp_path, "llama3", tiny_configs()["llama3"] | {"rope_scaling": BETA})
    assert "llama.rope.scaling.type" not in metadata


@pytest.mark.parametrize(("case", "changes"), [("yarn", {"rope_scaling": BETA}), ("smollm3", {})])
def test_what_gguf_cannot_express_is_refused(tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    folder = hf_folder(tmp_path / "hf", tiny_configs()[case] | changes)
    with opened(folder) as checkpoint, pytest.raises(ModelLoadError, match="cannot express its config"):
        output_of_folder(checkpoint, {})


CONFIG = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    layers=(LayerKind(Rope(1e4)),) * 16,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    attention_scale=0.125,
)
WIDE = replace(CONFIG, hidden_size=768, tie_word_embeddings=False)
ODD = replace(CONFIG, hidden_size=40)


@pytest.mark.parametrize(
    ("config", "kind", "name", "columns", "expected"),
    [
        (WIDE, "q4_k", "blk.2.attn_q.weight", 768, "Q4_K"),
        (WIDE, "q4_k", "blk.2.attn_v.weight", 768, "Q4_K"),
        (WIDE, "q4_k", "blk.1.attn_v.weight", 768, "Q6_K"),  # the first eighth
        (WIDE, "q5_k", "blk.4.ffn_down.weight", 1536, "Q6_K"),  # every third
        (WIDE, "q5_k", "blk.14.ffn_down.weight", 1536, "Q6_K"),  # the last eighth
        (WIDE, "q5_k", "blk.14.ffn_up.weight", 768, "Q5_K"),
        (WIDE, "q4_k", "token_embd.weight", 768, "Q4_K"),
        (WIDE, "q4_k", "output.weight", 768, "Q6_K"),
        (WIDE, "mxfp4", "output.weight", 768, "Q8_0"),
        (WIDE, "mxfp4", "token_embd.weight", 768, "Q8_0"),
        (WIDE, "mxfp4", "blk.0.ffn_down.weight", 1536, "MXFP4"),
        (WIDE, "q6_k", "blk.2.attn_q.weight", 768, "Q6_K"),
        (CONFIG, "q4_k", "token_embd.weight", 576, "Q8_0"),  # tied
        (CONFIG, "q4_k", "blk.2.attn_q.weight", 576, "Q5_0"),
        (CONFIG, "q5_k", "blk.2.attn_q.weight", 576, "Q5_1"),
        (CONFIG, "q5_k", "blk.0.attn_v.weight", 576, "Q8_0"),
        (CONFIG, "q6_k", "blk.2.attn_q.weight", 576, "Q8_0"),
        (CONFIG, "q8_0", "blk.2.attn_q.weight", 576, "Q8_0"),
        (ODD, "q4_k", "blk.2.attn_q.weight", 40, "F16"),
        (ODD, "mxfp4", "blk.2.attn_q.weight", 40, "F16"),
    ],
)
def test_formats_are_those_of_llama_quantize(
    config: ModelConfig, kind: str, name: str, columns: int, expected: str
) -> None:
    paths = {tensor.gguf: path for path, spec in config.weights().items() for tensor in spec.tensors}
    tensor = OutputTensor(name, (32, columns), paths[name], lambda: iter(()))
    assert format_of(tensor, config, TYPES[kind]) == expected


def test_norms_stay_float32() -> None:
    tensor = OutputTensor("blk.0.attn_norm.weight", (576,), "layers.0.attention_norm.weight", lambda: iter(()))
    assert format_of(tensor, CONFIG, TYPES["q4_k"]) == "F32"


def fields_of(reader: GGUFReader) -> dict[str, Any]:
    fields = (field for field in reader.fields.values() if not field.name.startswith("GGUF."))
    return {field.name: (field.contents(), field.types) for field in fields}


def test_a_file_keeps_metadata_and_other_tensors(tmp_path: Path) -> None:
    raw = {"rope_freqs.weight": (np.full(8, 2, np.float32).view(np.uint8), "F32")}
    source = TinyModel(tied=False).write_gguf(tmp_path / "f32.gguf", "F32", raw=raw, ids={"eos": 3})
    target = tmp_path / "q8.gguf"
    importance: Importance = {"layers.1.attention.qkv.weight": np.arange(64, dtype=np.float32)}
    with opened(source) as checkpoint:
        seen: list[tuple[str, str]] = []
        write_gguf(target, output_of_gguf(checkpoint), TYPES["q8_0"], importance, lambda *names: seen.append(names))
        values = {name: checkpoint.read(name) for name in checkpoint.names()}
    kept, written = GGUFReader(source), GGUFReader(target)
    types = {"general.file_type": 7, "general.quantization_version": 2}
    expected = fields_of(kept) | {name: (value, [GGUFValueType.UINT32]) for name, value in types.items()}
    assert fields_of(written) == expected
    assert [name for name, _ in seen] == [tensor.name for tensor in written.tensors] == [*values]
    for tensor in written.tensors:
        matrix = values[tensor.name]
        if matrix.ndim == 1:
            np.testing.assert_array_equal(tensor.data, matrix)
        else:
            is_important = tensor.name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight")
            columns = importance["layers.1.attention.qkv.weight"] if is_important else None
            np.testing.assert_array_equal(tensor.data, quantize(matrix, "Q8_0", columns), err_msg=tensor.name)


def test_a_model_in_several_files_becomes_one(tmp_path: Path) -> None:
    parts, path = split(tmp_path), tmp_path / "one.gguf"
    with opened(parts[1]) as checkpoint:
        write_gguf(path, output_of_gguf(checkpoint), PLAIN, {})
    with opened(path) as one, opened(tmp_path / "whole.gguf") as whole:
        assert one.config == whole.config
        expected = weights_of(whole)
        for name, values in weights_of(one).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_empty_arrays_are_left_out(tmp_path: Path) -> None:
    source, target = TinyModel().write_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    empty, note = b"tokenizer.ggml.suppress_tokens", b"general.x"
    entries = struct.pack(f"<Q{len(empty)}sIIQ", len(empty), empty, GGUFValueType.ARRAY, GGUFValueType.INT32, 0)
    entries += struct.pack(f"<Q{len(note)}sIQ13s", len(note), note, GGUFValueType.STRING, 13, b"")
    assert len(entries) % 32 == 0  # the tensors stay aligned
    data = bytearray(source.read_bytes())
    struct.pack_into("<Q", data, 16, struct.unpack_from("<Q", data, 16)[0] + 2)
    data[24:24] = entries
    source.write_bytes(data)
    with opened(source) as checkpoint:
        assert isinstance(checkpoint, GgufCheckpoint)
        assert checkpoint.metadata["tokenizer.ggml.suppress_tokens"] == []
        write_gguf(target, output_of_gguf(checkpoint), PLAIN, {})
    with opened(target) as checkpoint:
        assert isinstance(checkpoint, GgufCheckpoint)
        assert "tokenizer.ggml.suppress_tokens" not in checkpoint.metadata


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (1e30, "too large for float16 scales")])
def test_values_that_cannot_be_written_name_the_tensor(tmp_path: Path, value: float, message: str) -> None:
    model = TinyModel()
    model.tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    with opened(model.write_hf(tmp_path / "hf")) as checkpoint:
        output = output_of_folder(checkpoint, {})
        with pytest.raises(ModelLoadError, match=rf"blk\.1\.ffn_up\.weight: .*{message}"):
            write_gguf(tmp_path / "m.gguf", output, TYPES["q4_k"], {})


@pytest.mark.parametrize("case", sorted(EXPERTS))
def test_mixtures_of_experts_are_refused(tmp_path: Path, case: str) -> None:
    with opened(hf_folder(tmp_path / "hf", tiny_configs()[case])) as checkpoint:
        with pytest.raises(ModelLoadError, match="mixtures of experts cannot be rounded"):
            output_of_folder(checkpoint, {})
        with pytest.raises(ModelLoadError, match="mixtures of experts cannot be rounded"):
            output_of_gguf(checkpoint)
