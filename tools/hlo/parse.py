"""Parse XLA's optimized HLO into computations and instructions.

The text is that of `Compiled.as_text()`; its operations are described at https://openxla.org/xla/operation_semantics.
"""

import math
import re
from dataclasses import dataclass

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{")
_LAYOUT = re.compile(r"\{[^}]*\}|/\*.*?\*/")
# An array and its memory space: S(1) and above are on-chip memories of a TPU.
_PLACED = re.compile(r"\b[a-z]\w*\[[\d,]*\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]")
_METADATA = re.compile(r', metadata=\{(?:[^}"]|"[^"]*")*\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|condition|body|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)")
_SOURCE_TABLES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction of a computation."""

    name: str
    shape: str  # of the result, without layouts
    on_chip: tuple[bool, ...]  # per array: True if it is in on-chip memory
    opcode: str
    inside: str  # the parentheses after the opcode
    attributes: str  # the rest, without metadata
    op_name: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _NAME.findall(self.inside)

    @property
    def called(self) -> list[str]:
        """Names of called computations."""
        return _NAME.findall(" ".join(_CALLED.findall(self.attributes)))

    @property
    def traffic(self) -> int:
        """Bytes of the result's arrays in main memory."""
        sizes = array_sizes(self.shape)
        return sum(size for size, near in zip(sizes, self.on_chip, strict=True) if not near)


type Computation = dict[str, Instruction]  # by name, in order of execution


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return all computations by name, and the name of the entry.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
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


def without_sources(text: str) -> str:
    """Remove the tables of source locations, which name local files."""
    return _SOURCE_TABLES.sub("", text)


def without_metadata(line: str) -> str:
    """Remove metadata from HLO lines."""
    return _METADATA.sub("", line)


def arrays_of(shape: str) -> list[str]:
    """Return the arrays of a shape, such as "f32[4,576]", in order."""
    return [found.group() for found in _ARRAY.finditer(shape)]


def dims(shape: str) -> list[int]:
    """Sizes of the axes of an array."""
    return [int(size) for size in shape.partition("[")[2].rstrip("]").split(",") if size]


def array_sizes(shape: str) -> list[int]:
    """Bytes of each array of a shape."""
    return [math.ceil(math.prod(dims(array)) * bits(array.partition("[")[0]) / 8) for array in arrays_of(shape)]


def bits(dtype: str) -> int:
    """Bits of an element: 16 for "bf16", 8 for "f8e4m3fn" and "pred", 0 for "token"."""
    digits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0


def _instruction(line: str) -> Instruction:
    """Parse "ROOT %name = shape opcode(operands), attributes"."""
    left, _, right = line.partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opcode, _, _ = right[end:].lstrip().partition("(")
    start = right.index("(", end)
    close = _closing(right, start)
    rest = right[close + 1 :]
    op_name = _OP_NAME.search(rest)
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        shape=_LAYOUT.sub("", right[:end]),
        on_chip=tuple(bool(_ON_CHIP.search(found[1] or "")) for found in _PLACED.finditer(right[:end])),
        opcode=opcode,
        inside=right[start + 1 : close],
        attributes=without_metadata(rest),
        op_name=op_name[1] if op_name else "",
        root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"not a line of HLO: {text}")
