"""A real server in its own process."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """`python -m serve ... --port 0`, up when the constructor returns."""

    def __init__(self, *arguments: str, environ: Mapping[str, str] = {}) -> None:
        self._start(["-W", "error::ResourceWarning", "-m", "serve", *arguments, "--port", "0"], environ)

    def _start(self, arguments: list[str], environ: Mapping[str, str] = {}) -> None:
        """Start Python with these arguments and wait for the log line that contains the URL."""
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving .* at (https?://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
                break
        else:
            self.process.stderr.close()
            raise RuntimeError(f"the server ended with {self.process.wait()}:\n{''.join(self.log)}")
        # The pipe must be drained, or the server would block on it when it is full.
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def peak_memory(self) -> int:
        """Peak resident memory, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)
