"""A server process for tools that measure or test one."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_SHUTDOWN_SECONDS = 90  # above --shutdown-timeout, which running requests get


@dataclass(slots=True)
class OwnServer:
    """A server's address, its stderr so far and, once it has ended, its exit code."""

    url: str
    log: list[str] = field(default_factory=list)
    exit_code: int | None = None  # -9 if it had to be killed


@contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[OwnServer]:
    """Run `python -m serve` on a free port, its start-up messages copied to stderr; on exit send it SIGTERM.

    Raises:
        SystemExit: the server did not start; with its exit code.
    """
    command = [sys.executable, "-m", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    server, reader = OwnServer(""), None
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            server.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                server.url = found[0]
                break
        else:
            raise SystemExit(process.wait())
        # The pipe must be drained, or the server would block once it is full.
        reader = threading.Thread(target=server.log.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SHUTDOWN_SECONDS)
        process.kill()  # no effect on a process that has ended
        server.exit_code = process.wait()
        if reader is not None:
            reader.join()
        process.stderr.close()
