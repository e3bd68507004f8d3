"""LLM over a real engine with a scripted runner: inputs, options, results, threads, event loops, interruption."""

import asyncio
import dataclasses
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_type_hints
from unittest.mock import patch

import numpy as np
import pytest

from serve import llm as llm_module
from serve.config.engine_config import EngineConfig, EngineKeywords
from serve.config.options import from_keywords
from serve.engine.request import EngineStoppedError
from serve.jobs.chat import ChatKeywords, ChatOptions
from serve.jobs.generate import GenerationOptions, SamplingKeywords
from serve.jobs.request_queue import RequestError
from serve.jobs.results import Tokens
from serve.llm import LLM
from serve.server.model_files import StartupError
from serve.text.chat import PromptError
from serve.text.tokenizer import Tokenizer
from tests.support.engines import assert_idle
from tests.support.fake_runner import ROUTING, experts_after, hidden_after
from tests.support.http_client import END, ScriptedRunner
from tests.support.scoring import CONTEXT, expected_numbers, fake_load, scripted_runner

USER: dict[str, Any] = {"role": "user", "content": "Hi"}


@pytest.fixture
def runner() -> ScriptedRunner:
    return scripted_runner(b"Hello")


@pytest.fixture
def llm(runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(llm_module, "load", fake_load(runner))
    with LLM() as llm:
        yield llm


def scored(tokens: Tokens) -> tuple[list[Any], list[Any]]:
    """Log-probs and ranks as `expected_numbers` returns them."""
    return (
        [None if math.isnan(value) else value for value in tokens.logprobs.tolist()],
        [rank or None for rank in tokens.ranks.tolist()],
    )


def test_generate_returns_tokens_with_logprobs(llm: LLM) -> None:
    [output] = llm.generate("a", logprobs=2)
    assert (output.text, output.finish_reason, output.stop_reason) == ("Hello", "stop", None)
    assert output.token_ids == [*b"Hello", END]
    assert output.tokens == [*"Hello", "<end>"]
    assert output.logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6])
    assert output.ranks.tolist() == [2] * 6
    assert output.top_ids.tolist()[0] == [ord("H") + 1, ord("H")]
    assert output.top_logprobs.shape == output.top_ranks.shape == (6, 2)
    assert output.prompt_token_ids == [ord("a")]
    assert output.prompt is None
    assert output.logprob == pytest.approx(-2.1)


def test_generate_takes_sequences_and_integers_of_any_type(llm: LLM) -> None:
    ids = np.frombuffer(b"ab", np.uint8).astype(np.int64)
    inputs: list[Any] = [("ab", "ab"), ids, list(ids), [ids], [97, 98]]
    outputs = [llm.generate(prompts) for prompts in inputs]
    assert [[output.prompt_token_ids for output in batch] for batch in outputs] == [[[97, 98]] * 2, *[[[97, 98]]] * 4]
    assert all(type(token_id) is int for batch in outputs for output in batch for token_id in output.prompt_token_ids)


def test_generate_defaults_to_16_tokens(runner: ScriptedRunner, llm: LLM) -> None:
    runner.script = b"x" * 100
    [output] = llm.generate("a")
    assert (output.text, output.finish_reason) == ("x" * 16, "length")


def test_generate_returns_outputs_in_the_order_of_prompts_and_choices(llm: LLM) -> None:
    prompts: list[Any] = ["a", [98, 99], np.array([100])]
    outputs = llm.generate(prompts, n=2, prompt_logprobs=1, max_tokens=1)
    assert [(output.index, output.choice) for output in outputs] == [(i, choice) for i in range(3) for choice in (0, 1)]
    assert [output.prompt_token_ids for output in outputs[::2]] == [[97], [98, 99], [100]]
    assert outputs[2].prompt is not None
    assert scored(outputs[2].prompt) == expected_numbers([98, 99])
    assert outputs[3].prompt is outputs[2].prompt
    assert llm.generate([97, 98], max_tokens=0)[0].prompt_token_ids == [97, 98]
    assert len(llm.generate([])) == 0


def test_generate_ends_at_a_stop_string_and_drops_later_tokens(llm: LLM) -> None:
    [output] = llm.generate("a", stop="ll")
    assert (output.text, output.finish_reason, output.stop_reason) == ("He", "stop", "ll")
    assert output.token_ids == [*b"Hell"]
    assert len(output.logprobs) == 4


def test_chat_renders_one_or_more_conversations(llm: LLM) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    outputs = llm.chat([[USER], [{"role": "user", "content": parts}]])
    assert [bytes(output.prompt_token_ids) for output in outputs] == [b"user:Hi;>", b"user:a\nb;>"]
    [output] = llm.chat([USER], chat_template_kwargs={"mark": "|"})
    assert bytes(output.prompt_token_ids) == b"user:Hi|>"
    assert output.text == "Hello"


def test_chat_takes_null_contents_of_histories(llm: LLM) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    spoken = {"role": "assistant", "content": None, "tool_calls": [call]}
    [output] = llm.chat([USER, spoken, {"role": "tool", "tool_call_id": "1", "content": None}])
    written = b'<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'  # the template shows no calls
    assert bytes(output.prompt_token_ids) == b"user:Hi;assistant:" + written + b";tool:;>"


def test_chat_defaults_to_the_tokens_that_fit(runner: ScriptedRunner, llm: LLM) -> None:
    runner.script = b"x" * CONTEXT
    [output] = llm.chat([USER])
    assert len(output.token_ids) == CONTEXT - len("user:Hi;>")


def test_score_takes_texts_token_ids_and_pairs(llm: LLM) -> None:
    scores = llm.score(["abc", [97, 98], ("ab", "c"), ([97], [98, 99]), "x"], logprobs=1)
    assert [score.token_ids for score in scores] == [[*b"abc"], [*b"ab"], [*b"abc"], [*b"abc"], [*b"x"]]
    assert [score.completion_start for score in scores] == [None, None, 2, 1, None]
    for score in scores:
        assert scored(score) == expected_numbers(score.token_ids)
        assert score.top_ids.shape == (len(score.token_ids), 1)
    assert scores[2].completion_logprob == scores[2].logprobs[2]
    assert scores[2].is_greedy == (scores[2].ranks[2] == 1)
    assert scores[4].perplexity is None
    assert llm.score(("ab", "c"))[0].completion_start == 2


def test_to_pandas_has_one_row_per_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    frame = llm.score([("ab", "c"), "de"]).to_pandas()
    assert frame["index"] == [0, 0, 0, 1, 1]
    assert frame["part"] == ["prompt", "prompt", "completion", "text", "text"]
    assert frame["position"] == [0, 1, 0, 0, 1]
    assert frame["token"] == [*"abcde"]
    assert frame["rank"][1] == expected_numbers([*b"abc"])[1][1]
    frame = llm.generate(["a", "b"], n=2, max_tokens=1, prompt_logprobs=0).to_pandas()
    assert frame["choice"] == [0, 0, 1, 0, 0, 1]
    assert frame["part"] == ["prompt", "completion", "completion"] * 2
    assert llm.generate([]).to_pandas() == {}


def test_to_pandas_without_pandas_says_how_to_install_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        llm.score("ab").to_pandas()


async def test_stream_chat_yields_the_pieces_of_chat(runner: ScriptedRunner, llm: LLM) -> None:
    outputs = [output async for output in llm.stream_chat([USER], logprobs=1)]
    assert [output.text for output in outputs] == [*"Hello", ""]
    assert (outputs[-1].finish_reason, outputs[0].all_logprobs(1).top_ids.shape) == ("stop", (1, 1))
    runner.script = b"x" * CONTEXT
    for limit, count in ((0, 0), (3, 3), (CONTEXT, CONTEXT - len("user:Hi;>"))):
        outputs = [output async for output in llm.stream_chat([USER], max_new_tokens=limit)]
        assert sum(len(output.token_ids) for output in outputs) == count
    with pytest.raises(ValueError, match="max_new_tokens: -1 is negative"):
        llm.stream_chat([USER], max_new_tokens=-1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperture": 1}, TypeError, "'temperture' is not an option; did you mean 'temperature'"),
        ({"temperature": 3.0}, ValueError, "temperature: .* less than or equal to 2"),
        ({"top_p": "x"}, ValueError, "top_p: "),
        ({"n": 0}, ValueError, "n: "),
        ({"stop": ""}, ValueError, "stop: "),
        ({"stop": [""]}, ValueError, "stop: "),
        ({"logprobs": -1}, ValueError, "logprobs: "),
        ({"logprobs": 4}, ValueError, "logprobs: 4 is not from 0 to 3"),
        ({"prompt_logprobs": 4}, ValueError, "prompt_logprobs: 4 is not from 0 to 3"),
        ({"max_tokens": CONTEXT}, PromptError, r"prompts\[0\]: .* maximum context length"),
    ],
)
def test_generate_refuses_wrong_options(
    llm: LLM, options: SamplingKeywords, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate("a", **options)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", r"`texts\[0\]` gives no tokens"),
        (["a", 3], r"`texts\[1\]` must be a string, a list of token ids"),
        ([[97, True]], r"`texts\[0\]\[1\]` is not a token id"),
        ([[97, 260]], "260 is not in the vocabulary"),
        ([("a", "")], "The completion gives no tokens"),
        ([("", "a")], "The prompt gives no tokens"),
        ("a" * (CONTEXT + 1), r"texts\[0\]: .* maximum context length"),
    ],
    ids=str,
)
def test_score_refuses_wrong_texts(llm: LLM, texts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        llm.score(texts)


def test_chat_refuses_wrong_messages_by_their_path(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"messages\[1\]\[0\]\.content") as error:
        llm.chat([[USER], [{"role": "user"}]])
    assert error.value.param == "messages[1][0].content"
    with pytest.raises(PromptError, match="It is refused"):
        llm.chat([{"role": "user", "content": "refuse"}])
    with pytest.raises(PromptError, match="must be a list of messages"):
        llm.chat(cast("Any", USER))


def test_score_refuses_negative_alternatives(llm: LLM) -> None:
    with pytest.raises(ValueError, match="logprobs: -1 is not from 0 to 3"):
        llm.score("ab", logprobs=-1)


def test_score_refuses_a_long_text_before_it_is_tokenized(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", None)
    for text in ("a" * 10**6, ("a", "a" * 10**6)):
        with pytest.raises(PromptError, match="1000000 characters cannot fit"):
            llm.score([text])


async def test_streams_of_one_loop_share_the_places_of_a_queue(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.llm._REQUESTS_PER_SEQ", 1)
    most = 0
    admit = llm.engine.admit

    def count(*arguments: Any) -> Any:
        nonlocal most
        handle = admit(*arguments)
        most = max(most, llm.engine.num_requests)
        return handle

    monkeypatch.setattr(llm.engine, "admit", count)

    async def text() -> str:
        return "".join([output.text async for output in llm.stream_chat([USER])])

    assert await asyncio.gather(*(text() for _ in range(20))) == ["Hello"] * 20
    assert most <= llm.loaded.config.max_num_seqs


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtypo": "float32"}, TypeError, "'dtypo' is not an option; did you mean 'dtype'"),
        (
            {"dtype": "float3"},
            ValueError,
            "dtype: 'float3' is not one of auto, bfloat16, float32; did you mean 'float32'",
        ),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs: 0 is not between"),
        ({"enable_prefix_caching": 1}, ValueError, "enable_prefix_caching: 1 is not True or False"),
        ({"quantization": "int4"}, ValueError, "quantization: 'int4' is not one of auto, none, int8"),
        ({"port": 1}, TypeError, "'port' is not an option"),
        ({"log_format": "json"}, TypeError, "'log_format' is not an option"),
    ],
)
def test_llm_refuses_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(**options)


def test_none_leaves_the_default_of_an_option() -> None:
    config = from_keywords(
        EngineConfig, {"compilation_cache_dir": None, "generation_config": None, "max_logprobs": None}
    )
    assert config == EngineConfig()


def test_llm_reports_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="pickled weights"):
        LLM(str(tmp_path), override_generation_config={"temperature": 0})


def test_keywords_are_the_fields_of_the_options() -> None:
    assert SamplingKeywords.__annotations__.keys() == GenerationOptions.model_fields.keys()
    assert get_type_hints(ChatKeywords).keys() == ChatOptions.model_fields.keys()
    flags = {field.name for field in dataclasses.fields(EngineConfig) if "option" in field.metadata}
    assert EngineKeywords.__annotations__.keys() == flags - {"model", *llm_module._PROCESS_OPTIONS}


def test_generate_works_in_a_running_event_loop(llm: LLM) -> None:
    async def call() -> str:
        return llm.generate("a")[0].text

    assert asyncio.run(call()) == asyncio.run(call()) == "Hello"


def test_calls_from_several_threads_get_their_own_results(llm: LLM) -> None:
    texts = [f"text {i}" for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        results = [*threads.map(lambda text: llm.score([text] * 3), texts)]
    for text, scores in zip(texts, results, strict=True):
        assert [scored(score) for score in scores] == [expected_numbers([*text.encode()])] * 3


def test_a_failed_step_raises_and_leaves_the_llm_usable(runner: ScriptedRunner, llm: LLM) -> None:
    runner.fail_once("prefill")
    with pytest.raises(RequestError, match="the engine failed"):
        llm.score("abc")
    assert scored(llm.score("abc")[0]) == expected_numbers([*b"abc"])


def test_ctrl_c_aborts_the_call_and_leaves_the_llm_usable(runner: ScriptedRunner, llm: LLM) -> None:
    runner.script = b"x" * CONTEXT
    interrupted = threading.Event()

    def interrupt(called: str) -> None:
        if called == "decode" and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)

    runner.before_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"] * 50, max_tokens=100)
    assert_idle(llm.engine)
    runner.script = b"Hello"
    assert llm.generate("a")[0].text == "Hello"


def test_close_ends_calls_and_refuses_later_ones(llm: LLM) -> None:
    llm.close()
    llm.close()
    with pytest.raises(EngineStoppedError, match="closed"):
        llm.score("a")


def test_structured_outputs(runner: ScriptedRunner, llm: LLM) -> None:
    runner.script = b"!" * 20
    outputs = llm.generate(["a", "b"], n=2, structured_outputs={"regex": "[xy]z"}, return_processed_logprobs=True)
    assert [output.text for output in outputs] == ["xz"] * 4
    for output in outputs:
        assert output.finish_reason == "stop"
        assert output.forced == [False, True, True]
        assert output.allowed_mass is not None
        assert output.allowed_mass.shape == (3,)
        assert output.processed_logprobs is not None
        assert output.processed_logprobs.tolist() == output.logprobs.tolist()
    [output] = llm.chat([USER], response_format={"type": "json_schema", "json_schema": {"schema": {"const": 1}}})
    assert output.text == "1"
    [output] = llm.generate("a", max_tokens=1)
    assert (output.allowed_mass, output.forced, output.processed_logprobs) == (None, None, None)


def test_routed_experts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="return_routed_experts: the model has no experts"):
        llm.generate("a", return_routed_experts=True)
    loaded = dataclasses.replace(llm.loaded, limits=dataclasses.replace(llm.loaded.limits, routing=ROUTING))
    with patch.object(llm, "loaded", loaded):
        outputs = llm.generate([[5, 17], [9] * 70], n=2, return_routed_experts=True)
        [chat] = llm.chat([USER], return_routed_experts=True, max_tokens=2)
        [without] = llm.generate("a")
    for output in (*outputs, chat):
        tokens = [*output.prompt_token_ids, *output.token_ids][:-1]
        expected = experts_after([hidden_after(tokens[: n + 1]) for n in range(len(tokens))])
        np.testing.assert_array_equal(output.routed_experts, expected)
    assert without.routed_experts is None


async def test_stream_chat_follows_a_grammar(runner: ScriptedRunner, llm: LLM) -> None:
    runner.script = b"!" * 20
    stream = llm.stream_chat([USER], structured_outputs={"choice": ["yes", "no"]})
    assert "".join([output.text async for output in stream]) == "no"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_error_of_a_grammar(llm: LLM, options: Any, param: str) -> None:
    with pytest.raises(PromptError) as raised:
        llm.generate("a", **options)
    assert raised.value.param == param


@pytest.mark.parametrize("fast", [False, True])
def test_fast_forward_is_an_option(runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(llm_module, "load", fake_load(runner))
    with LLM(grammar_fast_forward=fast) as llm:
        [output] = llm.generate("a", structured_outputs={"choice": ["\0\1y", "\0\1z"]})
    assert output.forced is not None
    assert output.forced[0] == fast  # the token of both bytes, which may also be spelled by two
