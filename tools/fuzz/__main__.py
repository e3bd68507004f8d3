"""`python -m tools.fuzz [requests|gguf|safetensors ...]`: fuzzes for some minutes and prints what was found.

Each target runs in a process of its own, one after the other. The corpus stays for the next run; inputs that should
not do what they do lie in DIR/TARGET/findings, and `--replay FILE` shows one of them again.
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
_MOST_STARTS = 50  # of a target that dies again and again
# Threads take one heap of their own each, of which the limit of memory would count all that they reserve.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "JAX_PLATFORMS": "cpu"}


@dataclass(slots=True)
class Outcome:
    """What became of a target."""

    target: str
    runs: int = 0
    seconds: float = 0.0
    coverage: int = 0  # edges of our code
    findings: list[Path] = field(default_factory=list)

    def read(self, log: str) -> None:
        """Adds what a process said of its work."""
        self.runs += sum(int(each) for each in re.findall(r"stat::number_of_executed_units: +(\d+)", log))
        self.coverage = max([self.coverage, *(int(each) for each in re.findall(r" cov: (\d+)", log))])


def _fuzz(target: str, folder: Path, seconds: float, seed: int) -> Outcome:
    """Runs a target until its time is over, anew where an input has ended the process."""
    outcome, findings = Outcome(target), folder / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    before = set(findings.glob("*"))
    began = time.monotonic()
    for start in range(_MOST_STARTS):
        left = seconds - (time.monotonic() - began)
        if left < 1:
            break
        command = [sys.executable, "-m", "tools.fuzz.child", target, str(folder), f"{left:.0f}", str(seed + start)]
        known = set(findings.glob("*"))
        log, environment = folder / f"log-{start}.txt", os.environ | _ENVIRONMENT
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        said = log.read_text(encoding="utf-8", errors="replace")
        outcome.read(said)
        if code and known == set(findings.glob("*")):
            raise SystemExit(f"{target}: the process ended with {code} for no input\n{said[-3000:]}")
    outcome.seconds = time.monotonic() - began
    outcome.findings = sorted(path for path in findings.glob("*") if path not in before and path.suffix != ".txt")
    return outcome


def _replay(target: str, paths: Sequence[Path]) -> None:
    """Runs inputs again: what one raises ends this process."""
    from tools.fuzz.targets import TARGETS

    with TARGETS[target].opened() as run:
        for path in paths:
            run(path.read_bytes())
            print(f"{path}: nothing is wrong")


def _print(outcomes: Sequence[Outcome]) -> None:
    print(f"{'target':12} {'runs':>10} {'seconds':>8} {'coverage':>9} {'findings':>9}")
    for each in outcomes:
        numbers = f"{each.runs:>10,} {each.seconds:>8.0f} {each.coverage:>9,} {len(each.findings):>9}"
        print(f"{each.target:12} {numbers}")
    for path in (path for each in outcomes for path in each.findings):
        print(path)


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(_TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, default=3.0, help="of all targets together; default: 3")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), metavar="DIR", help="default: .fuzz")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="inputs of the one target named")
    said = parser.parse_args(arguments)
    targets = said.targets or list(_TARGETS)
    if unknown := set(targets) - set(_TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if said.replay:
        if len(said.targets) != 1:
            parser.error("--replay needs one target")
        _replay(targets[0], said.replay)
        return 0
    seconds = 60 * said.minutes / len(targets)
    outcomes = [_fuzz(target, said.corpus / target, seconds, said.seed) for target in targets]
    _print(outcomes)
    return 1 if any(each.findings for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
