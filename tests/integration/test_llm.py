"""LLM with the default model in float32 gives the numbers of a server with the same options, to the bit."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jax
import numpy as np
import pytest

from serve.jobs.results import Generation, Tokens
from serve.llm import LLM
from tests.support.server_process import ROOT, ServerProcess
from tools.guides.__main__ import is_alike

TEXTS = ["The capital of France is Paris.", "naïve 東京 👩‍🚀", "def f(x):\n\treturn x\n" * 20, "x"]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(server: ServerProcess) -> Iterator[LLM]:
    words = server.process.args
    assert isinstance(words, list)
    cache = Path(str(words[words.index("--compilation-cache-dir") + 1]))
    with LLM(dtype="float32", max_num_seqs=4, max_model_len=8192, compilation_cache_dir=cache) as llm:
        yield llm


def test_llm_leaves_the_compilation_cache_of_jax(llm: LLM) -> None:
    assert jax.config.jax_compilation_cache_dir != str(llm.loaded.config.compilation_cache_dir)


def answer_of(server: ServerProcess, path: str, **body: Any) -> dict[str, Any]:
    response = httpx2.post(f"{server.url}/v1/{path}", json=body | {"return_token_ids": True}, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def assert_prompt_columns(tokens: Tokens, columns: dict[str, Any]) -> None:
    """Compare with the `prompt_logprobs_columns` of an answer."""
    assert np.asarray(columns["logprobs"], np.float32).tobytes() == tokens.logprobs[1:].tobytes()
    assert columns["ranks"] == tokens.ranks[1:].tolist()
    assert columns["top_token_ids"] == tokens.top_ids[1:].tolist()
    assert np.asarray(columns["top_logprobs"], np.float32).tobytes() == tokens.top_logprobs[1:].tobytes()


def test_score_is_the_servers_to_the_bit(llm: LLM, server: ServerProcess) -> None:
    for text, score in zip(TEXTS, llm.score(TEXTS, logprobs=2), strict=True):
        fields = {"max_tokens": 0, "prompt_logprobs": 2, "prompt_logprobs_format": "columns"}
        [choice] = answer_of(server, "completions", prompt=text, **fields)["choices"]
        assert score.token_ids == choice["prompt_token_ids"]
        assert_prompt_columns(score, choice["prompt_logprobs_columns"])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 5, "n": 3},
        {"seed": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"seed": 2, "frequency_penalty": 0.5, "presence_penalty": 0.5, "stop": ["e", "zz"]},
    ],
    ids=str,
)
def test_generate_is_the_servers_to_the_bit(llm: LLM, server: ServerProcess, options: Any) -> None:
    prompts = ["Once upon a time", "The sky is"]
    outputs = llm.generate(prompts, max_tokens=12, logprobs=3, prompt_logprobs=1, **options)
    for index, prompt in enumerate(prompts):
        fields = options | {"prompt": prompt, "max_tokens": 12, "logprobs": 3, "prompt_logprobs": 1}
        answer = answer_of(server, "completions", prompt_logprobs_format="columns", **fields)
        mine = [output for output in outputs if output.index == index]
        for output, choice in zip(mine, answer["choices"], strict=True):
            assert output.text == choice["text"]
            assert output.token_ids == choice["token_ids"]
            assert (output.finish_reason, output.stop_reason) == (choice["finish_reason"], choice["stop_reason"])
            logprobs = choice["logprobs"]
            assert np.asarray(logprobs["token_logprobs"], np.float32).tobytes() == output.logprobs.tobytes()
            assert output.prompt is not None
            assert_prompt_columns(output.prompt, choice["prompt_logprobs_columns"])


def test_chat_is_the_servers_to_the_bit(llm: LLM, server: ServerProcess) -> None:
    outputs = llm.chat(MESSAGES, max_tokens=20, seed=3, n=2, logprobs=4)
    fields = {"messages": MESSAGES, "max_tokens": 20, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 4}
    answer = answer_of(server, "chat/completions", **fields)
    assert answer["prompt_token_ids"] == outputs[0].prompt_token_ids
    for output, choice in zip(outputs, answer["choices"], strict=True):
        assert output.text == choice["message"]["content"]
        assert output.token_ids == choice["token_ids"]
        assert output.finish_reason == choice["finish_reason"]
        assert_chat_logprobs(output, choice["logprobs"]["content"])


def assert_chat_logprobs(output: Generation, content: list[dict[str, Any]]) -> None:
    assert [entry["rank"] for entry in content] == output.ranks.tolist()
    assert np.asarray([entry["logprob"] for entry in content], np.float32).tobytes() == output.logprobs.tobytes()
    tops = [[entry["logprob"] for entry in token["top_logprobs"]] for token in content]
    assert np.asarray(tops, np.float32).tobytes() == output.top_logprobs.tobytes()


def test_the_docstring_shows_the_real_output(llm: LLM) -> None:
    [answer] = llm.chat(MESSAGES, temperature=0)
    [score] = llm.score([("The capital of France is", " Paris.")])
    assert score.completion_logprob is not None
    for printed in (
        f"{answer.text} {answer.logprobs[:3].round(4)} {answer.ranks[:3]}\n",
        f"{round(score.completion_logprob, 4)} {score.is_greedy}\n",
    ):
        assert printed in (LLM.__doc__ or "")


def test_readme_shows_the_real_output(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    example = re.search(r"^```python\n(.*?)^```\n```text\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert example is not None
    assert 'LLM(dtype="float32")' in example[1]
    exec(example[1].replace('LLM(dtype="float32")', "llm"), {"llm": llm})
    assert is_alike(example[2], capsys.readouterr().out)
