"""A server of ours in a process of its own, for those who measure or test one."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_END_SECONDS = 90  # above what running requests get at the end, --shutdown-timeout


@dataclass(slots=True)
class OwnServer:
    """Where it serves, what it has said on stderr, and once it has ended, how."""

    url: str
    log: list[str] = field(default_factory=list)
    exit_code: int | None = None  # -9 if it did not end by itself


@contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[OwnServer]:
    """`python -m serve` on a free port; what it says while it starts is shown. It gets SIGTERM at the end.

    Raises:
        SystemExit: it did not come up; with its exit code.
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
        # Somebody must read on, or a full pipe would stop the server.
        reader = threading.Thread(target=server.log.extend, args=(process.stderr,), daemon=True)
        reader.start()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        process.kill()  # harmless if it has ended
        server.exit_code = process.wait()
        if reader is not None:
            reader.join()
        process.stderr.close()
