"""Environments of the real clients, one per project tools/clients/NAME, installed when they are first needed."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.server_process import ROOT

PROJECTS = Path(__file__).parent
ENVIRONMENTS = (ROOT / ".venv" / "clients").resolve()  # npm fails on symbolic links


def python_environment(name: str) -> Path:
    """Install tools/clients/NAME/lock.txt; return the environment's folder of executables."""
    folder, lock = ENVIRONMENTS / name, PROJECTS / name / "lock.txt"
    stamp = folder / "installed.txt"
    if not _is_current(stamp, lock):
        _run((sys.executable, "-m", "venv", "--clear", str(folder)))
        pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes", "--no-deps", "-r")
        _run((str(folder / "bin" / "python"), *pip, str(lock)))
        stamp.write_bytes(lock.read_bytes())
    return folder / "bin"


def node_environment(name: str) -> Path:
    """Install tools/clients/NAME/package-lock.json; return the folder of node_modules."""
    folder, lock = ENVIRONMENTS / name, PROJECTS / name / "package-lock.json"
    stamp = folder / "installed.json"
    if not _is_current(stamp, lock):
        folder.mkdir(parents=True, exist_ok=True)
        for file in (lock.with_name("package.json"), lock):
            (folder / file.name).write_bytes(file.read_bytes())
        _run(("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)))
        stamp.write_bytes(lock.read_bytes())
    return folder


def run(
    *command: str,
    base_url: str,
    home: Path,
    programs: Path | None = None,
    folder: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run a client's command and return its stdout.

    Args:
        home: its home directory, so that no settings of the user reach it.
        programs: folder that is first on PATH.
        folder: its working directory.
        variables: further environment variables.
    """
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": os.pathsep.join([*([str(programs)] if programs else []), os.environ["PATH"]]),
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1",
    }
    return _run(command, environment | dict(variables or {}), folder)


def _is_current(stamp: Path, lock: Path) -> bool:
    return stamp.is_file() and stamp.read_bytes() == lock.read_bytes()


def _run(command: tuple[str, ...], environment: Mapping[str, str] = os.environ, folder: Path = ROOT) -> str:
    result = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    # subprocess.CalledProcessError would not show the output.
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        python_environment(argument)
