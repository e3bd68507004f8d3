"""Ten thousand mutated request bodies: each is answered or rejected, and none leaks.

`make fuzz` continues from here, guided by coverage.
"""

import logging
from collections import Counter
from random import Random

import pytest

from tools.fuzz import bodies
from tools.fuzz.server import fuzz_server, send

pytestmark = pytest.mark.slow

_BODIES = 10_000


async def test_ten_thousand_mutated_bodies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # the server logs every request
    random, seeds = Random(1), bodies.seeds()
    statuses: Counter[int] = Counter()
    async with fuzz_server() as server:
        for _ in range(_BODIES):
            data = random.choice(seeds)
            for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
                data = bodies.mutate(data, random)
            statuses[await send(server, *bodies.unpack(data))] += 1
        await server.assert_idle()
    # Otherwise there were too many or too few mutations to test anything.
    assert min(statuses[200], statuses[400]) > _BODIES // 5


async def test_seed_bodies_are_answered() -> None:
    async with fuzz_server() as server:
        assert {await send(server, *bodies.unpack(data)) for data in bodies.seeds()} == {200}
