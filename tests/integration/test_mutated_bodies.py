"""Ten thousand bodies that are right but for some accidents: each is answered or refused, and leaves nothing behind.

`make fuzz` goes on from here, guided by coverage.
"""

import logging
from collections import Counter
from random import Random

import pytest

from tools.fuzz import bodies
from tools.fuzz.server import answering, asked

pytestmark = pytest.mark.slow

_BODIES = 10_000


async def test_ten_thousand_mutated_bodies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # the server writes every request to the log
    random, seeds = Random(1), bodies.seeds()
    statuses: Counter[int] = Counter()
    async with answering() as server:
        for _ in range(_BODIES):
            data = random.choice(seeds)
            for _ in range(random.choice((1, 1, 2, 3))):
                data = bodies.mutated(data, random)
            statuses[await asked(server, *bodies.unpacked(data))] += 1
        await server.assert_idle()
    # Else the accidents were too bad, or too few, to try anything.
    assert min(statuses[200], statuses[400]) > _BODIES // 5


async def test_seed_bodies_are_answered() -> None:
    async with answering() as server:
        assert {await asked(server, *bodies.unpacked(data)) for data in bodies.seeds()} == {200}
