"""`python -m tools.fuzz [requests|gguf|safetensors ...]`: fuzz for some minutes and print the findings.

Each target runs in its own process, one after another. The corpus is kept for the next run. Inputs that fail are saved
in DIR/TARGET/findings; `--replay FILE` runs one of them again.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TARGETS = ("requests", "gguf", "safetensors")
_MAX_STARTS = 50  # of a target whose process keeps dying
# With one heap per thread, the memory limit would count address space that is only reserved.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "JAX_PLATFORMS": "cpu"}


@dataclass(slots=True)
class Outcome:
    """Result of fuzzing one target."""

    target: str
    runs: int = 0
    seconds: float = 0.0
    coverage: int = 0  # edges in instrumented code
    findings: list[Path] = field(default_factory=list)

    def read(self, log: str) -> None:
        """Add the statistics in a process's log."""
        self.runs += sum(int(each) for each in re.findall(r"stat::number_of_executed_units: +(\d+)", log))
        self.coverage = max([self.coverage, *(int(each) for each in re.findall(r" cov: (\d+)", log))])


def _fuzz(target: str, folder: Path, seconds: float, seed: int) -> Outcome:
    """Run a target until its time is over; restart it after an input that ended the process."""
    outcome, findings = Outcome(target), folder / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    before = set(findings.glob("*"))
    start = time.monotonic()
    for attempt in range(_MAX_STARTS):
        remaining = seconds - (time.monotonic() - start)
        if remaining < 1:
            break
        command = [sys.executable, "-m", "tools.fuzz.child", target]
        command += [str(folder), f"{remaining:.0f}", str(seed + attempt)]
        known = set(findings.glob("*"))
        log, environment = folder / f"log-{attempt}.txt", os.environ | _ENVIRONMENT
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        text = log.read_text(encoding="utf-8", errors="replace")
        outcome.read(text)
        if code and known == set(findings.glob("*")):
            raise SystemExit(f"{target}: the process ended with {code} without a finding\n{text[-3000:]}")
    outcome.seconds = time.monotonic() - start
    outcome.findings = sorted(path for path in findings.glob("*") if path not in before and path.suffix != ".txt")
    return outcome


def _replay(target: str, paths: Sequence[Path]) -> None:
    """Run inputs again; an exception ends this process."""
    from tools.fuzz.targets import TARGETS

    with TARGETS[target].open() as run:
        for path in paths:
            run(path.read_bytes())
            print(f"{path}: no failure")


def _print(outcomes: Sequence[Outcome]) -> None:
    print(f"{'target':12} {'runs':>10} {'seconds':>8} {'coverage':>9} {'findings':>9}")
    for each in outcomes:
        numbers = f"{each.runs:>10,} {each.seconds:>8.0f} {each.coverage:>9,} {len(each.findings):>9}"
        print(f"{each.target:12} {numbers}")
    for path in (path for each in outcomes for path in each.findings):
        print(path)


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(_TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, default=3.0, help="total for all targets; default: 3")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), metavar="DIR", help="default: .fuzz")
    parser.add_argument(
        "--replay", type=Path, nargs="+", metavar="FILE", help="inputs to run again, of the one TARGET given"
    )
    options = parser.parse_args(arguments)
    targets = options.targets or list(_TARGETS)
    if unknown := set(targets) - set(_TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if options.replay:
        if len(options.targets) != 1:
            parser.error("--replay needs one target")
        _replay(targets[0], options.replay)
        return 0
    seconds = 60 * options.minutes / len(targets)
    outcomes = [_fuzz(target, options.corpus / target, seconds, options.seed) for target in targets]
    _print(outcomes)
    return 1 if any(each.findings for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
