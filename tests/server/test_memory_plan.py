"""The plan of memory: what it adds up to, what it leaves for the cache, and when it refuses."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from compiled.shapes import make_buckets
from model.config_hf import config_from_hf
from model.weights.loader import load_model, weight_bytes
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from serve.config.flags import parse_args
from serve.config.sizes import MemoryAmount
from serve.server.memory_plan import PlanError, plan_memory
from serve.server.startup import chosen_dtype
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint
from tests.support.tiny_checkpoints import BF16, TinyModel

CONFIG = config_from_hf(tiny_configs()["llama"])
BUCKETS = make_buckets(max_num_seqs=4, max_model_len=256, max_num_batched_tokens=64)
PLENTY = 1 << 34


def pages(asked: MemoryAmount | None, free: int | None) -> int:
    return plan_memory(CONFIG, BUCKETS, dtype="float32", int8=False, asked=asked, free=free).pages


@pytest.mark.parametrize("case", ["llama", "gemma3", "olmo2", "phi3"])
def test_weights_take_what_was_planned(tmp_path: Path, case: str) -> None:
    config = tiny_configs()[case]
    write_checkpoint(tmp_path, config, random_weights(config, 1))
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint:
        model = load_model(checkpoint, "float32")
    assert sum(leaf.nbytes for leaf in model.leaves) == weight_bytes(checkpoint.config, "float32")
    half, int8 = (weight_bytes(checkpoint.config, "bfloat16", int8=each) for each in (False, True))
    assert int8 < 0.6 * half < 0.4 * weight_bytes(checkpoint.config, "float32")


def test_the_cache_holds_all_rows_or_what_there_is_room_for() -> None:
    whole = pages(None, PLENTY)
    assert whole == pages(None, None) == 4 * 4 + 1
    plan = plan_memory(CONFIG, BUCKETS, dtype="float32", int8=False, asked=None, free=PLENTY)
    tight = plan.weights + plan.workspace + 7 * plan.page_bytes + 5
    assert pages(None, tight) == 7


def test_a_share_is_of_what_weights_and_workspace_leave() -> None:
    plan = plan_memory(CONFIG, BUCKETS, dtype="float32", int8=False, asked=None, free=PLENTY)
    free = plan.weights + plan.workspace + 100 * plan.page_bytes
    assert pages(MemoryAmount(0.5), free) == 50
    assert pages(MemoryAmount(30 * plan.page_bytes), free) == 30


@pytest.mark.parametrize(
    ("asked", "free", "message"),
    [
        (None, 10_000, r"it does not fit: weights \d+ MB, cache \d+ MB, workspace about \d+ MB: \d+ MB of 0 MB"),
        (MemoryAmount(1 << 40), PLENTY, r"cache 1,09\d,\d+ MB.* of 17,180 MB.*a smaller --kv-cache-memory"),
        (MemoryAmount(10), PLENTY, r"--kv-cache-memory: 10 bytes hold no page"),
        (MemoryAmount(0.5), None, r"--kv-cache-memory: this device does not tell"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    asked: MemoryAmount | None, free: int | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        pages(asked, free)


@pytest.mark.parametrize(
    ("stored", "flags", "expected"),
    [
        (np.float32, (), "float32"),
        (np.float16, (), "bfloat16"),
        (BF16, (), "bfloat16"),
        (np.float32, ("--quantization", "int8"), "bfloat16"),
        (np.float32, ("--dtype", "bfloat16"), "bfloat16"),
        (BF16, ("--dtype", "float32"), "float32"),
    ],
)
def test_auto_is_how_the_model_is_stored(tmp_path: Path, stored: type, flags: tuple[str, ...], expected: str) -> None:
    folder = TinyModel().write_hf(tmp_path / "m", stored)
    with closing(open_checkpoint(ModelSource("m", folder))) as checkpoint:
        assert chosen_dtype(parse_args(flags), checkpoint) == expected


def test_auto_is_float32_only_where_all_matrices_are(tmp_path: Path) -> None:
    extra = {"blk.9.attn_q.weight": (np.zeros((2, 128), np.uint8), "BF16")}
    path = TinyModel().write_gguf(tmp_path / "m.gguf", "F32", extra)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert chosen_dtype(parse_args([]), checkpoint) == "bfloat16"


@pytest.mark.parametrize(("kind", "expected"), [("F32", "float32"), ("Q8_0", "bfloat16"), ("F16", "bfloat16")])
def test_auto_for_gguf(tmp_path: Path, kind: str, expected: str) -> None:
    path = TinyModel().write_gguf(tmp_path / "m.gguf", kind)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert chosen_dtype(parse_args([]), checkpoint) == expected
