"""The memory plan: its sizes, the room for the cache, and when it fails."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from compiled.shapes import make_buckets
from model.config_hf import config_from_hf
from model.kernels.dispatch import Kernels
from model.kv_cache import PAGE_SIZE
from model.weights.loader import load_model, stored_weights
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, open_checkpoint
from serve.config.engine_config import EngineConfig
from serve.config.flags import parse_args
from serve.config.values import MemoryAmount
from serve.server import memory_plan
from serve.server.memory_plan import PlanError, count_pages, free_memory, plan_memory
from serve.server.model_files import resolve_dtype
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint
from tests.support.tiny_checkpoints import BF16, F32, TinyModel

CONFIG = config_from_hf(tiny_configs()["llama"])
BUCKETS = make_buckets(max_num_seqs=4, max_model_len=256, max_num_batched_tokens=64)
PLENTY = 1 << 34
WEIGHTS = 1 << 20


def pages(cache: MemoryAmount | None, free: int | None) -> int:
    config = EngineConfig(dtype="float32", kv_cache_memory=cache)
    return plan_memory(CONFIG, BUCKETS, config, weights=WEIGHTS, free=free).pages


@pytest.mark.parametrize("case", ["llama", "gemma3", "olmo2", "phi3"])
def test_weight_bytes_are_those_of_the_loaded_model(tmp_path: Path, case: str) -> None:
    config = tiny_configs()[case]
    write_checkpoint(tmp_path, config, random_weights(config, 1))
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint:
        model = load_model(checkpoint, "float32", kernels=Kernels())
        full, half, quarter = (
            stored_weights(checkpoint, storage).nbytes
            for storage in (Storage(F32), Storage(BF16), Storage(F32, "Q8_0"))
        )
    assert sum(leaf.nbytes for leaf in model.leaves) == full
    assert quarter < 0.8 * half  # rows of 48 take two blocks of 32
    assert half < 0.67 * full


def test_plan_memory_cache_size_by_default() -> None:
    all_rows = pages(None, PLENTY)
    assert all_rows == pages(None, None) == 4 * 4 + 1
    plan = plan_memory(CONFIG, BUCKETS, EngineConfig(dtype="float32"), weights=WEIGHTS, free=PLENTY)
    tight = plan.weights + plan.workspace + 7 * plan.page_bytes + 5
    assert pages(None, tight) == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plan_memory_halves_keys_and_values(dtype: str) -> None:
    half, full = (
        plan_memory(CONFIG, BUCKETS, EngineConfig(dtype=dtype, kv_cache_dtype=kv), weights=WEIGHTS, free=PLENTY)
        for kv in ("bfloat16", "float32")
    )
    elements = PAGE_SIZE * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
    assert full.page_bytes - half.page_bytes == 2 * elements
    assert full.weights == half.weights
    auto = plan_memory(CONFIG, BUCKETS, EngineConfig(dtype=dtype), weights=WEIGHTS, free=PLENTY)
    assert auto == (half if dtype == "bfloat16" else full)


def test_plan_memory_fraction_of_free_memory() -> None:
    plan = plan_memory(CONFIG, BUCKETS, EngineConfig(dtype="float32"), weights=WEIGHTS, free=PLENTY)
    free = plan.weights + plan.workspace + 100 * plan.page_bytes
    assert pages(0.5, free) == 50
    assert pages(30 * plan.page_bytes, free) == 30


@pytest.mark.parametrize(
    ("cache", "free", "message"),
    [
        (None, 10_000, r"out of memory: weights \d+ MB, cache \d+ MB, workspace about \d+ MB: \d+ MB of 0 MB"),
        (1 << 40, PLENTY, r"cache 1,09\d,\d+ MB.* of 17,180 MB.*a smaller --kv-cache-memory"),
        (10, PLENTY, r"--kv-cache-memory: 10 bytes are too few"),
        (0.5, None, r"--kv-cache-memory: this device does not report"),
    ],
)
def test_plan_memory_error_has_the_sizes(cache: MemoryAmount | None, free: int | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        pages(cache, free)


@pytest.mark.parametrize(
    ("stored", "flags", "expected"),
    [
        (np.float32, (), "float32"),
        (np.float16, (), "bfloat16"),
        (BF16, (), "bfloat16"),
        (np.float32, ("--quantization", "none"), "float32"),
        (BF16, ("--quantization", "none"), "bfloat16"),
        (BF16, ("--quantization", "int8"), "float32"),
        (BF16, ("--quantization", "q4_k"), "float32"),
        (BF16, ("--quantization", "int8", "--dtype", "bfloat16"), "bfloat16"),
        (np.float32, ("--dtype", "bfloat16"), "bfloat16"),
        (BF16, ("--dtype", "float32"), "float32"),
    ],
)
def test_chosen_dtype_of_safetensors(tmp_path: Path, stored: type, flags: tuple[str, ...], expected: str) -> None:
    folder = TinyModel().write_hf(tmp_path / "m", stored)
    with closing(open_checkpoint(ModelSource("m", folder))) as checkpoint:
        assert resolve_dtype(parse_args(flags), checkpoint) == expected


def test_chosen_dtype_of_mixed_matrices(tmp_path: Path) -> None:
    extra = {"blk.9.attn_q.weight": (np.zeros((2, 128), np.uint8), "BF16")}
    path = TinyModel().write_gguf(tmp_path / "m.gguf", "F32", extra)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert resolve_dtype(parse_args([]), checkpoint) == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("F32", (), "float32"),
        ("F16", (), "bfloat16"),
        ("Q8_0", (), "float32"),
        ("Q4_1", (), "float32"),
        ("Q4_1", ("--dtype", "bfloat16"), "bfloat16"),
        ("Q4_1", ("--quantization", "none"), "bfloat16"),
    ],
)
def test_chosen_dtype_of_gguf(tmp_path: Path, kind: str, flags: tuple[str, ...], expected: str) -> None:
    path = TinyModel().write_gguf(tmp_path / "m.gguf", kind)
    with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
        assert resolve_dtype(parse_args(flags), checkpoint) == expected


def test_count_pages_counts_full_pages() -> None:
    assert count_pages(1000, free=None, page_bytes=300) == 3
    assert count_pages(0.5, free=1000, page_bytes=250) == 2
    assert count_pages(1.0, free=1000, page_bytes=250) == 4


def test_count_pages_rejects_less_than_two_pages() -> None:
    assert count_pages(2000, free=None, page_bytes=1000) == 2
    with pytest.raises(ValueError, match=r"1,999 bytes are too few: a page takes 1,000 bytes"):
        count_pages(1999, free=None, page_bytes=1000)


def test_count_pages_rejects_a_fraction_of_unknown_memory() -> None:
    with pytest.raises(ValueError, match="give the size in bytes"):
        count_pages(0.5, free=None, page_bytes=1)


class Cgroups:
    """A tree of cgroups, and the process's place in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, membership: str) -> None:
        self._folder = folder
        members = folder / "members"
        members.write_text(membership)
        monkeypatch.setattr(memory_plan, "_CGROUP_LIST", members)
        monkeypatch.setattr(memory_plan, "_CGROUP_ROOT", folder)

    def write(self, group: str, limit: str, used: int, *, version: int = 2) -> None:
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = self._folder / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")


def test_free_memory_respects_the_limits_of_all_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = free_memory()
    assert machine is not None
    groups = Cgroups(monkeypatch, tmp_path, "0::/system.slice/logprobd.service\n")
    assert free_memory() is not None  # no such files
    groups.write("system.slice/logprobd.service", "5000", 2000)
    assert free_memory() == 3000
    groups.write("system.slice", "8000", 6000)
    assert free_memory() == 2000
    groups.write("", "1000", 999)
    assert free_memory() == 1
    groups.write("", "max", 999)
    assert free_memory() == 2000
    groups.write("system.slice/logprobd.service", "5000", 9000)
    assert free_memory() == 0
    groups.write("system.slice/other.service", "1", 1)
    groups.write("system.slice/logprobd.service", "max", 0)
    groups.write("system.slice", "max", 0)
    free = free_memory()
    assert free is not None
    assert free > 3000


def test_free_memory_respects_cgroups_of_version_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = Cgroups(monkeypatch, tmp_path, "9:cpuset,memory:/docker/a:b\n4:cpu:/c\n0::/\n")
    groups.write("memory/docker/a:b", "7000", 2000, version=1)
    assert free_memory() == 5000
    groups.write("memory", "7000", 6000, version=1)  # what a container sees of its own cgroup
    assert free_memory() == 1000


def test_free_memory_of_several_devices_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(**stats: int) -> Any:
        return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    devices = [device(bytes_limit=9000, bytes_in_use=1000), device(bytes_limit=9000, bytes_in_use=5000), device()]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert [free_memory(count) for count in (1, 2, 3)] == [8000, 4000, None]


def test_free_memory_is_shared_by_devices_of_one_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Cgroups(monkeypatch, tmp_path, "0::/\n").write("", "5000", 2000)
    assert free_memory(4) == 750
