"""Quantized matrices of safetensors: tensors of codes, scales and zero points as one weight [N, K], or of experts.

A weight is `scale * (code - zero point)`, or `scale * value` of FP8, in float32. The layouts are those of AutoGPTQ and
AutoAWQ (`qweight`, `qzeros`, `scales`, `g_idx`), compressed-tensors (`weight_packed`, `weight_scale`, ...) and
DeepSeek's FP8 (`weight_scale_inv`), and gpt-oss's MXFP4 (`*_blocks`, `*_scales`). G is the number of groups of columns
that share a scale.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from model.weights.checkpoint import ModelLoadError, TensorInfo
from model.weights.hf_quantization import Quantization

_ITEM_BYTES = {"I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4}
_BLOCKS = {"INT4": (128, 64, 32), "INT8": (128, 32), "FP8": (128,)}  # sizes of model/formats.py
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the 4 bits of a word that hold column 0, 1, ...
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_MXFP4 = "_blocks"
# Scales of activations and caches, which are not quantized here.
_ACTIVATIONS = ("input_scale", "output_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale")

type Read = Callable[..., NDArray[Any]]  # takes the name of a stored tensor and slices of its axes


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of a quantized weight."""

    codes: NDArray[np.uint8]  # [R, K], or [R, ceil(K/2)] with two of 4 bits per byte; FP8 if there are no zero points
    scales: NDArray[np.float32]  # [R, G]
    zeros: NDArray[np.uint32] | None  # [R, G]


class QuantizedTensor(Protocol):
    """A quantized weight."""

    @property
    def info(self) -> TensorInfo: ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the stored tensors that it consists of."""

    def read(self, start: int, stop: int, step: int = 1) -> NDArray[np.float32]:
        """Values [R, K] of every `step`-th of rows start..stop-1, of all axes but the last one together."""

    def read_blocks(self, start: int, stop: int, step: int = 1) -> NDArray[np.uint8]:
        """The same rows as bytes of blocks [R, bytes], their columns in the order of `info`."""


@dataclass(frozen=True, slots=True)
class _CodedTensor:
    """A matrix of codes, scales and zero points."""

    info: TensorInfo
    sources: tuple[str, ...]
    groups: NDArray[np.int32]  # [K], of each column
    rows: Callable[[int, int], CodedRows]

    @property
    def has_pairs(self) -> bool:
        return self.info.stored_as.startswith("INT4")

    def read(self, start: int, stop: int, step: int = 1) -> NDArray[np.float32]:
        rows = self.rows(start, stop)
        codes = _codes(rows.codes, 4)[:, : self.info.shape[1]] if self.has_pairs else rows.codes
        scales = rows.scales[:, self.groups]
        if rows.zeros is None:
            return np.asarray(_E4M3[codes] * scales)[::step]
        return np.asarray((codes.astype(np.float32) - rows.zeros.astype(np.float32)[:, self.groups]) * scales)[::step]

    def read_blocks(self, start: int, stop: int, step: int = 1) -> NDArray[np.uint8]:
        rows, block_format, order = self.rows(start, stop), self.info.block_format, self.info.order
        assert block_format is not None
        codes, groups = rows.codes, self.groups
        if order is not None:
            codes = _pairs(_codes(codes, 4)[:, order]) if self.has_pairs else codes[:, order]
            groups = groups[order]
        width = block_format.block // 2 if self.has_pairs else block_format.block  # bytes of a block's codes
        if codes.shape[1] % width:
            codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % width)))
        codes = codes.reshape(len(codes), -1, width)
        words = np.ascontiguousarray(rows.scales[:, groups[:: block_format.block]]).view(np.uint32)
        if rows.zeros is not None:
            words = words | rows.zeros[:, groups[:: block_format.block]]
            codes = _halves(codes) if self.has_pairs else codes ^ np.uint8(0x80)
        return np.concatenate([words[..., None].view(np.uint8), codes], axis=-1).reshape(len(codes), -1)[::step]


@dataclass(frozen=True, slots=True)
class _Mxfp4Tensor:
    """Matrices of experts [X, N, K] in MXFP4."""

    info: TensorInfo
    sources: tuple[str, ...]
    stored: Read

    def read(self, start: int, stop: int, step: int = 1) -> NDArray[np.float32]:
        values: NDArray[np.float32] = dequantize(self.read_blocks(start, stop, step), GGMLQuantizationType.MXFP4)
        return values

    def read_blocks(self, start: int, stop: int, step: int = 1) -> NDArray[np.uint8]:
        n = self.info.shape[1]
        expert, row, count = start // n, start % n, stop - start
        rows = (slice(expert, -(-stop // n)), slice(row, row + count) if row + count <= n else slice(None))
        first = row if row + count > n else 0
        parts = (self.stored(name, *rows) for name in self.sources)
        codes, scales = (part.reshape(-1, *part.shape[2:])[first : first + count : step] for part in parts)
        blocks = np.concatenate([scales.reshape(-1, 1), _halves(codes.reshape(-1, 16))], axis=1)
        return blocks.reshape(-1, 17 * scales.shape[1])


def _pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [R, K] of 4 bits, two per byte, the first in its low half: [R, ceil(K/2)]."""
    pairs = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return pairs[:, ::2] | pairs[:, 1::2] << np.uint8(4)


def _halves(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [..., B/2] as of `_pairs` as blocks have them: of each 32 the first 16 in the low halves of 16 bytes."""
    words = np.ascontiguousarray(pairs).reshape(-1).view(np.uint64)  # of eight bytes, which are copied together
    first, second = (words[half::2].copy().view(np.uint8) for half in (0, 1))
    halves = np.empty((first.size, 2), np.uint8)
    halves[:, 0] = first & 0x0F | second << 4
    halves[:, 1] = first >> 4 | second & 0xF0
    return halves.reshape(pairs.shape)


def quantized_tensors(
    quantization: Quantization, stored: Mapping[str, TensorInfo], read: Read
) -> tuple[Mapping[str, QuantizedTensor], set[str]]:
    """The quantized weights by name, and the names of stored tensors that are not weights by themselves."""
    packing, tensors = _Packing(quantization, stored, read), dict[str, QuantizedTensor]()
    for name in stored:
        stem, _, kind = name.rpartition(".")
        if (tensor := packing.tensor(stem, kind)) is not None:
            tensors[name.removesuffix(_MXFP4) if name.endswith(_MXFP4) else f"{stem}.weight"] = tensor
    parts = {source for tensor in tensors.values() for source in tensor.sources}
    if quantization.quantizes_activations:
        parts |= {name for name in stored if name.rpartition(".")[2] in _ACTIVATIONS}
    return tensors, parts


@dataclass(frozen=True, slots=True)
class _Packing:
    quantization: Quantization
    stored: Mapping[str, TensorInfo]
    read: Read

    def tensor(self, stem: str, kind: str) -> QuantizedTensor | None:
        """The weight whose codes are in the tensor `stem.kind`; None if there is none, or another part is missing."""
        method, dtype = self.quantization.method, self.stored[f"{stem}.{kind}" if stem else kind].stored_as
        if kind == "qweight" and method in ("gptq", "awq"):
            return self._columns(stem, is_awq=method == "awq")
        if kind == "weight_packed" and method == "compressed-tensors":
            return self._packed(stem)
        if kind == "weight" and method in ("compressed-tensors", "fp8") and dtype in ("F8_E4M3", "I8"):
            return self._bytes(stem, is_fp8=dtype == "F8_E4M3")
        if kind.endswith(_MXFP4) and method == "mxfp4":
            return self._mxfp4(f"{stem}.{kind}")
        return None

    def _columns(self, stem: str, *, is_awq: bool) -> _CodedTensor | None:
        """`qweight`, in GPTQ [K/8, N] and in AWQ [K, N/8], `qzeros` [G, N/8] and `scales` [G, N]."""
        main, qzeros, scales, g_idx = (f"{stem}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx"))
        if not {qzeros, scales} <= self.stored.keys():
            return None
        bits, order, offset = self.quantization.bits, _AWQ_ORDER if is_awq else None, self.quantization.zero_offset
        size, (rows, columns), (count, n) = 32 // bits, self._matrix(main), self._matrix(scales)
        k, width = (rows, columns * size) if is_awq else (rows * size, columns)
        fits = width == n and self._matrix(qzeros) == (count, n // size) and n % size == 0

        def read_rows(start: int, stop: int) -> CodedRows:
            everything, words = slice(None), slice(start // size, -(-stop // size))
            inside = slice(start - words.start * size, stop - words.start * size)
            zeros = _codes(self.read(qzeros, everything, words), bits, order)[:, inside].T
            if is_awq:
                codes = _pairs(_codes(self.read(main, everything, words), bits, order)[:, inside].T)
            else:
                codes = np.ascontiguousarray(self.read(main, everything, slice(start, stop)).T).view(np.uint8)
            if offset and (zeros == (1 << bits) - 1).any():
                raise ModelLoadError(f"holds a zero point that some libraries read as {1 << bits} and others as 0")
            factors = self.read(scales, everything, slice(start, stop)).T.astype(np.float32)
            return CodedRows(codes, factors, zeros.astype(np.uint32) + np.uint32(offset))

        groups = self._groups(k, count, g_idx, self.quantization.group_size) if fits else None
        return self._tensor((main, qzeros, scales, g_idx), (n, k), f"INT{bits}", groups, read_rows)

    def _packed(self, stem: str) -> _CodedTensor | None:
        """`weight_packed` [N, K/8], `weight_scale` [N, G], and for other zero points `weight_zero_point` [N/8, G]."""
        kinds = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
        main, scales, shape, zero_points, g_idx = names = tuple(f"{stem}.{kind}" for kind in kinds)
        if not {scales, shape} <= self.stored.keys() or self.stored[shape].shape != (2,):
            return None
        n, k = (int(size) for size in self.read(shape))
        (rows, columns), (scale_rows, count) = self._matrix(main), self._matrix(scales)
        bits = next((bits for bits in (4, 8) if columns == -(-k * bits // 32)), 0)
        size, has_zeros = 32 // (bits or 4), zero_points in self.stored
        fits = bits > 0 and rows == scale_rows == n
        fits &= not has_zeros or self._matrix(zero_points) == (-(-n // size), count)

        def read_rows(start: int, stop: int) -> CodedRows:
            codes = self.read(main, slice(start, stop)).view(np.uint8)[:, : -(-k * bits // 8)]
            factors = self.read(scales, slice(start, stop)).astype(np.float32)
            zeros = np.full(factors.shape, 1 << (bits - 1), np.uint32)
            if has_zeros:
                first = start // size
                columns = _codes(self.read(zero_points, slice(first, -(-stop // size))).T, bits)
                zeros = columns[:, start - first * size : stop - first * size].T.astype(np.uint32)
            return CodedRows(codes, factors, zeros)

        return self._tensor(names, (n, k), f"INT{bits}", self._groups(k, count, g_idx) if fits else None, read_rows)

    def _bytes(self, stem: str, *, is_fp8: bool) -> _CodedTensor | None:
        """`weight` [N, K] of int8 or FP8, a scale per tensor, row, group of a row or block, and int8 zero points."""
        main, zero_points = f"{stem}.weight", f"{stem}.weight_zero_point"
        scales = f"{stem}.weight_scale"
        scales = scales if scales in self.stored else f"{scales}_inv"
        if scales not in self.stored:
            return None
        (n, k), shape = self._matrix(main), self.stored[scales].shape
        tall, count, groups = 1, shape[1] if len(shape) > 1 else 1, None
        block = self.quantization.block or (0, 0)
        if math.prod(shape) == 1:
            tall, groups = max(1, n), self._groups(k, 1)
        elif len(shape) == 2 and all(block) and shape == (-(-n // block[0]), -(-k // block[1])):
            tall, groups = block[0], np.arange(k, dtype=np.int32) // np.int32(block[1])
        elif shape in ((n,), (n, count)):
            groups = self._groups(k, count)
        has_zeros = zero_points in self.stored and not is_fp8
        if has_zeros and self.stored[zero_points].shape != shape:
            groups = None

        def read_rows(start: int, stop: int) -> CodedRows:
            codes, rows = self.read(main, slice(start, stop)).view(np.uint8), np.arange(start, stop) // tall
            factors = self.read(scales).astype(np.float32).reshape(-1, count)[rows]
            if is_fp8:
                return CodedRows(codes, factors, None)
            zeros = self.read(zero_points).reshape(-1, count)[rows] if has_zeros else np.zeros(factors.shape, np.int8)
            return CodedRows(codes ^ np.uint8(0x80), factors, (zeros.astype(np.int32) + 128).astype(np.uint32))

        return self._tensor((main, scales, zero_points), (n, k), "FP8" if is_fp8 else "INT8", groups, read_rows)

    def _mxfp4(self, blocks: str) -> QuantizedTensor | None:
        """`*_blocks` [X, N, G, 16], two codes per byte, and `*_scales` [X, N, G], exponents."""
        scales = f"{blocks.removesuffix(_MXFP4)}_scales"
        if scales not in self.stored:
            return None
        shape, dtypes = self.stored[blocks].shape, {self.stored[name].stored_as for name in (blocks, scales)}
        fits = len(shape) == 4 and shape[3] == 16 and self.stored[scales].shape == shape[:3] and dtypes == {"U8"}
        described = "MXFP4" if fits else "mxfp4 tensors whose shapes do not fit"
        info = TensorInfo((*shape[:2], 32 * shape[2]) if fits else (), described, fits, 17 * math.prod(shape) // 16)
        return _Mxfp4Tensor(info, (blocks, scales), self.read)

    def _matrix(self, name: str) -> tuple[int, int]:
        """A stored tensor's shape; zeros if it is no matrix."""
        shape = self.stored[name].shape
        return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)

    def _groups(self, k: int, count: int, g_idx: str = "", size: int = -1) -> NDArray[np.int32] | None:
        """The group of each of k columns; None if they are not `count` groups."""
        if g_idx in self.stored:
            groups = self.read(g_idx).astype(np.int32)
            return groups if groups.shape == (k,) and 0 <= groups.min() <= groups.max() < count else None
        if size < 0:
            size = k // max(1, count)
            if size * count != k:
                return None
        return np.arange(k, dtype=np.int32) // np.int32(size) if size and -(-k // size) == count else None

    def _tensor(
        self,
        names: tuple[str, ...],
        shape: tuple[int, int],
        kind: str,
        groups: NDArray[np.int32] | None,
        rows: Callable[[int, int], CodedRows],
    ) -> _CodedTensor:
        """The weight in the widest block whose columns share a scale; without one it is stored as floats."""
        sources = tuple(name for name in names if name in self.stored)
        nbytes = sum(
            _ITEM_BYTES.get(info.stored_as, 0) * math.prod(info.shape) for info in map(self.stored.get, sources) if info
        )
        if groups is None:
            described = f"{self.quantization.method} tensors whose shapes do not fit"
            return _CodedTensor(TensorInfo(shape, described, False, 0), sources, np.zeros(0, np.int32), rows)
        order = None if (np.diff(groups) >= 0).all() else np.argsort(groups, kind="stable").astype(np.int32)
        columns = groups if order is None else groups[order]
        is_exact = kind == "FP8" or any(
            self.stored[name].stored_as in ("F16", "BF16") for name in sources if "scale" in name
        )
        sizes = [size for size in _BLOCKS[kind] if is_exact and _share(columns, size)]
        stored_as = f"{kind}_{sizes[0]}" if sizes else kind
        info = TensorInfo(shape, stored_as, True, nbytes, order if sizes else None)
        return _CodedTensor(info, sources, groups, rows)


def _share(groups: NDArray[np.int32], size: int) -> bool:
    """Whether the columns of each block of `size` are of one group."""
    blocks = np.pad(groups, (0, -len(groups) % size), mode="edge").reshape(-1, size)
    return bool((blocks == blocks[:, :1]).all())


def _codes(words: NDArray[Any], bits: int, order: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """Codes [R, P * 32 / bits] of int32 words [R, P], the lowest bits first, or of each word in `order`."""
    codes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return codes if order is None else codes.reshape(len(codes), -1, 8)[..., list(order)].reshape(len(codes), -1)
