"""`python -m serve score` as a process, with the default model, compared with a server with the same options."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.support.scoring import read_lines, write_lines
from tests.support.server_process import ROOT, ServerProcess

pytestmark = pytest.mark.slow

TEXTS = [
    "The capital of France is Paris.",
    "naïve 東京 👩‍🚀",
    "def f(x):\n\treturn x\n" * 20,
    *(f"{n} times {n} is {n * n}." for n in range(8)),
]


def engine_flags(server: ServerProcess) -> list[str]:
    """Return the server's flags, including its compilation cache."""
    words = server.process.args
    assert isinstance(words, list)
    arguments = [str(word) for word in words]
    return arguments[arguments.index("serve") + 1 : arguments.index("--port")]


def served(server: ServerProcess, prompt: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 0, "prompt_logprobs": 2, "prompt_logprobs_format": "columns"}
    response = httpx2.post(f"{server.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    assert response.status_code == 200, response.text
    answer = response.json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice | {"fingerprint": answer["system_fingerprint"]}


def test_score_equals_the_server_bit_by_bit(server: ServerProcess, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]
    file = write_lines(tmp_path / "rows.jsonl", [*({"text": text} for text in TEXTS), {"messages": chat}])
    words = [sys.executable, "-m", "serve", "score", str(file), "--top-logprobs", "2", *engine_flags(server)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = read_lines(tmp_path / "rows.logprobs.jsonl")
    assert len(rows) == len(TEXTS) + 1
    for text, row in zip([*TEXTS, rows[-1]["token_ids"]], rows, strict=True):
        answer = served(server, text)
        columns = answer["prompt_logprobs_columns"]
        assert row["token_ids"] == answer["prompt_token_ids"]
        assert row["ranks"] == [None, *columns["ranks"]]
        assert row["logprobs"] == [None, *columns["logprobs"]]
        assert row["top_token_ids"] == [None, *columns["top_token_ids"]]
        assert row["top_logprobs"] == [None, *columns["top_logprobs"]]
        assert sum(row["byte_lengths"]) == len(text.encode()) if isinstance(text, str) else True
    logprobs = np.concatenate([np.asarray(row["logprobs"][1:], np.float32) for row in rows]).astype(np.float64)
    assert f"perplexity  {np.exp(-logprobs.mean()):.6g}\n" in run.stdout
    assert f"tokens      {len(logprobs):,} scored of" in run.stdout
    meta = (tmp_path / "rows.logprobs.jsonl.meta.json").read_text("utf-8")
    assert f'"fingerprint": "{answer["fingerprint"]}"' in meta
