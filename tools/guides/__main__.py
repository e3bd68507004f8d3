"""Run the guides of docs/guides and compare the output of their blocks with the text.

`python -m tools.guides [NAME ...]` starts a server, runs the guides and prints the differences; `--write` writes the
new outputs into the guides.

```python blocks of a guide run in order, in one namespace; ```sh blocks run in bash. A ```text block that follows one
directly is its output. A guide runs as its reader runs it: in the root of a checkout, without an API key and without
changes to PATH.
"""

import argparse
import difflib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.server_process import ROOT, ServerProcess

FOLDER = ROOT / "docs" / "guides"
GUIDES = {path.stem: path for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"}
FLAGS = ("--dtype", "float32", "--max-num-seqs", "4")  # of the server that the guides start

_ADDRESS = "http://127.0.0.1:8000"  # the server's address in the guides
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_PIECE = re.compile(r"(\.{3}|\s+|[+-]?\d+(?:\.\d+)?)")  # what a pattern treats specially: "...", space, number
_TIMEOUT = 600  # seconds per guide; reached only if it hangs


class GuideError(Exception):
    """A block failed."""


@dataclass(frozen=True, slots=True)
class GuideRun:
    """The outputs of a guide's blocks."""

    name: str
    text: str
    outputs: list[str]

    def differences(self) -> Iterator[str]:
        """A diff for each block whose output differs from the text."""
        for block, output in zip(_BLOCK.finditer(self.text), self.outputs, strict=True):
            expected = block[3] or ""
            if not is_alike(expected, output):
                line = self.text.count("\n", 0, block.start(2)) + 1
                files = (f"{self.name}, line {line}: expected", "printed")
                yield "\n".join(difflib.unified_diff(expected.splitlines(), output.splitlines(), *files, lineterm=""))

    def rewritten(self) -> str:
        """The guide with new outputs for the blocks that differ."""
        outputs = iter(self.outputs)

        def block(match: re.Match[str]) -> str:
            output = next(outputs)
            if is_alike(match[3] or "", output):
                return match[0]
            return f"```{match[1]}\n{match[2]}```\n" + (f"```text\n{output}```\n" if output else "")

        return _BLOCK.sub(block, self.text)


def run_guide(path: Path, url: str, cache: Path, folder: Path) -> GuideRun:
    """Run a guide's blocks.

    Args:
        path: the guide.
        url: address of a server with FLAGS.
        cache: compiled programs, for servers that the guide starts.
        folder: empty working directory, which gets links to the checkout's files.

    Raises:
        GuideError: a block failed.
    """
    text = path.read_text("utf-8")
    for entry in (*ROOT.glob("[!.]*"), ROOT / ".venv"):
        (folder / entry.name).symlink_to(entry)
    environment = os.environ | {
        "HOME": str(_home(folder, cache)),
        "NO_PROXY": "127.0.0.1",
        # Every file that a guide needs is present; a download would hide that one is missing.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    environment.pop("OPENAI_API_KEY", None)
    blocks = [
        (block[1], block[2].replace(_ADDRESS, url), text.count("\n", 0, block.start(2)) + 1)
        for block in _BLOCK.finditer(text)
    ]
    process = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("session.py")), path.name],
        cwd=folder,
        env=environment,
        input=json.dumps(blocks),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if process.returncode != 0:
        raise GuideError(f"{path.name}: {process.stderr}")
    return GuideRun(path.name, text, [output.replace(url, _ADDRESS) for output in json.loads(process.stdout)])


def is_alike(expected: str, output: str) -> bool:
    """True if an output equals the expected text, up to the width of spaces and the rounding of numbers.

    `...` matches any text. Numbers need the same number of decimals, and may differ by one in the last of them or by
    2e-4: log-probs are within 1e-4 on every CPU, sums of them differ more, and deep ranks by a few.
    """
    pieces = _PIECE.split(expected.strip())
    match = re.fullmatch("".join(map(_pattern, pieces)), output.strip(), re.DOTALL)
    numbers = [piece for piece in pieces if piece[-1:].isdigit() and _PIECE.fullmatch(piece)]
    return match is not None and all(map(_is_number_alike, numbers, match.groups()))


def _pattern(piece: str) -> str:
    if piece == "...":
        return ".*?"
    if piece.isspace():
        return r"\s*\n\s*" if "\n" in piece else "[ \t]+"
    return r"([+-]?\d+(?:\.\d+)?)" if _PIECE.fullmatch(piece) else re.escape(piece)


def _is_number_alike(expected: str, output: str) -> bool:
    decimals = len(expected.partition(".")[2])
    if decimals != len(output.partition(".")[2]):
        return False
    return math.isclose(float(expected), float(output), rel_tol=2e-4, abs_tol=1.01 * 10.0**-decimals if decimals else 0)


def _home(folder: Path, cache: Path) -> Path:
    """Create a home directory with the compiled programs and this user's CPU kernels."""
    home = folder / ".home"
    kernels = Path("~/.cache/logprobd/kernels").expanduser()
    kernels.mkdir(parents=True, exist_ok=True)
    for name, target in {"kernels": kernels, "xla": cache}.items():
        link = home / ".cache" / "logprobd" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return home


def main() -> int:
    """Run guides and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.guides", description="Run the code of docs/guides.")
    parser.add_argument("names", nargs="*", choices=[[], *GUIDES], metavar="NAME", help=", ".join(GUIDES))
    parser.add_argument("--write", action="store_true", help="write outputs that differ into the guides")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        server = ServerProcess(*FLAGS, "--compilation-cache-dir", cache)
        try:
            for name in arguments.names or GUIDES:
                with tempfile.TemporaryDirectory() as folder:
                    run = run_guide(GUIDES[name], server.url, Path(cache), Path(folder))
                differences = [*run.differences()]
                print(f"{name}: {len(differences)} differences", *differences, sep="\n")
                if arguments.write:
                    GUIDES[name].write_text(run.rewritten(), "utf-8")
                failed = failed or bool(differences)
        finally:
            server.terminate()
    return int(failed and not arguments.write)


if __name__ == "__main__":
    sys.exit(main())
