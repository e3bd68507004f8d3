"""A model that is cut over devices says what one device says, and no logit leaves its shard."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sharded_numbers import CASES

PAIRS = [(case, devices) for case, (*_, counts) in CASES.items() for devices in counts]

# What is summed over shards is summed in another order: a few of float32's last digits. Where sums are rounded to
# bfloat16 on their way, those digits can move a rounding.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture(scope="session")
def told() -> Any:
    made = subprocess.run(
        [sys.executable, "-m", "tests.sharded_numbers"], cwd=Path(__file__).parents[1], capture_output=True, check=True
    )
    return json.loads(made.stdout)


@pytest.mark.parametrize(("case", "devices"), PAIRS)
def test_the_numbers_are_those_of_one_device(told: Any, case: str, devices: int) -> None:
    one, cut = told[case]["1"], told[case][str(devices)]
    tolerance = TOLERANCE[CASES[case][2]]
    for name in ("prompt", "top", "named", "whole", "greedy", "drawn logprobs"):
        np.testing.assert_allclose(cut[name], one[name], rtol=0, atol=tolerance, err_msg=name)
    if CASES[case][2] == "float32":  # a rounding that has moved can make two tokens change places
        assert cut["ranks"] == one["ranks"]
        assert (cut["greedy token"], cut["drawn"]) == (one["greedy token"], one["drawn"])
    assert len(set(one["drawn"])) > 3  # it was a draw


@pytest.mark.parametrize(("case", "devices"), PAIRS)
def test_company_changes_no_bit(told: Any, case: str, devices: int) -> None:
    assert not told[case][str(devices)]["changed by company"]


def test_no_logit_leaves_its_shard(told: Any) -> None:
    """What is gathered or summed over devices is hidden states, counts, sums and the best k: never columns of V."""
    moved = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", told["hlo"])
    kinds = {opcode for _, opcode in moved}
    assert kinds == {"all-gather", "all-reduce"}  # the hidden states' features and candidates; everything else
    width = 384  # columns of V in each of four shards, the last one filled up
    assert f"f32[4,{width}]" in told["hlo"]
    for shape, opcode in moved:
        for axes in re.findall(r"\w+\[([\d,]*)\]", shape):
            sizes = [int(size) for size in axes.split(",") if size]
            assert max(sizes, default=1) < 128, f"{opcode} of {shape}"
