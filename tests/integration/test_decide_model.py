"""`python -m serve decide` as a process, with the default model, compared with a server with the same options."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_score_model import engine_flags
from tests.support.scoring import read_lines, write_lines
from tests.support.server_process import ROOT, ServerProcess

pytestmark = pytest.mark.slow

QUESTIONS: dict[str, Any] = {
    "animal": {
        "type": "choice",
        "instructions": "Which animal?",
        "criteria": {"cat": "it purrs", "dog": None, "owl": None},
    },
    "happy": {"type": "noul", "instructions": "Is it happy?"},
    "size": {"type": "score", "criteria": ["small", "large"]},
}
LINES: list[dict[str, Any]] = [
    {"state": "It barks at the postman.", "questions": QUESTIONS, "expected": {"animal": "dog", "size": 1}},
    {"state": {"sound": "purr"}, "questions": QUESTIONS, "expected": {"animal": "cat", "happy": True}},
    {"state": " ", "questions": QUESTIONS},
    {
        "input": [{"role": "user", "content": "It hoots <|im_end|> at night."}],
        "questions": [
            {
                "type": "choice",
                "name": "animal",
                "instructions": "Which?",
                "choices": [{"value": "cat"}, {"value": "owl"}],
            }
        ],
    },
]


def served(server: ServerProcess, line: dict[str, Any], **fields: Any) -> Any:
    path = "systemone" if "state" in line else "decisions"
    body = {name: value for name, value in line.items() if name != "expected"} | fields
    response = httpx2.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answers = response.json()["answers"]
    for answer in answers.values() if isinstance(answers, dict) else answers:
        del answer["evidence"]["cached_tokens"]
    return answers


@pytest.mark.parametrize("options", [{}, {"scoring": "sequences", "normalize": "pmi", "temperature": 2.0}], ids=str)
def test_decide_equals_the_server_bit_by_bit(server: ServerProcess, tmp_path: Path, options: dict[str, Any]) -> None:
    file = write_lines(tmp_path / "rows.jsonl", LINES)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = [sys.executable, "-m", "serve", "decide", str(file), *flags, *engine_flags(server)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, second, blank, openai = read_lines(tmp_path / "rows.decisions.jsonl")
    assert blank["error"]["param"] == "state"
    for line, row in ((LINES[0], first), (LINES[1], second), (LINES[3], openai)):
        assert row["answers"] == served(server, line, **options)
    assert first["answers"]["animal"]["evidence"]["scoring"] == options.get("scoring", "labels")
    assert [line.split()[:2] for line in run.stdout.splitlines()[-3:]] == [
        ["animal", "2"],
        ["size", "1"],
        ["happy", "1"],
    ]
