"""`python -m tools.portability MODEL --target h100`: compile a model's steps for absent hardware.

Only shapes are needed, neither weights nor the chip. `make portability` installs the compilers (libtpu and NVIDIA's
plug-in). The table has their figures per device: memory by kind, flops and bytes, with each loop body counted once.
Without a GPU, NVIDIA's compiler reports neither flops nor bytes, so `tools/hlo/operations.py` counts them. The table
also has the required work and its minimum time.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import hf_hub_download
from jax.stages import Compiled
from rich import box
from rich.console import Console
from rich.table import Table

from compiled.programs import Plan, Program, compile_plans
from compiled.runner import make_plans, state_plan, state_shapes
from compiled.shapes import Buckets, make_buckets
from model.config import ConfigError, ModelConfig
from model.config_hf import config_from_hf
from model.transformer import BoundModel
from model.weights.checkpoint import ModelLoadError
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from serve.config.values import error_reason
from tools.hlo import operations
from tools.portability.chips import (
    CHIPS,
    DEFAULT_TARGETS,
    Chip,
    TargetError,
    abstract_model,
    chip_of,
    mesh_of,
    use_compilers,
)
from tools.portability.roofline import Work, work_of

CONTEXT = 1024  # cached tokens per row, for the minimum time
_ALTERNATIVES = 20  # k, as in a server


@dataclass(frozen=True, slots=True)
class Report:
    """A compiler's figures for one program, per device."""

    program: Program
    argument_bytes: int  # weights, cache, slots and inputs
    result_bytes: int  # without the cache and slots, which are updated in place
    temp_bytes: int
    flops: float
    moved_bytes: float
    work: Work | None  # required work; None for programs that only fill memory

    @property
    def bytes(self) -> int:
        """Peak memory."""
        return self.argument_bytes + self.result_bytes + self.temp_bytes


@dataclass(frozen=True, slots=True)
class Rejection:
    """A program that a compiler rejected."""

    name: str
    reason: str
    argument_bytes: int  # weights, cache, slots and inputs, computed from their shapes


def reports(
    model: BoundModel, buckets: Buckets, *, pages: int, only: Sequence[str] = ()
) -> Iterator[Report | Rejection]:
    """Compile the programs of a server, one after another.

    Args:
        model: an abstract model on the mesh of a target.
        pages: N, pages of the cache.
        only: names of programs; all, if empty.

    Raises:
        TargetError: a name in `only` is unknown.
    """
    state = state_shapes(model, buckets, pages=pages)
    made = (*make_plans(model, buckets, state, _ALTERNATIVES), state_plan(model, state))
    plans = {plan.shape.name: plan for plan in made}
    for name in only:
        if name not in plans:
            raise TargetError(f"--program {name}: unknown; known: {', '.join(plans)}")
    for name, plan in plans.items():
        if not only or name in only:
            yield _report(model, plan)


def _report(model: BoundModel, plan: Plan) -> Report | Rejection:
    try:
        program = compile_plans([plan])[plan.shape]
    except Exception as error:  # noqa: BLE001 - any exception of a compiler is a result
        reason = error_reason(error)[:300]
        return Rejection(plan.shape.name, reason, sum(map(_bytes_on_each, jax.tree.leaves(plan.arguments))))
    memory: Any = program.compiled.memory_analysis()
    flops, moved = _counted(program)
    return Report(
        program,
        int(memory.argument_size_in_bytes),
        int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        int(memory.temp_size_in_bytes),
        flops,
        moved,
        work_of(model, plan.shape, CONTEXT),
    )


def _bytes_on_each(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an argument per device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return int(math.prod(shape)) * int(leaf.dtype.itemsize)


def _counted(program: Program) -> tuple[float, float]:
    """Flops and bytes of one call, from the compiler or else counted in the program's HLO."""
    costs = _cost_analysis(program.compiled)
    if "flops" in costs:
        return costs["flops"], costs.get("bytes accessed", 0.0)
    found = operations.operations(operations.hlo_text(program))
    return float(sum(each.flops for each in found)), float(sum(each.bytes for each in found))


def _cost_analysis(compiled: Compiled) -> dict[str, float]:
    analysis: Any = compiled.cost_analysis() or {}
    costs: dict[str, float] = analysis[0] if isinstance(analysis, list) else analysis
    return costs


def table_of(title: str, chip: Chip | None, found: Sequence[Report | Rejection]) -> Table:
    """Return a Markdown table of the programs of one model on one target."""
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    table.add_column("program")
    for column in (
        "compile s",
        "arguments MB",
        "results MB",
        "scratch MB",
        "Gflop",
        "MB moved",
        "MB required",
        "minimum ms",
    ):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for each in found:
        if isinstance(each, Rejection):
            table.add_row(each.name, "rejected", *("",) * 8)
            continue
        work = each.work
        table.add_row(
            each.program.name,
            f"{each.program.lower_seconds + each.program.compile_seconds:.1f}",
            _mb(each.argument_bytes),
            _mb(each.result_bytes),
            _mb(each.temp_bytes),
            f"{each.flops / 1e9:,.1f}",
            _mb(each.moved_bytes),
            _mb(work.read) if work else "",
            f"{work.seconds(chip) * 1e3:.3f}" if work and chip else "",
            work.bound(chip) if work and chip else "",
        )
    return table


def fits(target: str, found: Iterable[Report | Rejection]) -> bool:
    """True if the largest program fits into each chip's memory."""
    chip = chip_of(target)
    return chip is None or _peak_memory(found) <= chip.memory


def verdict(target: str, found: Sequence[Report | Rejection]) -> str:
    """Return whether the model fits, as text, with programs that the compiler rejected."""
    chip = chip_of(target)
    size = f"{_peak_memory(found) / 1e9:.1f} GB"
    if chip is None:
        return f"{target}: {size}"
    prefix = f"{target}: {size} of {chip.memory / 1e9:.1f} GB per chip: "
    if not fits(target, found):
        return prefix + "does NOT fit"
    return prefix + "; ".join([f"{each.name} was rejected: {each.reason}" for each in _rejected(found)] or ["fits"])


def _peak_memory(found: Iterable[Report | Rejection]) -> int:
    return max((each.argument_bytes if isinstance(each, Rejection) else each.bytes for each in found), default=0)


def _rejected(found: Iterable[Report | Rejection]) -> list[Rejection]:
    return [each for each in found if isinstance(each, Rejection)]


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def read_config(model: str) -> ModelConfig:
    """Read the configuration of a directory, config.json, .gguf file or hub id (only config.json is fetched).

    Raises:
        ConfigError: it cannot be read or is not supported.
        ModelLoadError: a GGUF file is damaged.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        checkpoint = open_checkpoint(ModelSource(model, path))
        try:
            return checkpoint.config
        finally:
            checkpoint.close()
    try:
        if path.is_dir():
            path /= "config.json"
        elif not path.exists():
            path = Path(hf_hub_download(model, "config.json"))
        return config_from_hf(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # the hub client raises many types
        raise ConfigError(f"{model}: {error_reason(error)}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if a model or target is unknown, or a program cannot be compiled."""
    options = _parser().parse_args(arguments)
    use_compilers()
    try:
        config = read_config(options.model)
        compiled = [
            _compile_for(target, config, options, Console(width=140)) for target in options.target or DEFAULT_TARGETS
        ]
    except (ConfigError, ModelLoadError, TargetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(compiled) else 1


def _compile_for(target: str, config: ModelConfig, options: argparse.Namespace, console: Console) -> bool:
    """Compile for one target and print the table; False if a program that would fit was rejected."""
    length, rows = min(options.max_model_len, config.max_position_embeddings), options.max_num_seqs
    model = abstract_model(config.for_length(length), options.dtype, mesh_of(target))
    segment = model.kernels.segment(model.platform)
    buckets = make_buckets(max_num_seqs=rows, max_model_len=length, max_num_batched_tokens=256 + rows, segment=segment)
    pages = rows * buckets.pages_per_row + 1
    found = list(reports(model, buckets, pages=pages, only=options.program))
    cache = pages * model.cache_layout.bytes_per_page / 1e6
    console.print(table_of(f"{options.model} for {target}, {options.dtype}, per chip", chip_of(target), found))
    note = f"cache {cache:,.0f} MB for {rows} rows of {length:,} tokens; required and minimum with {CONTEXT:,} cached"
    console.print(f"{verdict(target, found)}; {note}\n", soft_wrap=True)
    return not _rejected(found) or not fits(target, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.portability",
        description="Compile a model's steps for absent hardware.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="directory with a config.json, config.json, .gguf file or hub id")
    names = ", ".join(("cpu", *CHIPS))
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        help=f"{names}; with a slice: h100:8, v5e:2x2; repeatable; default: one chip of each and v5e:2x2",
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of weights and cache"
    )
    parser.add_argument("--max-num-seqs", type=_positive, default=16, help="concurrent requests")
    parser.add_argument("--max-model-len", type=_positive, default=4096, help="tokens of prompt and output")
    parser.add_argument("--program", action="append", default=[], help="such as decode_16; repeatable; default: all")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
