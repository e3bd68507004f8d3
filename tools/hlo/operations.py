"""Operations of a compiled program: bytes, flops, and the part of the model they belong to.

The input is XLA's optimized HLO as printed by `Compiled.as_text()`. Counts are derived from the text, not measured:

- Loop bodies and all branches of conditionals count once, because the text does not contain their frequency. In decode,
  sampling is therefore the cost of one draw and attention that of one page per row, both for XLA's loop and for a
  kernel.
- Bytes are those of operands and results, from memory or a cache; a TPU's on-chip memories are left out. A gathered or
  sliced array counts only the bytes taken, an array updated in place only the bytes written.
- Flops are those of matrix products: `dot`, `convolution` and our kernels.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from compiled.programs import Program
from tools.hlo.cost import bytes_of, flops_of
from tools.hlo.parse import Computation, Instruction, arrays_of, dims, parse, without_metadata, without_sources

SCOPES = ("attention", "mlp", "head", "sample", "logprobs", "rank")  # names set by jax.named_scope
OTHER = "other"  # embedding, rotary angles, final norm, hidden pages
COLLECTIVES = frozenset({"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"})

_NO_COST = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})
_SOURCES = frozenset({"parameter", "constant"})
_CONTROL = frozenset({"while", "conditional", "call"})
_LAYER = re.compile(r"(?:^|/)layer_(\d+)/")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)")


@dataclass(frozen=True, slots=True)
class Operation:
    """An executed operation. A fusion is one operation, because its inner values cause no memory traffic."""

    name: str
    opcode: str
    shape: str  # of the result, such as "f32[4,576]"; a tuple in parentheses
    bytes: int  # read and written; 0 for while, conditional and call, whose bodies follow
    flops: int
    scope: str  # one of SCOPES, or OTHER
    layer: int | None = None  # decoder layer; None outside of layers


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over operations."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of a model that an instruction belongs to."""

    scope: str = OTHER
    layer: int | None = None


def hlo_text(program: Program) -> str:
    """Return the optimized HLO of a program without source locations, which name local files.

    Raises:
        ValueError: the platform keeps no text of its executables.
    """
    text = program.compiled.as_text()
    if text is None:
        raise ValueError(f"{program.name}: this platform gives no HLO text")
    return without_sources(text)


def operations(text: str) -> list[Operation]:
    """Return all executed operations in order; the module docstring explains the counts.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    computations, entry = parse(text)
    return list(_run(computations, entry, _Part()))


def collectives(counted: Iterable[Operation]) -> list[Operation]:
    """Return the operations that move arrays between devices; of asynchronous ones, the start."""
    return [operation for operation in counted if operation.opcode.removesuffix("-start") in COLLECTIVES]


def widest_axis(shape: str) -> int:
    """Return the longest axis of an array or tuple shape; 0 for scalars."""
    return max((max(dims(array), default=0) for array in arrays_of(shape)), default=0)


def by_scope(counted: list[Operation]) -> dict[str, Totals]:
    """Return totals per scope, most bytes first."""
    totals = {
        scope: totals_of(operation for operation in counted if operation.scope == scope)
        for scope in {operation.scope for operation in counted}
    }
    return dict(sorted(totals.items(), key=lambda item: (-item[1].bytes, item[0])))


def by_layer(counted: list[Operation]) -> dict[int | None, Totals]:
    """Return totals per decoder layer in order, then (None) outside of layers."""
    layers: list[int | None] = [*sorted({each.layer for each in counted if each.layer is not None}), None]
    return {layer: totals_of(each for each in counted if each.layer == layer) for layer in layers}


def totals_of(counted: Iterable[Operation]) -> Totals:
    """Sum over operations."""
    each = list(counted)
    return Totals(sum(operation.bytes for operation in each), sum(operation.flops for operation in each))


def rank_comparison(text: str) -> list[str]:
    """Return the lines that compare a token's logit and id with those of the full vocabulary."""
    computations, _ = parse(text)
    return [
        without_metadata(f"%{found.name} = {found.shape} {found.opcode}({found.inside}){found.attributes}")
        for computation in computations.values()
        for found in computation.values()
        if found.opcode == "compare" and _named_scope(found.op_name) == "rank"
    ]


def result_shapes(text: str) -> list[str]:
    """Return the shapes of all results, such as "s32[4,20]", in order."""
    for line in text.splitlines():
        if line.startswith("ENTRY "):
            return arrays_of(line.rpartition(" -> ")[2])
    raise ValueError("the text has no ENTRY computation")


def donations(text: str) -> dict[int, int]:
    """Return index of a result (as in `result_shapes`) -> number of the parameter whose memory it reuses."""
    header = text.partition("\n")[0]
    return {int(result or 0): int(parameter) for result, parameter in _ALIAS.findall(header)}


def _run(computations: dict[str, Computation], name: str, caller: _Part) -> Iterator[Operation]:
    """Yield the operations of a computation and its callees; `caller` is the part that calls it."""
    computation = computations[name]
    parts = _parts(computation, caller)
    for instruction in computation.values():
        part = parts[instruction.name]
        opcode = instruction.opcode
        if opcode in _NO_COST:
            continue
        moved = 0 if opcode in _CONTROL else bytes_of(computations, computation, instruction)
        flops = flops_of(computations, computation, instruction)
        yield Operation(instruction.name, opcode, instruction.shape, moved, flops, part.scope, part.layer)
        if opcode in _CONTROL:
            for called in instruction.called:
                yield from _run(computations, called, part)


def _named_scope(op_name: str) -> str | None:
    """Return the innermost scope in a path such as "jit(decode_1)/layer_3/attention/mul"."""
    return next((part for part in reversed(op_name.split("/")) if part in SCOPES), None)


def _parts(computation: Computation, caller: _Part) -> dict[str, _Part]:
    """The part of each instruction.

    Its own; where XLA made the operation and named nothing, that of its first operand which has one, or else of its
    first user: what a TPU fetches ahead belongs to who waits for it.
    """
    parts = {instruction.name: _named(instruction, caller) for instruction in computation.values()}
    unnamed = [each for each in computation.values() if not each.op_name and each.opcode not in _SOURCES]
    for instruction in unnamed:
        found = (parts[operand] for operand in instruction.operands if parts.get(operand, caller) != caller)
        parts[instruction.name] = next(found, caller)
    users: dict[str, list[str]] = {each.name: [] for each in unnamed}
    for instruction in computation.values():
        for operand in instruction.operands:
            if operand in users and not instruction.root:
                users[operand].append(instruction.name)
    for instruction in reversed(unnamed):
        if parts[instruction.name] == caller:
            found = (parts[user] for user in users[instruction.name] if parts[user] != caller)
            parts[instruction.name] = next(found, caller)
    return parts


def _named(instruction: Instruction, caller: _Part) -> _Part:
    """Return the part in an instruction's name, or the caller's."""
    scope, layer = _named_scope(instruction.op_name), _LAYER.search(instruction.op_name)
    return _Part(scope, int(layer[1]) if layer else None) if scope else caller
