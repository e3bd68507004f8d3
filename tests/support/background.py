"""Programs whose output tests wait for, run one after another beside the tests that wait for none."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_NICENESS = 10  # they take what the tests leave of the processor


class Background:
    """`python -m MODULE` for each of several modules, begun by the constructor."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._running: subprocess.Popen[str] | None = None
        self._ended = False
        self._outputs: dict[str, Future[str]] = {module: self._pool.submit(self._run, module) for module in modules}

    def output(self, module: str) -> str:
        """What a module has printed, when it has ended.

        Raises:
            RuntimeError: it failed; the message has what it wrote to stderr.
        """
        return self._outputs[module].result()

    def end(self) -> None:
        """Kills what still runs, and begins no other."""
        self._ended = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._running is not None:
            _kill(self._running)
        self._pool.shutdown()

    def _run(self, module: str) -> str:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", module]
        # A group of its own: an interrupt from the keyboard is for the tests, which then end this, too.
        with subprocess.Popen(command, cwd=_ROOT, stdout=pipe, stderr=pipe, text=True, process_group=0) as process:
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            self._running = process
            if self._ended:  # before it could be seen
                _kill(process)
            output, errors = process.communicate()
            self._running = None
        if process.returncode != 0:
            raise RuntimeError(f"{module} ended with {process.returncode}:\n{errors}")
        return output


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGKILL)
