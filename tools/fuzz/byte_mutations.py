"""Random mutations of bytes, reproducible from the seed of a random.Random."""

import struct
from random import Random

# Boundary values of lengths and numbers.
EDGES = (0, 1, 2, 8, 32, 255, 256, 2**15, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return `data` after one mutation."""
    if not data:
        return random.randbytes(random.randrange(1, 9))
    index = random.randrange(len(data))
    match random.randrange(8):
        case 0:  # flip a bit
            return data[:index] + bytes([data[index] ^ 1 << random.randrange(8)]) + data[index + 1 :]
        case 1:
            return data[:index] + random.randbytes(1) + data[index + 1 :]
        case 2:
            return data[:index] + random.randbytes(random.randrange(1, 9)) + data[index:]
        case 3:  # delete a range
            return data[:index] + data[index + random.randrange(1, 17) :]
        case 4:  # truncate
            return data[:index]
        case 5:  # duplicate a range
            attempt = random.randrange(len(data))
            return data[:index] + data[attempt : attempt + random.randrange(1, 65)] + data[index:]
        case 6:
            return data[:index] + edge_value(random, "<I") + data[index + 4 :]
        case _:
            return data[:index] + edge_value(random, "<Q") + data[index + 8 :]


def edge_value(random: Random, kind: str) -> bytes:
    """Return a value of EDGES, or one off it, packed as the unsigned struct format `kind`."""
    size = struct.calcsize(kind)
    return struct.pack(kind, (random.choice(EDGES) + random.choice((-1, 0, 0, 1))) % 2 ** (8 * size))
