"""A thousand mutated model files: each is opened, or rejected with a message.

`make fuzz` continues from here, guided by coverage.
"""

from collections import Counter
from random import Random

import pytest

from tools.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

_INPUTS = 1000


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_open_thousand_mutated_headers(name: str) -> None:
    target, random = TARGETS[name], Random(1)
    seeds, accepted = target.seeds(), Counter[object]()
    with target.open() as run:
        for _ in range(_INPUTS):
            data = random.choice(seeds)
            for _ in range(random.choice((1, 1, 2, 3))):
                data = target.mutate(data, random)
            accepted[run(data)] += 1
    # Otherwise there were too many or too few mutations to test anything.
    assert min(accepted[True], accepted[False]) > _INPUTS // 20


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_open_seed_files(name: str) -> None:
    with TARGETS[name].open() as run:
        assert all(run(data) for data in TARGETS[name].seeds())
