"""Model files that are right but for some accidents: each is opened, or refused in words.

`make fuzz` goes on from here, guided by coverage.
"""

from collections import Counter
from random import Random

import pytest

from tools.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

_INPUTS = 1000


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_thousand_mutated_headers(name: str) -> None:
    target, random = TARGETS[name], Random(1)
    seeds, right = target.seeds(), Counter[object]()
    with target.opened() as run:
        for _ in range(_INPUTS):
            data = random.choice(seeds)
            for _ in range(random.choice((1, 1, 2, 3))):
                data = target.mutated(data, random)
            right[run(data)] += 1
    # Else the accidents were too bad, or too few, to try anything.
    assert min(right[True], right[False]) > _INPUTS // 20


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_seed_files_are_opened(name: str) -> None:
    with TARGETS[name].opened() as run:
        assert all(run(data) for data in TARGETS[name].seeds())
