"""Reads a compiled program's text: which operations run, what they move and compute, and for which part of the model.

The text is XLA's optimised HLO, as `Compiled.as_text()` prints it; its operations are described at
https://openxla.org/xla/operation_semantics. What is counted is what the text says, not what was measured:

- A loop's body is counted once, and so is every branch of a conditional, because the text does not say how often each
  runs. In decode, sampling is therefore the cost of one draw, and attention that of one page of every row, both in
  XLA's loop and in our kernel, which reads as many pages as a row has.
- Bytes are those of operands and results, whether they come from memory or from a cache. An array from which rows are
  gathered or sliced counts for what is taken, one that is updated in place for what is written.
- Flops are those of matrix products alone: `dot` and our kernels.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from compiled.programs import Program
from model.kernels.cpu.library import (
    ATTENTION_TARGET,
    INT8_TARGET,
    ROTATE_TARGET,
    SCORE_INT8_TARGET,
    SCORE_TARGET,
    TARGET,
)

SCOPES = ("attention", "mlp", "head", "sample", "logprobs", "rank")  # the names given by jax.named_scope
COLLECTIVES = frozenset({"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"})
OTHER = "other"  # embedding, rotary angles, final norm, hidden pages

_NO_COST = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})
_CONTROL = frozenset({"while", "conditional", "call"})
_PAGES = {ATTENTION_TARGET: (1, 2), ROTATE_TARGET: (3, 4)}  # the kernels' operands that are all pages of the cache
_TAKES = frozenset({"gather", "dynamic-slice", "slice"})

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{")
_LAYOUT = re.compile(r"\{[^}]*\}|/\*.*?\*/")
_METADATA = re.compile(r', metadata=\{(?:[^}"]|"[^"]*")*\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|condition|body|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)")
_SOURCE_TABLES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that runs. A fusion is one operation: what is inside it costs no memory traffic of its own."""

    name: str
    opcode: str
    shape: str  # of the result, such as "f32[4,576]"; a tuple in parentheses
    bytes: int  # read and written; 0 for while, conditional and call, whose bodies follow
    flops: int
    scope: str  # one of SCOPES, or OTHER


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over operations."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    inside: str  # the parentheses after the opcode
    attributes: str  # what follows, without metadata
    op_name: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    @property
    def called(self) -> list[str]:
        return _NAME.findall(" ".join(_CALLED.findall(self.attributes)))


type _Computation = dict[str, _Instruction]  # by name, in order of execution


def hlo_text(program: Program) -> str:
    """The optimised HLO of a program, without its tables of source locations (they name this machine's files).

    Raises:
        ValueError: the platform keeps no text of its executables.
    """
    text = program.compiled.as_text()
    if text is None:
        raise ValueError(f"{program.name}: this platform gives no HLO text")
    return _SOURCE_TABLES.sub("", text)


def without_metadata(line: str) -> str:
    """An HLO line, or many, without metadata: shorter to read."""
    return _METADATA.sub("", line)


def operations(text: str) -> list[Operation]:
    """Every operation that runs, in order; see the top of this file for how it is counted.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    computations, entry = _parse(text)
    return list(_run(computations, entry, OTHER))


def collectives(counted: list[Operation]) -> list[Operation]:
    """Those that move arrays between devices; of one that runs in two parts, the first."""
    return [operation for operation in counted if operation.opcode.removesuffix("-start") in COLLECTIVES]


def widest_axis(shape: str) -> int:
    """The longest axis of an array's shape, or of all arrays in a tuple; 0 for scalars."""
    return max((max(_dims(found.group()), default=0) for found in _ARRAY.finditer(shape)), default=0)


def by_scope(counted: list[Operation]) -> dict[str, Totals]:
    """Totals of each scope that occurs, most bytes first."""
    totals = {
        scope: Totals(
            sum(operation.bytes for operation in counted if operation.scope == scope),
            sum(operation.flops for operation in counted if operation.scope == scope),
        )
        for scope in {operation.scope for operation in counted}
    }
    return dict(sorted(totals.items(), key=lambda item: (-item[1].bytes, item[0])))


def rank_comparison(text: str) -> list[str]:
    """The lines, inside whichever fusion, that compare a token's logit and id with the whole vocabulary's."""
    computations, _ = _parse(text)
    return [
        without_metadata(f"%{found.name} = {found.shape} {found.opcode}({found.inside}){found.attributes}")
        for computation in computations.values()
        for found in computation.values()
        if found.opcode == "compare" and _named_scope(found.op_name) == "rank"
    ]


def result_shapes(text: str) -> list[str]:
    """Shapes of all arrays that the program returns, such as "s32[4,20]", in order."""
    for line in text.splitlines():
        if line.startswith("ENTRY "):
            return [found.group() for found in _ARRAY.finditer(line.rpartition(" -> ")[2])]
    raise ValueError("the text has no ENTRY computation")


def donations(text: str) -> dict[int, int]:
    """Index of a result (as in `result_shapes`) -> number of the parameter in whose memory it is written."""
    header = text.partition("\n")[0]
    return {int(result or 0): int(parameter) for result, parameter in _ALIAS.findall(header)}


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the one that runs."""
    computations: dict[str, _Computation] = {}
    entry = ""
    current: _Computation = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    return computations, entry


def _instruction(line: str) -> _Instruction:
    """Takes "ROOT %name = shape opcode(operands), attributes" apart."""
    left, _, right = line.partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opcode, _, _ = right[end:].lstrip().partition("(")
    start = right.index("(", end)
    close = _closing(right, start)
    rest = right[close + 1 :]
    op_name = _OP_NAME.search(rest)
    return _Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        shape=_LAYOUT.sub("", right[:end]),
        opcode=opcode,
        inside=right[start + 1 : close],
        attributes=without_metadata(rest),
        op_name=op_name[1] if op_name else "",
        root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"not a line of HLO: {text}")


def _run(computations: dict[str, _Computation], name: str, caller: str) -> Iterator[Operation]:
    """Operations of one computation and of those that it calls; `caller` is the scope it is called in."""
    computation = computations[name]
    scopes: dict[str, str] = {}
    for instruction in computation.values():
        scope = scopes[instruction.name] = _scope(instruction, scopes, caller)
        opcode = instruction.opcode
        if opcode in _NO_COST:
            continue
        moved = 0 if opcode in _CONTROL else _bytes(computations, computation, instruction)
        flops = _flops(computations, computation, instruction)
        yield Operation(instruction.name, opcode, instruction.shape, moved, flops, scope)
        if opcode in _CONTROL:
            for called in instruction.called:
                yield from _run(computations, called, scope)


def _named_scope(op_name: str) -> str | None:
    """The innermost of our scopes in a path such as "jit(decode_1)/layer_3/attention/mul"."""
    return next((part for part in reversed(op_name.split("/")) if part in SCOPES), None)


def _scope(instruction: _Instruction, scopes: dict[str, str], caller: str) -> str:
    """Own scope; where XLA made the operation and named nothing, that of the first operand which has one."""
    if named := _named_scope(instruction.op_name):
        return named
    if instruction.op_name or instruction.opcode in ("parameter", "constant"):
        return caller
    found = (scopes[operand] for operand in instruction.operands if scopes.get(operand, caller) != caller)
    return next(found, caller)


def _bytes(computations: dict[str, _Computation], computation: _Computation, instruction: _Instruction) -> int:
    if instruction.opcode != "fusion":
        reads = (_read(computation, instruction, i) for i in range(len(instruction.operands)))
        return sum(reads) + _written(computation, instruction)
    fused = computations[instruction.called[0]]
    reads = (_read_inside(fused, inner) for inner in fused.values() if inner.opcode == "parameter")
    root = next(inner for inner in fused.values() if inner.root)
    return sum(reads) + _written(fused, root)


def _read_inside(fused: _Computation, parameter: _Instruction) -> int:
    """Bytes that a fused computation reads of one of its parameters: the whole, or the pieces that are taken."""
    same = {parameter.name}
    taken = 0
    for inner in fused.values():
        for i, operand in enumerate(inner.operands):
            if operand in same and inner.opcode == "bitcast":
                same.add(inner.name)
            elif operand in same:
                taken += _read(fused, inner, i)
    return min(taken, _size(parameter.shape))


def _read(computation: _Computation, user: _Instruction, i: int) -> int:
    """Bytes that an operation reads of its operand i."""
    if user.opcode in _TAKES and i == 0:
        return _size(user.shape)
    if (user.opcode == "dynamic-update-slice" and i == 0) or (user.opcode == "scatter" and i < len(user.operands) // 2):
        return 0  # updated in place
    if _is_call_of(user, ROTATE_TARGET) and i in _PAGES[ROTATE_TARGET]:
        return 0  # updated in place
    if _is_call_of(user, ATTENTION_TARGET) and i in _PAGES[ATTENTION_TARGET]:
        pages, rows = (_dims(computation[user.operands[j]].shape)[0] for j in (i, 0))
        return _size(computation[user.operands[i]].shape) // pages * rows
    return _size(computation[user.operands[i]].shape)


def _written(computation: _Computation, writer: _Instruction) -> int:
    """Bytes that an operation, or the root of a fusion, writes."""
    sources = [computation[operand] for operand in writer.operands if operand in computation]
    match writer.opcode:
        case "tuple":
            return sum(_written(computation, source) for source in sources)
        case "bitcast":
            return _written(computation, sources[0])
        case "dynamic-update-slice":
            return _size(sources[1].shape)
        case "scatter":
            return sum(_size(update.shape) for update in sources[len(sources) // 2 + 1 :])
        case "custom-call" if _is_call_of(writer, ROTATE_TARGET):
            return _rotated(sources)
    return _size(writer.shape)


def _flops(computations: dict[str, _Computation], computation: _Computation, instruction: _Instruction) -> int:
    match instruction.opcode:
        case "fusion":
            fused = computations[instruction.called[0]]
            return sum(_flops(computations, fused, inner) for inner in fused.values())
        case "dot":
            left = _dims(computation[instruction.operands[0]].shape)
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            contracted = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
            return 2 * math.prod(_dims(instruction.shape)) * contracted
        case "custom-call" if _is_call_of(instruction, ATTENTION_TARGET):
            # Queries [R, T, H, E] against the keys of a page, then its values: see model/kernels/cpu/attention.py.
            queries, pages = (_dims(computation[instruction.operands[i]].shape) for i in (0, 1))
            return 2 * 2 * math.prod(queries) * pages[2]
        case "custom-call" if _is_call_of(instruction, SCORE_TARGET, SCORE_INT8_TARGET):
            vocab = re.search(r"vocab = (\d+)", instruction.attributes)
            return 2 * math.prod(_dims(computation[instruction.operands[0]].shape)) * int(vocab[1] if vocab else 0)
        case "custom-call" if _is_call_of(instruction, TARGET, INT8_TARGET):
            # x [M, K] and a packed weight give [M, N]: see model/kernels/cpu/linear.py.
            return 2 * math.prod(_dims(instruction.shape)) * _dims(computation[instruction.operands[0]].shape)[1]
    return 0


def _rotated(operands: list[_Instruction]) -> int:
    """Bytes written of heads [R, T, H + 2 K, E]: the queries, and in their pages [N, K, S, E] the keys and values."""
    heads, pages = _dims(operands[0].shape), [operands[i].shape for i in _PAGES[ROTATE_TARGET]]
    K, E = _dims(pages[0])[1], heads[3]
    stored = sum(_bits(page.partition("[")[0]) // 8 * K * E for page in pages)
    return math.prod(heads[:2]) * (4 * (heads[2] - 2 * K) * E + stored)


def _is_call_of(instruction: _Instruction, *targets: str) -> bool:
    return any(f'custom_call_target="{target}"' in instruction.attributes for target in targets)


def _dims(shape: str) -> list[int]:
    """Sizes of an array shape such as "f32[4,576]"."""
    return [int(size) for size in shape.partition("[")[2].rstrip("]").split(",") if size]


def _size(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple."""
    return sum(math.ceil(math.prod(_dims(found[0])) * _bits(found[1]) / 8) for found in _ARRAY.finditer(shape))


def _bits(dtype: str) -> int:
    """Bits of an element: "bf16" has 16, "f8e4m3fn" 8, "pred" a whole byte, "token" none."""
    digits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0
