"""`python -m tools.fuzz.child TARGET FOLDER SECONDS SEED`: fuzz one target with atheris; started by `__main__`.

An input that raises is saved and fuzzing continues, so that one finding does not hide others. An input that exceeds the
limits of time or memory, or crashes, ends the process and is saved by libFuzzer.
"""

import hashlib
import logging
import resource
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 20  # per input
_MEMORY = 1 << 30  # bytes that the process may allocate
_MAX_BYTES = 1 << 16  # per input
_INSTRUMENTED = ["model", "serve"]
_ROOT = str(Path(__file__).parents[2])


class Trial:
    """Run one input after another and save those that raise, one per location."""

    def __init__(self, target: Any, folder: Path) -> None:
        """`target` is one of the TARGETS."""
        self._target, self._folder = target, folder
        self._known: set[str] = set()
        self._stack = ExitStack()
        self._open()

    def __call__(self, data: bytes) -> None:
        """Run an input. If it raises, recreate the target's state."""
        try:
            self._run(data)
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            self._save(data, error)
            self._stack.close()
            self._open()

    def _open(self) -> None:
        self._run = self._stack.enter_context(self._target.open())

    def _save(self, data: bytes, error: Exception) -> None:
        """Save an input and its traceback."""
        ours = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(_ROOT)]
        place = f"{type(error).__name__} {ours[-1].filename}:{ours[-1].lineno}"
        if place in self._known:
            return
        self._known.add(place)
        path = self._folder / f"raised-{hashlib.sha256(data).hexdigest()[:16]}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), errors="backslashreplace")


def _limit_memory() -> None:
    """Limit address space, so that allocating a length from a damaged file fails."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    length = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (length, length))


def main() -> None:
    """Fuzz until the time is over; libFuzzer then exits the process."""
    name, folder, seconds, seed = sys.argv[1:]
    sys.path.append(str(Path(sys.prefix) / "fuzz"))  # installed there by `make fuzz`
    import atheris  # optional dependency

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tools.fuzz.targets import TARGETS
    logging.disable(logging.CRITICAL)
    target, corpus, findings = TARGETS[name], Path(folder) / "corpus", Path(folder) / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(target.seeds()):
        (corpus / f"seed-{i:02}").write_bytes(data)
    trial = Trial(target, findings)
    for data in target.seeds():
        trial(data)
    _limit_memory()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        made: Any = atheris.Mutate(data, max_size) if random.random() < 0.1 else target.mutate(data, random)
        return bytes(made[:max_size])

    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={SECONDS}"]
    options += [
        f"-report_slow_units={SECONDS}",
        f"-max_len={_MAX_BYTES}",
        "-print_final_stats=1",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={findings}/",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], trial, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
