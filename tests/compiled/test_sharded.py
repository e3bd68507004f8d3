"""A sharded model gives the results of one device, and no logit leaves its shard."""

import json
import re
from typing import Any

import numpy as np
import pytest

from tests.support.sharded_logprobs import CASES
from tools.hlo import operations

PAIRS = [(case, devices) for case, (*_, counts) in CASES.items() for devices in counts]

WIDTH = 384

# Sums over shards have another order, which changes the last digits of float32. Where such sums are rounded to
# bfloat16, the rounded value can differ.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture(scope="session")
def results(sharded_logprobs: str) -> Any:
    return json.loads(sharded_logprobs)


@pytest.mark.parametrize(("case", "devices"), PAIRS)
def test_sharded_logprobs_equal_one_device(results: Any, case: str, devices: int) -> None:
    one, cut = results[case]["1"], results[case][str(devices)]
    tolerance = TOLERANCE[CASES[case][2]]
    for name in ("prompt", "top", "named", "whole", "greedy", "drawn logprobs"):
        np.testing.assert_allclose(cut[name], one[name], rtol=0, atol=tolerance, err_msg=name)
    if CASES[case][2] == "float32":  # a difference in rounding can swap two tokens
        assert cut["ranks"] == one["ranks"]
        assert (cut["greedy token"], cut["drawn"]) == (one["greedy token"], one["drawn"])
    assert len(set(one["drawn"])) > 3  # a tie


@pytest.mark.parametrize(("case", "devices"), PAIRS)
def test_sharded_logprobs_are_the_same_alone_and_in_a_batch(results: Any, case: str, devices: int) -> None:
    assert not results[case][str(devices)]["changed by company"]


@pytest.mark.parametrize("program", ["decode_4", "prefill_16", "score_16", "full_vocab_8"])
def test_sharded_programs_move_no_logits(results: Any, program: str) -> None:
    """Devices exchange hidden states, counts, sums and the best k, never columns of V."""
    text = results["hlo"][program]
    moved = operations.collectives(operations.operations(text))
    kinds = {operation.opcode for operation in moved}
    assert kinds <= {"all-gather", "all-reduce"}  # the hidden states' features and candidates; everything else
    assert "all-reduce" in kinds
    if program != "prefill_16":
        assert re.search(rf"f32\[\d+,{WIDTH}\]", text)  # columns of V in each of four shards, the last one padded
    for operation in moved:
        assert operations.widest_axis(operation.shape) < 128, f"{operation.opcode} of {operation.shape}"
