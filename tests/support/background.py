"""Programs that run one after another in the background while tests that do not need them run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_NICENESS = 10  # foreground tests come first


class Background:
    """Run `python -m MODULE` for each of several modules, from the constructor on."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._running: subprocess.Popen[str] | None = None
        self._closed = False
        self._outputs: dict[str, Future[str]] = {module: self._pool.submit(self._run, module) for module in modules}

    def output(self, module: str) -> str:
        """Wait for a module to end and return its stdout.

        Raises:
            RuntimeError: it failed; the message contains its stderr.
        """
        return self._outputs[module].result()

    def close(self) -> None:
        """Kill the running program and start no other."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._running is not None:
            _kill(self._running)
        self._pool.shutdown()

    def _run(self, module: str) -> str:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", module]
        # A process group of its own: Ctrl-C interrupts pytest only, which then calls close().
        with subprocess.Popen(command, cwd=_ROOT, stdout=pipe, stderr=pipe, text=True, process_group=0) as process:
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            self._running = process
            if self._closed:  # close() ran before it could see the process
                _kill(process)
            output, errors = process.communicate()
            self._running = None
        if process.returncode != 0:
            raise RuntimeError(f"{module} ended with {process.returncode}:\n{errors}")
        return output


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGKILL)
