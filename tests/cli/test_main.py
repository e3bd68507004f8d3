"""The command line as a whole: commands, mistakes, and what --help imports."""

import json
import subprocess
import sys

import pytest

from serve.cli.main import main
from tests.support.server_process import ROOT

HEAVY = ("jax", "transformers", "tokenizers", "pydantic", "starlette", "numpy", "rich", "yaml", "huggingface_hub")
IMPORTED = """
import json, sys
from serve.cli.main import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (["--help"], 0, "serve [MODEL]"),
        (["--version"], 0, "logprobd 0."),
        (["serve", "--help"], 0, "--max-num-seqs"),
        (["score", "--help"], 0, "--text-field"),
        (["decide", "--help"], 0, "--permutations"),
        (["chat", "--help"], 0, "--temperature"),
        (["models", "--help"], 0, "--json"),
        (["quantize", "--help"], 0, "--importance-texts"),
        (["kl", "--help"], 0, "--text-field"),
        (["serve", "--version"], 0, "logprobd 0."),
        (["--max-num-seq", "4"], 2, "did you mean '--max-num-seqs'?"),
        (["chat", "--dtype", "float23"], 2, "did you mean 'float32'?"),
        (["scor", "file.jsonl"], 2, "did you mean 'score'?"),
    ],
    ids=str,
)
def test_help_and_mistakes_import_nothing_heavy(arguments: list[str], code: int, output: str) -> None:
    command = [sys.executable, "-c", IMPORTED, json.dumps(arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *printed, last = ended.stdout.splitlines()
    returned, modules = json.loads(last)
    assert returned == code
    assert output in "\n".join([*printed, ended.stderr])
    assert {name.partition(".")[0] for name in modules}.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("serve", "MODEL"),
        ("chat", "MODEL"),
        ("score", "FILE"),
        ("decide", "FILE"),
        ("quantize", "OUTPUT"),
        ("kl", "FILE"),
    ],
)
def test_every_command_takes_the_model_flag(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "\n  --model MODEL" in text
    assert word in text.splitlines()[0]
