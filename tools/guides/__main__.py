"""Runs the guides of docs/guides and compares what their blocks print with what the guides say.

`python -m tools.guides [NAME ...]` starts a server, runs the guides and says where they differ; with `--write` it
rewrites the outputs that differ.

A guide's blocks are run in their order: ```python blocks in one namespace, ```sh blocks by bash. The ```text block
after one is what it prints; a block without one prints nothing. All other blocks are for reading only.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.server_process import ROOT, ServerProcess
from tools.clients.environments import python_environment

FOLDER = ROOT / "docs" / "guides"
GUIDES = {path.stem: path for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"}
FLAGS = ("--dtype", "float32", "--max-num-seqs", "4")  # of the server that the guides start

_ENVIRONMENTS = {"lm-eval": "lm_eval"}  # whose programs a guide calls: see tools/clients
_ADDRESS = "http://127.0.0.1:8000"  # what guides call the server
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUN = ("python", "sh")
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)")
_LIMIT = 600  # seconds for a guide, after which something hangs; never reached otherwise


@dataclass(slots=True)
class Block:
    """One that is run."""

    language: str
    source: str
    line: int  # of the guide, where the source begins
    end: int  # offset in the guide's text of what follows the block
    expected: str = ""
    place: tuple[int, int] | None = None  # offsets of the expected text


@dataclass(frozen=True, slots=True)
class Ran:
    """A guide that was run."""

    text: str
    blocks: list[Block]
    outputs: list[str]  # of each block
    differences: list[str] = field(default_factory=list)

    def rewritten(self) -> str:
        """The guide with the outputs of this run where they differ from what it says."""
        text = self.text
        for block, output in reversed(list(zip(self.blocks, self.outputs, strict=True))):
            if is_alike(block.expected, output):
                continue
            if block.place is None:
                text = f"{text[: block.end]}\n```text\n{output}```\n{text[block.end :]}"
            else:
                begin, end = block.place
                text = text[:begin] + output + text[end:]
        return text


class GuideError(Exception):
    """A block failed, or a guide is not well-formed."""


def blocks_of(text: str) -> list[Block]:
    """The blocks of a guide that are run, with what they should print.

    Raises:
        GuideError: an output that follows nothing that was run.
    """
    blocks: list[Block] = []
    free = False  # whether the last block has no output yet
    for fence in _FENCE.finditer(text):
        language, source = fence[1], fence[2]
        line = text.count("\n", 0, fence.start(2)) + 1
        if language in _RUN:
            blocks.append(Block(language, source, line, fence.end() + 1))
            free = True
        elif language == "text":
            if not free:
                raise GuideError(f"line {line}: an output of nothing that is run")
            blocks[-1].expected, blocks[-1].place = source, fence.span(2)
            free = False
    return blocks


def run_guide(path: Path, server: ServerProcess, folder: Path, programs: Sequence[Path] = ()) -> Ran:
    """Runs a guide's blocks against a server.

    Args:
        folder: an empty one, in which it runs: what it writes does not land in the repository.
        programs: folders of programs beside our own.

    Raises:
        GuideError: a block failed.
    """
    text = path.read_text("utf-8")
    blocks = blocks_of(text)
    for each in (*ROOT.glob("[!.]*"), ROOT / ".venv"):
        (folder / each.name).symlink_to(each)
    home = folder / ".home"
    _keep_programs(server, home)
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": os.pathsep.join([str(ROOT / ".venv" / "bin"), *map(str, programs), os.environ["PATH"]]),
        "PYTHONPATH": str(folder),
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1",
        # What is needed is here; where something were to be downloaded, it fails at once instead.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    jobs = [(each.language, each.source.replace(_ADDRESS, server.url), each.line) for each in blocks]
    process = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("session.py")), path.name],
        cwd=folder,
        env=environment,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    if process.returncode != 0:
        raise GuideError(f"{path.name}: {process.stderr}")
    outputs = [output.replace(server.url, _ADDRESS) for output in json.loads(process.stdout)]
    return Ran(text, blocks, outputs, list(_differences(path.name, blocks, outputs)))


def programs_of(name: str) -> list[Path]:
    """Folders of the programs that a guide calls, installed if they are not."""
    return [python_environment(_ENVIRONMENTS[name])] if name in _ENVIRONMENTS else []


def is_alike(expected: str, output: str) -> bool:
    """Whether an output is what a guide says: see `_is_number_alike`, and `...` stands for anything."""
    return all(same for same, _, _ in _pairs(expected.splitlines(), output.splitlines()))


def _keep_programs(server: ServerProcess, home: Path) -> None:
    """Give servers that a guide starts the compiled programs of `server` and the user's CPU kernels."""
    arguments = list(map(str, server.process.args)) if isinstance(server.process.args, list) else []
    folder = home / ".cache" / "logprobd"
    folder.mkdir(parents=True)
    kernels = Path("~/.cache/logprobd/kernels").expanduser()
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(kernels)
    if "--compilation-cache-dir" in arguments:
        (folder / "xla").symlink_to(arguments[arguments.index("--compilation-cache-dir") + 1])


def _differences(name: str, blocks: Iterable[Block], outputs: Iterable[str]) -> Iterator[str]:
    for block, output in zip(blocks, outputs, strict=True):
        if is_alike(block.expected, output):
            continue
        pairs = _pairs(block.expected.splitlines(), output.splitlines())
        # Lines that are alike are shown as the guide has them, so that only the others are seen.
        said = [line for _, line, _ in pairs if line is not None]
        printed = [said if same and said is not None else line for same, said, line in pairs if line is not None]
        where = f"{name}, block of line {block.line}"
        yield "\n".join(difflib.unified_diff(said, printed, f"{where}: says", "prints", lineterm=""))


def _pairs(expected: list[str], output: list[str]) -> list[tuple[bool, str | None, str | None]]:
    """Lines of both, side by side, and whether they are alike; a line `...` takes any number of the output's."""
    pairs: list[tuple[bool, str | None, str | None]] = []
    at = 0
    for i, line in enumerate(expected):
        if line.strip() == "...":
            following = expected[i + 1] if i + 1 < len(expected) else None
            while at < len(output) and (following is None or not _is_line_alike(following, output[at])):
                pairs.append((True, None, None))
                at += 1
            pairs.append((True, None, None))
        elif at < len(output):
            pairs.append((_is_line_alike(line, output[at]), line, output[at]))
            at += 1
        else:
            pairs.append((False, line, None))
    return [*pairs, *((False, None, line) for line in output[at:])]


def _is_line_alike(expected: str, output: str) -> bool:
    """Words as they are, numbers nearly; spaces between words may differ in number, as those before numbers do."""
    if "..." in expected:
        pieces = map(re.escape, " ".join(expected.split()).split("..."))
        return re.fullmatch(".*".join(pieces), " ".join(output.split())) is not None
    said, printed = ([_NUMBER.split(word) for word in line.split()] for line in (expected, output))
    return [list(map(len, said)), [word[::2] for word in said]] == [
        list(map(len, printed)),
        [word[::2] for word in printed],
    ] and all(
        _is_number_alike(a, b)
        for one, other in zip(said, printed, strict=True)
        for a, b in zip(one[1::2], other[1::2], strict=True)
    )


def _is_number_alike(expected: str, output: str) -> bool:
    """Integers below 5,000 are equal, decimals of as many places differ by one in the last, or by what kernels make.

    Every CPU gives log-probs that are true to 1e-4 in float32, so sums of them may differ by a little more. Deep in the
    vocabulary that much may be a few ranks.
    """
    places = [len(number.partition(".")[2]) for number in (expected, output)]
    if places[0] != places[1]:
        return False
    unit = 1.01 * 10.0 ** -places[0] if places[0] else 0
    return math.isclose(float(expected), float(output), rel_tol=2e-4, abs_tol=unit)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.guides", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *GUIDES], metavar="NAME", help=", ".join(GUIDES))
    parser.add_argument("--write", action="store_true", help="rewrite the outputs that differ")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        server = ServerProcess(*FLAGS, "--compilation-cache-dir", cache)
        try:
            for name in arguments.names or GUIDES:
                with tempfile.TemporaryDirectory() as folder:
                    ran = run_guide(GUIDES[name], server, Path(folder), programs_of(name))
                print(f"{name}: {len(ran.differences) or 'no'} differences", *ran.differences, sep="\n")
                if arguments.write:
                    GUIDES[name].write_text(ran.rewritten(), "utf-8")
                failed = failed or bool(ran.differences)
        finally:
            server.terminate()
    return int(failed and not arguments.write)


if __name__ == "__main__":
    sys.exit(main())
