"""A model's steps compile for absent chips, with the real compilers and the kernels meant for them."""

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compiled.shapes import PENALTIES, DecodeShape, HeadShape, PrefillShape
from model.config_hf import config_from_hf
from tools.portability import roofline
from tools.portability.chips import CHIPS, DEFAULT_TARGETS, Chip, TargetError, abstract_model, mesh_of
from tools.portability.roofline import Work, work_of
from tools.portability.target_facts import CASES

ROOT = Path(__file__).parents[2]
COMPILERS = Path(sys.prefix) / "targets"
QWEN = ROOT / "examples" / "configs" / "Qwen2.5-0.5B" / "config.json"
FORWARD = ("decode_4", "prefill_16", "packed_16")
MEMORY = ("copy_pages", "penalties", "zero_state")  # compute nothing
PROGRAMS = {*FORWARD, *MEMORY, "score_16", "full_vocab_8"}
IN_XLA = ("float32", "float32 cache", "large heads")  # cases without a kernel for their attention
TPUS = ("v5e:1x1", "v5e:2x2", "v5p:1x1x1", "v6e:1x1")

needs_compilers = pytest.mark.skipif(
    not COMPILERS.is_dir(), reason="no compilers next to this Python: `make portability` installs them"
)


@pytest.fixture(scope="module")
def facts(target_facts: str) -> Mapping[str, Mapping[str, Any]]:
    """Case -> program -> facts of a tiny model."""
    parsed: Mapping[str, Mapping[str, Any]] = json.loads(target_facts)
    return parsed


@pytest.mark.slow
def test_compilers_are_installed_on_linux_x86_64() -> None:
    """Otherwise the following tests would be skipped silently."""
    assert COMPILERS.is_dir() or (platform.system(), platform.machine()) != ("Linux", "x86_64")


@needs_compilers
@pytest.mark.parametrize("case", CASES)
def test_every_program_compiles(facts: Any, case: str) -> None:
    assert set(facts[case]) == set(CASES[case].only or PROGRAMS)
    for name, fact in facts[case].items():
        assert "rejected" not in fact, f"{name}: {fact}"
        assert sum(fact["bytes"]) > 0
        assert fact["moved"] > 0
        assert fact["flops"] > 1e5 or name in MEMORY


@needs_compilers
@pytest.mark.parametrize("case", CASES)
def test_attention_uses_the_platforms_kernel(facts: Any, case: str) -> None:
    target, in_xla = CASES[case].target, case in IN_XLA
    calls = {
        "c": "logprobd_attention",
        "h": "__gpu$xla.gpu.triton",
        "a": "__gpu$xla.gpu.triton",
        "v": "tpu_custom_call",
    }
    own = calls[target[0]]
    if target == "cpu" and not any("logprobd" in call for call in facts["cpu"]["score_16"]["calls"]):
        pytest.skip("no kernels have been built here")
    for name, fact in facts[case].items():
        holds = name in FORWARD and not in_xla
        assert fact["attention"] is holds, name
        assert (own in fact["calls"]) is holds, name
        assert not set(calls.values()) - {own} & set(fact["calls"])


@needs_compilers
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.quantization])
def test_cache_is_updated_in_place(facts: Any, case: str) -> None:
    """No page is copied or transposed."""
    joined = CASES[case].target in TPUS and case not in IN_XLA
    arrays = 6 if joined else 7  # keys and values of the layer joined or separate; hidden; four arrays of slots
    for name in {*FORWARD, "penalties", "copy_pages"} & set(facts[case]):
        assert facts[case][name]["donated"] == arrays
        assert facts[case][name]["copies of pages"] == 0
    if "odd sizes" in case:
        assert facts[case]["score_16"]["copies of pages"] == 0


@needs_compilers
@pytest.mark.parametrize(("case", "shards"), [("v5e:2x2", 4), ("odd sizes, four chips", 4), ("two gpus", 2)])
def test_collectives_move_no_logits(facts: Any, case: str, shards: int) -> None:
    """Collectives move hidden states, candidates and sums, never columns of V."""
    hidden = CASES[case].changes.get("hidden_size", 64)
    known = {hidden, hidden // shards}
    for name, fact in facts[case].items():
        if name in MEMORY:
            continue
        assert fact["collectives"] > 0
        assert set(fact["axes moved"]) - known <= set(range(4 * 20 + 1)), name  # rows, and the top 20 of each shard


@needs_compilers
def test_one_chip_has_no_collectives(facts: Any) -> None:
    for case in set(DEFAULT_TARGETS) - {"v5e:2x2"}:
        assert facts[case]["decode_4"]["collectives"] == 0


@needs_compilers
def test_four_chips_share_weights_and_cache(facts: Any) -> None:
    one, four = (facts[target]["decode_4"]["bytes"][0] for target in ("v5e:1x1", "v5e:2x2"))
    assert four < 0.7 * one  # more than a quarter because of padding


@needs_compilers
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.quantization])
def test_packed_weights_are_never_dequantized_as_a_whole(facts: Any, case: str) -> None:
    fact = facts[case]["score_16"]
    assert fact["bytes"][2] < 65_536 * 1024  # a quarter of the head in float32


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.portability", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_table_has_memory_work_and_verdict() -> None:
    done = run(str(QWEN), "--target", "cpu", "--program", "penalties", "--max-num-seqs", "2", "--max-model-len", "256")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| penalties")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 9 pages of 24 layers of 2 heads of 64, twice, with 896 hidden features; 3 slots of 9 bytes a token.
    cache, slots = 9 * 64 * (24 * 2 * 2 * 64 + 896) * 2, 3 * 9 * 151_936
    assert float(cells[2].replace(",", "")) == pytest.approx((cache + slots) / 1e6 + 9 * 151_936 / 1e6, abs=0.2)
    assert "cpu: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((str(QWEN), "--target", "b200"), "b200: unknown target; known: cpu, a100, h100, v5e, v5p, v6e"),
        (("examples/configs", "--target", "cpu"), "examples/configs: "),
        (("README.md", "--target", "cpu"), "README.md: "),
        (
            (str(QWEN), "--target", "cpu", "--program", "decode_17"),
            "--program decode_17: unknown; known: decode_1, decode_2",
        ),
    ],
)
def test_wrong_arguments_are_one_error_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_unknown_slice_names_the_target() -> None:
    with pytest.raises(TargetError, match=r"^v5e:banana: "):
        mesh_of("v5e:banana")


def qwen() -> Any:
    return abstract_model(config_from_hf(json.loads(QWEN.read_text("utf-8"))), "bfloat16")


def test_work_of_a_decode_step() -> None:
    step = work_of(qwen(), DecodeShape(16, 64), context=1000)
    assert step is not None
    matrices = 24 * (896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864) + 151_936 * 896
    assert step.read == 2 * (matrices + 16 * 896) + 16 * 1000 * 24 * 2 * 128 * 2
    assert step.flops == 2 * 16 * matrices + 4 * 16 * 1000 * 24 * 896
    assert step.linked == 0


def test_work_of_prefill_and_score() -> None:
    decode, prefill = (work_of(qwen(), shape, context=0) for shape in (DecodeShape(1, 64), PrefillShape(1, 256, 64)))
    block = work_of(qwen(), HeadShape(64, full_vocab=False), context=0)
    assert decode is not None
    assert prefill is not None
    assert block is not None
    assert prefill.flops == 256 * (decode.flops - 2 * 151_936 * 896)
    assert block.flops == 64 * 2 * 151_936 * 896
    assert work_of(qwen(), PENALTIES, context=0) is None


def test_work_of_experts() -> None:
    """One token uses 8 of 128 experts, 16 tokens 82.4 in the mean."""
    config = json.loads((QWEN.parents[1] / "Qwen3-30B-A3B" / "config.json").read_text("utf-8"))
    model = abstract_model(config_from_hf(config), "bfloat16")
    one, many = (work_of(model, DecodeShape(rows, 64), context=0) for rows in (1, 16))
    assert one is not None
    assert many is not None
    others = 48 * (2048 * (4096 + 2 * 512) + 4096 * 2048 + 128 * 2048) + 151_936 * 2048
    expert = 48 * 3 * 2048 * 768
    assert one.flops == 2 * (others + 8 * expert)
    assert many.flops == 16 * one.flops
    assert one.read == 2 * (others + 8 * expert + 2048)
    assert many.read == pytest.approx(2 * (others + 82.4 * expert), rel=1e-3)


def test_work_on_a_tpu_counts_no_padding() -> None:
    """576 features are stored as 640; two heads of 64 as two of 128, for keys and values, in 24 layers."""
    config = dataclasses.replace(qwen().config, hidden_size=576)
    device: Any = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    mesh: Any = SimpleNamespace(size=1, devices=np.array([device]))
    model = dataclasses.replace(qwen(), config=config, mesh=mesh)
    few, many = (work_of(model, DecodeShape(1, 64), context=tokens) for tokens in (0, 10))
    assert few is not None
    assert many is not None
    assert many.read - few.read == 10 * 24 * 2 * 2 * 128 * 2


def test_ring_all_reduce_moves_twice() -> None:
    """Each of 4 devices sends and receives three quarters, twice."""
    assert roofline._linked(4, 100) == 2 * 2 * 75
    assert roofline._linked(1, 100) == 0


def test_minimum_time_is_the_slowest_resource_plus_links() -> None:
    chip = Chip(memory=10, bandwidth=100.0, peak=1000.0, links=50.0)
    assert Work(read=200, flops=1000, linked=0).seconds(chip) == 2
    assert Work(read=200, flops=1000, linked=0).bound(chip) == "memory"
    assert Work(read=200, flops=3000, linked=50).seconds(chip) == 4
    assert Work(read=200, flops=3000, linked=500).bound(chip) == "links"


def test_chip_figures_are_plausible() -> None:
    """A wrong unit (Gbit for GB, TB for GB) would be a factor of 8 or 1000."""
    for chip in CHIPS.values():
        assert 10e9 < chip.memory < 200e9
        assert 0.5e12 < chip.bandwidth < 5e12
        assert 50 < chip.peak / chip.bandwidth < 1000
        assert 1.5 < chip.bandwidth / chip.links < 5
