"""The process in which a guide runs: reads its blocks as JSON from stdin, writes their outputs as JSON to stdout.

Imports nothing of this repository, so that the guide imports it from its working directory, as a reader does.
"""

import contextlib
import io
import json
import linecache
import subprocess
import sys
from typing import Any


def main() -> int:
    """Run the blocks; return the exit code. A block that fails ends the process with a traceback."""
    guide = sys.argv[1]
    sys.path[0] = ""  # the working directory, instead of this file's
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for language, source, line in json.load(sys.stdin):
        name = f"{guide}, block of line {line}"
        if language == "sh":
            outputs.append(_run_shell(name, source))
            continue
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), namespace)
        outputs.append(printed.getvalue())
    json.dump(outputs, sys.stdout)
    return 0


def _run_shell(name: str, source: str) -> str:
    command = ["bash", "-eu", "-o", "pipefail", "-c", source]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{process.stdout}\n{process.stderr}")
    return process.stdout


if __name__ == "__main__":
    sys.exit(main())
