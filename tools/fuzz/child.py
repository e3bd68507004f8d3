"""`python -m tools.fuzz.child TARGET FOLDER SECONDS SEED`: fuzzes one target with atheris; `__main__` starts it.

What an input raises is written down and the next one is tried, so that one finding does not hide the others. An input
that takes too long or too much memory, or crashes, ends the process: libFuzzer writes it down.
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

SECONDS = 20  # that an input may take
_MEMORY = 1 << 30  # bytes that the process may have beside what it has when it begins
_MOST_BYTES = 1 << 16  # of an input
_INSTRUMENTED = ["model", "serve"]
_ROOT = str(Path(__file__).parents[2])


class Trial:
    """Runs one input after the other; what one raises is no end.

    Inputs that raise go into a folder: one for each place where something is raised.
    """

    def __init__(self, target: Any, folder: Path) -> None:
        """`target` is one of the TARGETS."""
        self._target, self._folder = target, folder
        self._known: set[str] = set()
        self._opened = ExitStack()
        self._open()

    def __call__(self, data: bytes) -> None:
        """Runs an input. After one that raises, all is opened anew that it may have left in disorder."""
        try:
            self._run(data)
        except Exception as error:  # noqa: BLE001 - whatever an input raises: it is what this program is asked for
            self._note(data, error)
            self._opened.close()
            self._open()

    def _open(self) -> None:
        self._run = self._opened.enter_context(self._target.opened())

    def _note(self, data: bytes, error: Exception) -> None:
        """Writes down an input and what it raised."""
        ours = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(_ROOT)]
        place = f"{type(error).__name__} {ours[-1].filename}:{ours[-1].lineno}"
        if place in self._known:
            return
        self._known.add(place)
        path = self._folder / f"raised-{hashlib.sha256(data).hexdigest()[:16]}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), errors="backslashreplace")


def _limit_memory() -> None:
    """An allocation for a length that a damaged file tells fails, instead of being granted and never used."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Ends with the process."""
    name, folder, seconds, seed = sys.argv[1:]
    sys.path.append(str(Path(sys.prefix) / "fuzz"))  # where `make fuzz` puts it
    import atheris  # an extra, which nothing else needs

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

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        made: Any = atheris.Mutate(data, max_size) if random.random() < 0.1 else target.mutated(data, random)
        return bytes(made[:max_size])

    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={SECONDS}"]
    options += [
        f"-report_slow_units={SECONDS}",
        f"-max_len={_MOST_BYTES}",
        "-print_final_stats=1",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={findings}/",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], trial, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
