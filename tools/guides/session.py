"""The process in which a guide runs: blocks as JSON from stdin, what each printed as JSON to stdout; see guides.py.

Imports nothing of this repository, so that a guide finds it as its reader does.
"""

import contextlib
import io
import json
import linecache
import subprocess
import sys
from typing import Any


def main() -> int:
    """Returns the exit code, after a traceback where a block fails."""
    guide = sys.argv[1]
    # Guides import what their readers import: from the folder they are in, not from this file's.
    sys.path[0] = ""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for language, source, line in json.load(sys.stdin):
        name = f"{guide}, block of line {line}"
        if language == "sh":
            outputs.append(_shell(name, source))
            continue
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), namespace)
        outputs.append(printed.getvalue())
    json.dump(outputs, sys.stdout)
    return 0


def _shell(name: str, source: str) -> str:
    command = ["bash", "-eu", "-o", "pipefail", "-c", source]
    pipe = subprocess.PIPE
    process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{process.stdout}\n{process.stderr}")
    return process.stdout


if __name__ == "__main__":
    sys.exit(main())
