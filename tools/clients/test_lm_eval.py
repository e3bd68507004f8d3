"""lm-evaluation-harness on local tasks: its numbers against those that the server gives when asked directly."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.server_process import ROOT
from tools.clients.conftest import MODEL
from tools.clients.environments import python_environment, run

pytestmark = pytest.mark.clients
TASKS = ROOT / "tools" / "clients" / "lm_eval_tasks"


@dataclass(frozen=True, slots=True)
class Scored:
    """What a run printed and where it put the samples."""

    printed: str
    results: Path

    def samples(self, kind: str, task: str) -> list[Any]:
        """A task's samples in the order of its documents."""
        (path,) = (self.results / kind).rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert len(samples) == len((TASKS / f"{task.removeprefix('logprobd_')}.jsonl").read_bytes().splitlines())
        return sorted(samples, key=lambda sample: int(sample["doc_id"]))


@dataclass(frozen=True, slots=True)
class Direct:
    """The server asked without lm_eval."""

    client: httpx2.Client

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of an answer."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def ids(self, text: str) -> list[int]:
        """A text's tokens, as lm_eval gets them."""
        tokens: list[int] = self.post("../tokenize", prompt=text, add_special_tokens=False)["tokens"]
        return tokens

    def score(self, ids: list[int], start: int) -> tuple[float, bool]:
        """The log-likelihood of ids[start:] after those before them, and whether each is the most likely token."""
        answer = self.post("completions", model=MODEL, prompt=ids, max_tokens=1, temperature=0, prompt_logprobs=0)
        entries = answer["choices"][0]["prompt_logprobs"]
        chosen = [entry[str(token)] for entry, token in zip(entries[start:], ids[start:], strict=True)]
        return sum(entry["logprob"] for entry in chosen), all(entry["rank"] == 1 for entry in chosen)


@pytest.fixture(scope="module")
def scored(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """One run of the example."""
    home = tmp_path_factory.mktemp("lm_eval")
    programs = python_environment("lm_eval")
    # All that is evaluated lies here; where something were to be downloaded, it fails at once instead.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = ("examples/lm_eval/run.sh", str(home / "results"))
    return Scored(run(*command, base_url=base_url, home=home, programs=programs, variables=offline), home / "results")


@pytest.fixture
def direct(base_url: str) -> Iterator[Direct]:
    with httpx2.Client(base_url=base_url, timeout=60) as client:
        yield Direct(client)


def test_lm_eval_multiple_choice(scored: Scored, direct: Direct) -> None:
    greedy = []
    for sample in scored.samples("completions", "logprobd_choice"):
        arguments = [sample["arguments"][f"gen_args_{i}"] for i in range(len(sample["doc"]["choices"]))]
        for argument, ((measured, is_greedy),) in zip(arguments, sample["resps"], strict=True):
            context, whole = direct.ids(argument["arg_0"]), direct.ids(argument["arg_0"] + argument["arg_1"])
            assert whole[: len(context)] == context
            expected, first = direct.score(whole, len(context))
            assert float(measured) == pytest.approx(expected, abs=1e-3)
            assert is_greedy == str(first)
            greedy.append(first)
    assert set(greedy) == {True, False}  # or one of them was not seen
    assert re.search(r"logprobd_choice .*\|acc +\|↑ +\|1\.0000\|", scored.printed)


def test_lm_eval_rolling(scored: Scored, direct: Direct) -> None:
    # lm_eval puts the token before a text that it believes to begin one, for which it takes bos_token.
    (begin,) = direct.ids(direct.client.get("../tokenizer_info").json()["bos_token"])
    total, size = 0.0, 0
    for sample in scored.samples("completions", "logprobd_rolling"):
        ((measured,),) = sample["resps"]
        text = sample["doc"]["text"]
        expected, _ = direct.score([begin, *direct.ids(text)], 1)
        assert float(measured) == pytest.approx(expected, abs=1e-3)
        total, size = total + expected, size + len(text.encode())
    found = re.search(r"logprobd_rolling .*\|bits_per_byte\|↓ +\|(\d\.\d{4})\|", scored.printed)
    assert found is not None
    assert float(found[1]) == pytest.approx(-total / size / math.log(2), abs=1e-3)


def test_lm_eval_counts_the_end_of_a_turn(direct: Direct) -> None:
    """Of a batch in lm_eval's own form each prompt has one entry more than tokens, even where the model then ends."""
    documents = [json.loads(line) for line in (TASKS / "choice.jsonl").read_text("utf-8").splitlines()]
    prompts = [direct.ids(document["context"] + document["choices"][0]) for document in documents]
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = direct.post("completions", prompt=prompts, **fields)
    ends = []
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        numbers, best = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(numbers) == len(best) == len(prompt) + 1
        assert None not in numbers[1:]
        assert all(best[1:])
        ends.append(choice["finish_reason"])
    assert ends == ["stop", "length", "length"]
    assert answer["choices"][0]["logprobs"]["tokens"][-1] == "<|im_end|>"


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_lm_eval_texts_end_before_the_stop_string(scored: Scored, direct: Direct, kind: str) -> None:
    cut = []
    for sample in scored.samples(kind, "logprobd_generate"):
        ((measured,),) = sample["resps"]
        fields = {"model": MODEL, "max_tokens": 16, "temperature": 0}
        question = sample["doc"]["question"]
        if kind == "completions":
            text = direct.post("completions", prompt=question, **fields)["choices"][0]["text"]
        else:
            messages = [{"role": "user", "content": question}]
            text = direct.post("chat/completions", messages=messages, **fields)["choices"][0]["message"]["content"]
        until = sample["arguments"]["gen_args_0"]["arg_1"]["until"]
        # Chat takes four.
        stops = [text.find(stop) for stop in (until if kind == "completions" else until[:4])]
        expected = text[: min([stop for stop in stops if stop >= 0], default=len(text))]
        assert measured == expected
        cut.append(expected != text)
    assert any(cut)
