"""A server process with the official client and the example."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionTokenLogprob

from tests.support.golden_cases import Measured, assert_float32, compare, load_golden
from tests.support.server_process import ROOT, ServerProcess


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_example_prints_all_sections(server: ServerProcess) -> None:
    result = subprocess.run(
        [sys.executable, "examples/online_chat_completion_logprobs.py"],
        cwd=ROOT,
        env={**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        check=True,
    )
    text = result.stdout
    assert text.startswith("Using model: SmolLM2-135M-Instruct\n\n" + "=" * 80 + "\n")
    assert "Generated text: The capital of France is Paris.\n" in text
    generated, prompt = text.split("=== Prompt Token Logprobs (vLLM Extension) ===")
    assert "=== Generated Token Logprobs (Standard OpenAI) ===" in generated
    assert re.search(r"^Position 0: 'The' \(logprob=-\d\.\d{6}\)\n    'The': logprob=-\S+ <-- chosen$", generated, re.M)
    assert generated.count("<-- chosen") == 8  # "The capital of France is Paris." and the end of the turn
    assert "Position 0: token_id=1 -> None (first token, no prior context)" in prompt
    line = r"^    token_id=  9690, token='system', logprob= *-\d+\.\d{6}, rank=\d+ <-- actual$"
    assert re.search(line, prompt, re.M)
    positions = prompt.count("\nPosition ")
    assert prompt.count("<-- actual") == positions - 1


def test_golden_logprobs_over_http(client: OpenAI) -> None:
    prompts = load_golden("smollm2-q4_1-gguf-f32")
    measured = []
    for prompt in prompts:
        answer = client.completions.create(
            model="SmolLM2-135M-Instruct",
            prompt=list(prompt.token_ids),
            max_tokens=len(prompt.greedy),
            temperature=0,
            logprobs=1,
            extra_body={"prompt_logprobs": 0, "return_token_ids": True, "ignore_eos": True},
        )
        choice = answer.choices[0]
        extra = choice.model_extra or {}
        entries = [
            entry[str(token)] for entry, token in zip(extra["prompt_logprobs"][1:], prompt.token_ids[1:], strict=True)
        ]
        assert choice.logprobs is not None
        measured.append(
            Measured(
                [entry["logprob"] for entry in entries],
                [entry["rank"] for entry in entries],
                extra["token_ids"],
                choice.logprobs.token_logprobs or [],
            )
        )
    assert_float32(compare(prompts, measured))


def test_stream_equals_the_complete_answer(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Say hello in Japanese, with an emoji."}]
    options = {"model": "SmolLM2-135M-Instruct", "messages": messages, "max_tokens": 40, "seed": 3, "logprobs": True}
    extra = {"return_token_ids": True, "prompt_logprobs": 2}
    whole = client.chat.completions.create(**options, extra_body=extra)  # type: ignore[call-overload]
    text, first = "", None
    entries: list[ChatCompletionTokenLogprob] = []
    ids: list[int] = []
    for chunk in client.chat.completions.create(**options, stream=True, extra_body=extra):  # type: ignore[call-overload]
        first = first or chunk
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        entries += choice.logprobs.content if choice.logprobs else []
        ids += (choice.model_extra or {}).get("token_ids", [])
    choice = whole.choices[0]
    assert text == choice.message.content
    assert ids == choice.model_extra["token_ids"]
    assert [entry.logprob for entry in entries] == [entry.logprob for entry in choice.logprobs.content]
    assert first is not None
    assert first.model_extra["prompt_logprobs"] == whole.model_extra["prompt_logprobs"]
    assert len(whole.model_extra["prompt_logprobs"]) == whole.usage.prompt_tokens
    # Skipping special tokens, the bytes of all entries are the bytes of the text.
    data = b"".join(bytes(entry.bytes or ()) for entry in entries if not entry.token.startswith("<|"))
    assert data.decode("utf-8", "replace") == text


def test_lm_eval_request_has_all_logprobs(server: ServerProcess) -> None:
    """The shape of lm-evaluation-harness's log-likelihood requests."""
    prompts = [[504, 3575, 282, 4649, 314], [504, 6376]]
    body = {
        "model": "SmolLM2-135M-Instruct",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None
        for own, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert own in top.values()
            assert own <= max(top.values())


def test_scoring_a_long_prompt_has_bounded_memory(server: ServerProcess) -> None:
    """Promise 3: no [prompt, vocabulary] array, which would be 690 MB here."""

    def score(tokens: int) -> int:
        ids = [20 + (7919 * i) % 40000 for i in range(tokens)]
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 20}
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=300)
        entries = json.loads(answer.content)["choices"][0]["prompt_logprobs"]
        assert len(entries) == tokens
        assert all(20 <= len(entry) <= 21 for entry in entries[1:])
        return server.peak_memory()

    short = score(100)
    assert score(3500) - short < 400e6


def test_cached_tokens_are_reported_and_change_no_bit(server: ServerProcess) -> None:
    ids = [20 + (104729 * i) % 40000 for i in range(300)]
    body = {"prompt": ids, "max_tokens": 5, "temperature": 0, "logprobs": 5, "prompt_logprobs": 5}

    def ask(**more: object) -> tuple[dict[str, Any], int]:
        answer = httpx2.post(f"{server.url}/v1/completions", json=body | more, timeout=60).json()
        return answer["choices"][0], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    cold, found = ask(cache_salt="cold")
    assert found == 0
    assert ask() == (cold, 0)
    assert ask() == (cold, 299)  # four full pages, with their log-probs, and a copy of the fifth
    ask(prompt=[7, *ids], prompt_logprobs=None, cache_salt="unscored")
    fresh, found = ask(prompt=[7, *ids], cache_salt="fresh")
    assert found == 0
    assert ask(prompt=[7, *ids], cache_salt="unscored") == (fresh, 300)  # runs the head alone on cached hidden states


def test_choices_of_one_prompt_share_a_prefill(server: ServerProcess) -> None:
    ids = [20 + (15485863 * i) % 40000 for i in range(200)]
    body = {"prompt": ids, "max_tokens": 8, "seed": 5, "logprobs": 2}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body | {"n": 3}, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == 200
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for i, choice in enumerate(answer["choices"]):
        alone = httpx2.post(f"{server.url}/v1/completions", json=body | {"seed": 5 + i}, timeout=60).json()
        assert alone["choices"][0]["logprobs"] == choice["logprobs"]
        assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


def test_penalties_and_constraints_change_the_tokens(server: ServerProcess) -> None:
    body = {
        "prompt": "one two three one two three one two",
        "max_tokens": 12,
        "temperature": 0,
        "return_token_ids": True,
    }

    def ask(**more: object) -> list[int]:
        answer = httpx2.post(f"{server.url}/v1/completions", json=body | more, timeout=60).json()
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    plain = ask()
    assert len(set(plain)) < len(plain)
    assert len(set(ask(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))
    unrepeated = ask(repetition_penalty=1e6)
    assert len(set(unrepeated)) == len(unrepeated)
    assert plain[0] not in ask(logit_bias={str(plain[0]): -100})
    assert set(ask(allowed_token_ids=[504, 505])) <= {504, 505}


def test_bad_word_of_two_tokens_is_never_completed(client: OpenAI) -> None:
    def ask(**more: object) -> tuple[list[str], str]:
        answer = client.completions.create(
            model="SmolLM2-135M-Instruct",
            prompt="The capital of France is",
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body=more,
        )
        assert answer.choices[0].logprobs is not None
        return answer.choices[0].logprobs.tokens or [], answer.choices[0].text

    tokens, text = ask()
    word = "".join(tokens[:2])
    assert text.startswith(word)
    others, other_text = ask(bad_words=[word])
    assert others[0] == tokens[0]
    assert others[1] != tokens[1]
    assert word not in other_text


PREDICATE: dict[str, Any] = {"type": "predicate", "name": "billing", "instructions": "Is the message about billing?"}
TONE: dict[str, Any] = {
    "type": "choice",
    "name": "tone",
    "instructions": "What is the tone of the message?",
    "choices": [{"value": "calm"}, {"value": "angry", "description": "loud or insulting"}],
}


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> Any:
    response = httpx2.post(server.url + path, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_decisions_have_the_bits_of_completions_and_scores(server: ServerProcess) -> None:
    """The same labels after the same prompt: of both decision endpoints, the score endpoints and completions."""
    text = "I was charged twice. Please help!"
    body = {"input": text, "questions": [PREDICATE, TONE], "return_token_ids": True, "cache_salt": "cold"}
    answers = post(server, "/v1/decisions", body)["answers"]
    crowd = [PREDICATE | {"name": f"q{i}", "instructions": f"Is it about the number {i}?"} for i in range(62)]
    among = post(server, "/v1/decisions", {"input": text, "questions": [*crowd, PREDICATE, TONE]})["answers"][-2:]
    criteria = {"calm": None, "angry": "loud or insulting"}
    questions = {
        "billing": {"type": "noul", "instructions": PREDICATE["instructions"]},
        "tone": {"type": "choice", "instructions": TONE["instructions"], "criteria": criteria},
    }
    other = post(server, "/v1/systemone", {"state": text, "questions": questions})["answers"].values()
    for answer, *repeated in zip(answers, among, other, strict=True):
        evidence = answer["evidence"]
        [prompt], labels = evidence["prompt_token_ids"], [token_id for [token_id] in evidence["label_token_ids"]]
        assert [repeat["evidence"]["logprobs"] for repeat in repeated] == [evidence["logprobs"]] * 2
        fields = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 0, "logprob_token_ids": labels}
        logprobs = post(server, "/v1/completions", fields)["choices"][0]["logprobs"]
        found = [logprobs["top_logprobs"][0][text] for [text] in evidence["labels"]]
        assert np.asarray(found, np.float32).tolist() == evidence["logprobs"]
        scores = post(
            server,
            "/v1/score",
            {"query": prompt[:-5], "items": [prompt[-5:]], "label_token_ids": labels, "return_token_logprobs": True},
        )
        assert np.asarray(scores["token_logprobs"], np.float32).tolist() == [evidence["logprobs"]]
        assert sum(scores["scores"][0]) == pytest.approx(evidence["label_mass"])
    assert answers[0]["probability"] > 0
    assert sum(option["probability"] for option in answers[1]["probabilities"]) == pytest.approx(1, abs=1e-12)


@pytest.mark.slow
def test_small_cache_and_full_vocabulary(compilation_cache: Path) -> None:
    process = ServerProcess(
        *("--max-num-seqs", "1", "--max-model-len", "512", "--max-logprobs", "-1", "--kv-cache-memory", "8MB"),
        *("--max-num-batched-tokens", "17", "--compilation-cache-dir", str(compilation_cache)),  # few programs
    )
    url = f"{process.url}/v1/completions"
    refused = httpx2.post(url, json={"prompt": [100] * 300, "max_tokens": 1}, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    assert "--kv-cache-memory" in refused.json()["error"]["message"]
    body = {"prompt": [504, 3575, 282, 4649], "max_tokens": 0, "prompt_logprobs": 20}
    few = httpx2.post(url, json=body, timeout=60).json()["choices"][0]["prompt_logprobs"]
    whole = httpx2.post(url, json=body | {"prompt_logprobs": -1}, timeout=60).json()["choices"][0]["prompt_logprobs"]
    assert whole[0] is None
    for some, every in zip(few[1:], whole[1:], strict=True):
        assert len(every) == 49152
        assert {token: every[token] for token in some} == some
        assert sorted(entry["rank"] for entry in every.values()) == list(range(1, 49153))
        assert math.fsum(math.exp(entry["logprob"]) for entry in every.values()) == pytest.approx(1, abs=1e-5)
    assert process.terminate() == 0


@pytest.mark.slow
def test_sigterm_drains_and_a_second_start_reads_the_cache(tmp_path: Path) -> None:
    few = ("--max-num-seqs", "1", "--max-model-len", "256", "--max-num-batched-tokens", "17")  # few programs
    arguments = (*few, "--compilation-cache-dir", str(tmp_path / "xla"))
    first = ServerProcess(*arguments)
    entries = sorted(path.name for path in (tmp_path / "xla").iterdir())
    assert [name for name in entries if name.startswith("decode_1-") and name.endswith(".program")]
    with httpx2.stream(
        "POST",
        f"{first.url}/v1/completions",
        json={"prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True, "stream": True},
        timeout=60,
    ) as response:
        lines = response.iter_lines()
        next(lines)  # the stream has started: stop the server
        first.process.terminate()
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2]
    assert first.process.wait(60) == 0
    first.terminate()
    second = ServerProcess(*arguments)
    assert second.terminate() == 0
    assert sorted(path.name for path in (tmp_path / "xla").iterdir()) == entries
    assert any(re.search(r"compiled (\d+) programs in \S+ s, \1 from the cache", line) for line in second.log)


@pytest.mark.slow
def test_unusable_model_is_one_message_and_exit_code_1(tmp_path: Path, compilation_cache: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    options = ("--port", "0", "--compilation-cache-dir", str(compilation_cache))
    wrong = [
        *((str(model),) for model in (broken, tmp_path / "nothing", tmp_path)),
        ("--generation-config", str(tmp_path / "nowhere.json")),
    ]
    processes = [
        subprocess.Popen([sys.executable, "-m", "serve", *each, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for each in wrong
    ]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 1
        assert "Traceback" not in error
        assert error.startswith("error: ")
