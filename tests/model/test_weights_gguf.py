"""GGUF files: header, metadata, every type that is read, and damage."""

import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from model.rope import Rope
from model.weights.checkpoint import ModelLoadError
from model.weights.gguf import GgufCheckpoint
from model.weights.gguf_header import read_header
from model.weights.source import default_model_path, resolve_model
from tests.support.tiny_checkpoints import BF16, TinyModel, gguf_name

U32, STRING, ARRAY = 4, 8, 9


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A row of the table of tensors, fastest axis first, as in the format."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(values: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(values))
    return b"GGUF" + counts + b"".join(values) + b"".join(tensors)


def refused(path: Path, content: bytes) -> str:
    """The one-line error of a file with this content."""
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.gguf"


def test_header_metadata_as_python_values(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    kinds = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    expected: dict[str, Any] = {kind: 7 if kind.startswith("u") else -7 for kind in kinds}
    for kind in kinds:
        getattr(writer, f"add_{kind}")(kind, expected[kind])
    expected |= {"f32": 0.1, "f64": 0.1, "bool": True, "text": "Ġé", "ints": [1, -2], "floats": [0.5, 2.0]}
    expected |= {"texts": ["", "Ġt", "日本"], "bools": [True, False]}
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "Ġé")
    for key in ("ints", "floats", "texts", "bools"):
        writer.add_array(key, expected[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected["f32"] = float(np.float32(0.1))
    metadata = read_header(path).metadata
    assert metadata == expected | {"general.architecture": "llama"}
    assert {key: type(metadata[key]) for key in expected} == {key: type(expected[key]) for key in expected}
    assert [type(item) for item in metadata["bools"] + metadata["ints"]] == [bool, bool, int, int]


def test_header_reverses_shapes_and_aligns_offsets(path: Path) -> None:
    values = [value("general.alignment", U32, struct.pack("<I", 64))]
    head = header(values, [tensor("a", (4, 3)), tensor("b", (2,), offset=64)])
    start = -(-len(head) // 64) * 64
    path.write_bytes(head.ljust(start, b"\0") + bytes(128))
    rows = read_header(path).tensors
    assert [(row.shape, row.offset, row.nbytes) for row in rows.values()] == [
        ((3, 4), start, 48),
        ((2,), start + 64, 8),
    ]


def test_header_version_2(path: Path) -> None:
    path.write_bytes(header([value("k", U32, struct.pack("<I", 5))], [], version=2))
    assert read_header(path).metadata == {"k": 5}


def test_header_truncated_anywhere(path: Path) -> None:
    tokens = value("tokens", ARRAY, struct.pack("<IQ", STRING, 2) + string("ab") + string("c"))
    numbers = value("numbers", ARRAY, struct.pack("<IQ", U32, 2) + bytes(8))
    head = header([tokens, numbers, value("text", STRING, string("abc"))], [tensor("a", (4, 3))])
    full = head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(48)
    path.write_bytes(full)
    assert list(read_header(path).tensors) == ["a"]
    for size in range(len(full)):
        message = refused(path, full[:size])
        assert ("not a GGUF file" if size < 4 else "truncated") in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (header([], [], version=1), "has version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (header([value("k", 13, b"")], []), "unknown type 13 of a metadata value"),
        (
            header([value("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(20))], []),
            "unknown type 9 of a metadata array",
        ),
        (header([value("k", ARRAY, struct.pack("<IQ", STRING, 2**60))], []), "truncated"),
        (header([value("k", ARRAY, struct.pack("<IQ", U32, 2**62))], []), "truncated"),
        (header([value("k", STRING, string(b"\xff\xfe"))], []), "is not UTF-8"),
        (header([value("k", U32, bytes(4))] * 2, []), "metadata key k occurs twice"),
        (header([value("general.alignment", U32, bytes(4))], []), "general.alignment is 0"),
        (header([value("general.alignment", STRING, string("x"))], []), "general.alignment is 'x'"),
        (header([], [tensor("a", (1,)), tensor("a", (1,))]) + bytes(64), "tensor a occurs twice"),
        (header([], [tensor("a", (1, 1, 1, 1, 1))]), "tensor a has 5 axes"),
        (header([], [tensor("a", (2**62, 0, 2**62))]), "tensor a has no values, and an axis of length"),
        (header([], [tensor("a", (33,), kind=2)]) + bytes(64), "not a multiple of Q4_0's 32"),
        (header([], [tensor("a", (2**40, 2**40))]) + bytes(64), "truncated: tensor a ends at byte"),
        (header([], [tensor("a", (1,), offset=2**63)]) + bytes(64), "truncated: tensor a ends at byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated"),
    ],
)
def test_header_invalid(path: Path, content: bytes, message: str) -> None:
    assert message in refused(path, content)


def test_header_of_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="No such file"):
        GgufCheckpoint(tmp_path / "gone.gguf")
    with pytest.raises(ModelLoadError, match="Is a directory"):
        GgufCheckpoint(tmp_path)


@pytest.mark.parametrize("dims", [(0,), (4, 0), (0, 4)])
def test_read_empty_tensor(path: Path, dims: tuple[int, ...]) -> None:
    empty: Any = np.zeros(dims[::-1], np.float32)
    with closing(GgufCheckpoint(TinyModel().write_gguf(path, raw={"rope_freqs.weight": (empty, "F32")}))) as checkpoint:
        assert checkpoint.read("rope_freqs.weight").size == 0
        assert checkpoint.config.layers[0].rope == Rope(10000.0)


def test_header_unknown_type_has_no_size(path: Path) -> None:
    path.write_bytes(header([], [tensor("a", (4,), kind=999)]))
    row = read_header(path).tensors["a"]
    assert (row.type_name, row.nbytes) == ("type 999", 0)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_read_types_that_python_can_write(path: Path, kind: str) -> None:
    tiny = TinyModel()
    with closing(GgufCheckpoint(tiny.write_gguf(path, kind))) as checkpoint:
        name = "model.layers.1.mlp.down_proj.weight"
        got = checkpoint.read(gguf_name(name))
        assert got.dtype == (BF16 if kind == "BF16" else np.float32)
        np.testing.assert_array_equal(got.astype(np.float32), tiny.rounded(kind).tensors[name])
        info = checkpoint.names()[gguf_name(name)]
        assert (info.shape, info.stored_as, info.supported) == (tiny.shapes()[name], kind, True)


# Offsets of the float16 scales in a block: these bits could be NaN, all others are numbers.
SCALES = {
    "Q2_K": (-4, -2),
    "Q3_K": (-2,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (-2,),
    "IQ1_S": (0,),
    "IQ2_S": (0,),
    "IQ2_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ3_S": (0,),
    "IQ3_XXS": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (-2,),
    "TQ2_0": (-2,),
}


@pytest.mark.parametrize("kind", SCALES)
def test_read_types_from_raw_blocks(path: Path, kind: str) -> None:
    qtype = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = np.random.default_rng(3).integers(0, 256, (5, 2 * block_bytes), np.uint8)
    for scale in SCALES[kind]:
        for start in (scale % block_bytes, scale % block_bytes + block_bytes):
            blocks[:, start : start + 2] = np.array([0.125], "<f2").view(np.uint8)
    with closing(GgufCheckpoint(TinyModel().write_gguf(path, raw={"extra": (blocks, kind)}))) as checkpoint:
        info = checkpoint.names()["extra"]
        assert (info.shape, info.stored_as, info.supported, info.nbytes) == ((5, 2 * block), kind, True, blocks.size)
        got = checkpoint.read("extra")
        np.testing.assert_array_equal(got, gguf.quants.dequantize(blocks, qtype))
        assert np.ptp(got) > 0.2


def test_read_tensor_of_several_runs(path: Path) -> None:
    values = np.random.default_rng(5).standard_normal((9000, 64), np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    with closing(GgufCheckpoint(TinyModel().write_gguf(path, raw={"extra": (blocks, "Q8_0")}))) as checkpoint:
        got = checkpoint.read("extra")
    np.testing.assert_array_equal(got, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))


def test_names_marks_unsupported_types(path: Path) -> None:
    blocks = np.zeros((2, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_1][1]), np.uint8)
    with closing(GgufCheckpoint(TinyModel().write_gguf(path, raw={"extra": (blocks, "Q8_1")}))) as checkpoint:
        info = checkpoint.names()["extra"]
        assert (info.stored_as, info.supported) == ("Q8_1", False)


def test_read_file_truncated_after_opening(path: Path) -> None:
    with closing(GgufCheckpoint(TinyModel().write_gguf(path))) as checkpoint:
        last = list(checkpoint.names())[-1]
        path.write_bytes(path.read_bytes()[:-256])
        with pytest.raises(ModelLoadError, match=r"cannot be read: the file has \d+ of \d+ bytes"):
            checkpoint.read(last)


def split(folder: Path, parts: int = 3) -> list[Path]:
    """A tiny model in several files, as written by gguf-split: the first has the metadata, each some tensors."""
    full = TinyModel().write_gguf(folder / "whole.gguf")
    reader = gguf.GGUFReader(full)
    paths = []
    for number in range(parts):
        path = folder / f"tiny-{number + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("named", [0, 2])
def test_open_model_in_several_files(tmp_path: Path, named: int) -> None:
    parts = split(tmp_path)
    with closing(GgufCheckpoint(tmp_path / "whole.gguf")) as full, closing(GgufCheckpoint(parts[named])) as checkpoint:
        assert checkpoint.config == full.config
        assert checkpoint.names() == full.names()
        for name in full.names():
            np.testing.assert_array_equal(checkpoint.read(name), full.read(name))
    (tmp_path / "whole.gguf").unlink()
    assert resolve_model(str(tmp_path), None).path == parts[0]


def test_open_parts_that_contradict_their_names(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelLoadError, match=r"tiny-00002-of-00003\.gguf: No such file"):
        GgufCheckpoint(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelLoadError, match=r"tiny-00002-of-00003\.gguf: is not part 2 of 3"):
        GgufCheckpoint(first)
    second.write_bytes(content[:-64])
    with pytest.raises(ModelLoadError, match=r"tiny-00002-of-00003\.gguf: truncated"):
        GgufCheckpoint(first)
    third.write_bytes(header([value("split.count", ARRAY, struct.pack("<IQI", U32, 1, 3))], []))
    with pytest.raises(ModelLoadError, match=r"tiny-00003-of-00003\.gguf: split.count is \[3\]"):
        GgufCheckpoint(third)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match="is one of 3 parts, but is not named"):
        GgufCheckpoint(tmp_path / "other.gguf")


def test_open_bad_configuration_names_the_file(path: Path) -> None:
    path.write_bytes(header([value("general.architecture", STRING, string("bert"))], []))
    with pytest.raises(ModelLoadError) as caught:
        GgufCheckpoint(path)
    assert str(caught.value).startswith(f"{path}: general.architecture 'bert' is not known")


def test_open_default_model() -> None:
    with closing(GgufCheckpoint(default_model_path())) as checkpoint:
        config = checkpoint.config
        assert (config.family, config.num_layers, config.hidden_size, config.intermediate_size) == (
            "llama",
            30,
            576,
            1536,
        )
        assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
        assert (config.layers[0].rope, config.max_position_embeddings, config.tie_word_embeddings) == (
            Rope(100000.0),
            8192,
            True,
        )
        assert np.float32(config.rms_norm_eps) == np.float32(1e-5)
        tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
        assert (len(tokens), tokens[:2], len(checkpoint.metadata["tokenizer.ggml.merges"])) == (
            49152,
            ["<|endoftext|>", "<|im_start|>"],
            48900,
        )
