"""Small accidents of bytes. All come from one random.Random: the same seed gives the same accidents."""

import struct
from random import Random

# Lengths and numbers at which something ends or overflows.
EDGES = (0, 1, 2, 8, 32, 255, 256, 2**15, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)


def bytes_changed(data: bytes, random: Random) -> bytes:
    """`data` after one accident."""
    if not data:
        return random.randbytes(random.randrange(1, 9))
    at = random.randrange(len(data))
    match random.randrange(8):
        case 0:  # a bit
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + random.randbytes(1) + data[at + 1 :]
        case 2:
            return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]
        case 3:  # a piece is lost
            return data[:at] + data[at + random.randrange(1, 17) :]
        case 4:  # the end is lost
            return data[:at]
        case 5:  # a piece is there again, elsewhere
            start = random.randrange(len(data))
            return data[:at] + data[start : start + random.randrange(1, 65)] + data[at:]
        case 6:
            return data[:at] + edge(random, "<I") + data[at + 4 :]
        case _:
            return data[:at] + edge(random, "<Q") + data[at + 8 :]


def edge(random: Random, kind: str) -> bytes:
    """One of EDGES, or one beside it, as struct packs an unsigned number of that kind."""
    size = struct.calcsize(kind)
    return struct.pack(kind, (random.choice(EDGES) + random.choice((-1, 0, 0, 1))) % 2 ** (8 * size))
