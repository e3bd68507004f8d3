"""Environments of the clients that the server's own environment does not have, made when a test first needs them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.server_process import ROOT

REQUIREMENTS = ROOT / "requirements-clients"
ENVIRONMENTS = ROOT / ".venv" / "clients"


def python_environment(name: str) -> Path:
    """The folder of the programs of requirements-clients/NAME.txt, which lists all there is to install."""
    folder, wanted = ENVIRONMENTS / name, REQUIREMENTS / f"{name}.txt"
    stamp = folder / "installed.txt"
    if not _is_current(stamp, wanted):
        _install(sys.executable, "-m", "venv", "--clear", str(folder))
        pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "-r")
        _install(str(folder / "bin" / "python"), *pip, str(wanted))
        stamp.write_bytes(wanted.read_bytes())
    return folder / "bin"


def node_environment(name: str = "node") -> Path:
    """The folder in which node finds the packages of requirements-clients/NAME/."""
    folder, wanted = ENVIRONMENTS / name, REQUIREMENTS / name
    lock, stamp = wanted / "package-lock.json", folder / "installed.json"
    if not _is_current(stamp, lock):
        folder.mkdir(parents=True, exist_ok=True)
        for file in (wanted / "package.json", lock):
            (folder / file.name).write_bytes(file.read_bytes())
        _install("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder))
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
    """What a client's command prints in `folder`. `home` is its home directory, so that nobody's settings reach it."""
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": os.pathsep.join([*([str(programs)] if programs else []), os.environ["PATH"]]),
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1",
    }
    return _completed(command, environment | dict(variables or {}), folder)


def _is_current(stamp: Path, wanted: Path) -> bool:
    return stamp.is_file() and stamp.read_bytes() == wanted.read_bytes()


def _install(*command: str) -> None:
    _completed(command, {**os.environ}, ROOT)


def _completed(command: tuple[str, ...], environment: dict[str, str], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    # An exception of subprocess would not say what the program said.
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout
