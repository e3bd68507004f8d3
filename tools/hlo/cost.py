"""Bytes and flops of one HLO instruction; `operations.py` explains the counts."""

import math
import re
from dataclasses import dataclass

from model.kernels.cpu.library import Target
from tools.hlo.parse import Computation, Instruction, array_sizes, bits, dims

_TAKES = frozenset({"gather", "dynamic-slice", "slice"})
_ROTATED_PAGES = (3, 4)  # operands of the CPU's rotary kernel with the pages, updated in place


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    """Operand numbers of an attention kernel."""

    queries: int
    tables: int  # [R, P]
    pages: tuple[int, ...]  # the full page arrays, of which a call reads a part
    page_axis: int  # axis of tokens within a page

    def moved(self, computation: Computation, call: Instruction) -> int:
        """Bytes of one page per row."""
        rows = dims(computation[call.operands[self.tables]].shape)[0]
        arrays = [computation[call.operands[i]].shape for i in self.pages]
        return sum(sum(array_sizes(shape)) // dims(shape)[0] * rows for shape in arrays)

    def flops(self, computation: Computation, call: Instruction) -> int:
        """Flops of queries times keys, then values, of one page."""
        queries, pages = (dims(computation[call.operands[i]].shape) for i in (self.queries, self.pages[0]))
        return 2 * 2 * math.prod(queries) * pages[self.page_axis]


def bytes_of(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode.endswith("-done"):
        return 0  # counted at its start
    if opcode == "copy-start":
        return sum(_sizes_off_chip(instruction)[:2])  # to, from
    if opcode == "slice-start":
        taken = array_sizes(instruction.shape)[-2]
        return taken + _sizes_off_chip(instruction)[-2]
    if opcode != "fusion":
        reads = (_read(computation, instruction, i) for i in range(len(instruction.operands)))
        return sum(reads) + _written(computation, instruction)
    fused = computations[instruction.called[0]]
    reads = (_read_inside(fused, inner) for inner in fused.values() if inner.opcode == "parameter")
    root = next(inner for inner in fused.values() if inner.root)
    return sum(reads) + _written(fused, root)


def flops_of(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> int:
    """Return the flops of an instruction's matrix products."""
    if attention := _attention(instruction):
        return attention.flops(computation, instruction)
    match instruction.opcode:
        case "fusion":
            fused = computations[instruction.called[0]]
            return sum(flops_of(computations, fused, inner) for inner in fused.values())
        case "dot":
            left = dims(computation[instruction.operands[0]].shape)
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            contracted = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
            return 2 * math.prod(dims(instruction.shape)) * contracted
        case "convolution":  # a matrix product on a TPU
            kernel = dims(computation[instruction.operands[1]].shape)
            labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
            outputs = kernel[labels[1].index("o")] if labels else 1
            return 2 * math.prod(dims(instruction.shape)) * math.prod(kernel) // outputs
        case "custom-call" if _is_call_of(instruction, Target.SCORE):
            vocab = re.search(r"vocab = (\d+)", instruction.attributes)
            return 2 * math.prod(dims(computation[instruction.operands[0]].shape)) * int(vocab[1] if vocab else 0)
        case "custom-call" if _is_call_of(instruction, Target.LINEAR):
            # x [M, K] and a packed weight give [M, N]: see model/kernels/cpu/operations.py.
            return 2 * math.prod(dims(instruction.shape)) * dims(computation[instruction.operands[0]].shape)[1]
    return 0


def _attention(instruction: Instruction) -> _AttentionCall | None:
    """Return the attention kernel that an instruction calls: CPU, Triton (NVIDIA) or TPU."""
    if instruction.opcode != "custom-call":
        return None
    if _is_call_of(instruction, Target.ATTENTION):
        return _AttentionCall(queries=0, tables=3, pages=(1, 2), page_axis=2)
    if "/logprobd_attention/" in instruction.op_name:
        return _AttentionCall(queries=0, tables=2, pages=(3, 4), page_axis=2)
    if "/ragged_paged_attention_kernel/" in instruction.op_name:
        return _AttentionCall(queries=5, tables=1, pages=(6,), page_axis=1)
    return None


def _read_inside(fused: Computation, parameter: Instruction) -> int:
    """Return the bytes that a fusion reads of a parameter: all of it, or the gathered or sliced part."""
    same = {parameter.name}
    taken = 0
    for inner in fused.values():
        for i, operand in enumerate(inner.operands):
            if operand in same and inner.opcode == "bitcast":
                same.add(inner.name)
            elif operand in same:
                taken += _read(fused, inner, i)
    return min(taken, parameter.traffic)


def _read(computation: Computation, user: Instruction, i: int) -> int:
    """Return the bytes that an operation reads of its operand i."""
    source = computation[user.operands[i]]
    if user.opcode in _TAKES and i == 0:
        return min(sum(array_sizes(user.shape)), source.traffic)
    if (user.opcode == "dynamic-update-slice" and i == 0) or (user.opcode == "scatter" and i < len(user.operands) // 2):
        return 0  # updated in place
    if _is_call_of(user, Target.ROTATE) and i in _ROTATED_PAGES:
        return 0  # updated in place
    if (attention := _attention(user)) and i in attention.pages:
        return attention.moved(computation, user) if i == attention.pages[0] else 0
    return source.traffic


def _written(computation: Computation, writer: Instruction) -> int:
    """Return the bytes that an operation or the root of a fusion writes."""
    sources = [computation[operand] for operand in writer.operands if operand in computation]
    match writer.opcode:
        case "tuple":
            return sum(_written(computation, source) for source in sources)
        case "bitcast":
            return _written(computation, sources[0])
        case "dynamic-update-slice":
            return min(sum(array_sizes(sources[1].shape)), writer.traffic)
        case "scatter":
            updates = sources[len(sources) // 2 + 1 :]
            return min(sum(sum(array_sizes(update.shape)) for update in updates), writer.traffic)
        case "custom-call" if _is_call_of(writer, Target.ROTATE):
            return _rotated(sources)
    return writer.traffic


def _rotated(operands: list[Instruction]) -> int:
    """Return the bytes written for heads [R, T, H + 2 K, E]: queries, and keys and values in pages [N, K, S, E]."""
    heads, pages = dims(operands[0].shape), [operands[i].shape for i in _ROTATED_PAGES]
    K, E = dims(pages[0])[1], heads[3]
    stored = sum(bits(page.partition("[")[0]) // 8 * K * E for page in pages)
    return math.prod(heads[:2]) * (4 * (heads[2] - 2 * K) * E + stored)


def _sizes_off_chip(instruction: Instruction) -> list[int]:
    """Return the bytes of each result array, 0 for on-chip memory."""
    sizes = array_sizes(instruction.shape)
    return [0 if near else size for size, near in zip(sizes, instruction.on_chip, strict=True)]


def _is_call_of(instruction: Instruction, *targets: str) -> bool:
    return any(f'custom_call_target="{target}"' in instruction.attributes for target in targets)
