"""A real Ray cluster with replicas of the server, each in its own process."""

import os
import signal
from pathlib import Path

from tests.support.server_process import ServerProcess


class RayProcess(ServerProcess):
    """`python -m serve.ray.app ... --port 0`, up when the constructor returns."""

    def __init__(self, *arguments: str) -> None:
        self._start(["-m", "serve.ray.app", *arguments, "--port", "0"])

    def replicas(self) -> list[int]:
        """Return the process ids of the replicas."""
        return sorted(
            pid
            for pid in _descendants(self.process.pid)
            if _title(pid).startswith("ray::ServeReplica:logprobd:Replica")
        )

    def listening(self) -> set[str]:
        """Addresses on which its processes listen, except those of Ray Serve's replicas.

        They are as in /proc/net: hexadecimal, with the bytes of each 32-bit word reversed.
        """
        links = [
            os.readlink(file)
            for pid in _descendants(self.process.pid)
            if not _title(pid).startswith("ray::ServeReplica:")
            for file in Path(f"/proc/{pid}/fd").iterdir()
            if file.is_socket()
        ]
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}

    def kill(self, replica: int) -> None:
        """Kill a replica's process, as the OOM killer does."""
        assert replica in self.replicas()
        os.kill(replica, signal.SIGKILL)


def _descendants(pid: int) -> set[int]:
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    found, new = set[int](), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in found} - found
    return found - {pid}


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace")
    except OSError:
        return ""
