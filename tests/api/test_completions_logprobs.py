"""Log-probs of /v1/completions: all combinations of echo, logprobs and max_tokens; offsets and token names."""

import json
from typing import Any

import numpy as np
import pytest

from compiled.state import ScoreInput
from serve.engine.request import PromptScoring, SamplingParams
from tests.support.fake_runner import MAX_MODEL_LEN, K, Unread, expected_outcome
from tests.support.http_client import (
    BEGIN,
    IMPOSSIBLE,
    TWIN,
    Server,
    alternatives,
    completion_body,
    serving,
)


async def choice_of(server: Server, **fields: Any) -> Any:
    """The only choice of an answer."""
    (choice,) = (await server.complete(**fields))["choices"]
    return choice


async def test_completion_logprobs_example(server: Server) -> None:
    """echo with logprobs 1 and one token: the log-probs of prompt and output in one list."""
    choice = await choice_of(server, prompt=[72, 105], echo=True, logprobs=1, max_tokens=1)
    assert choice["text"] == "HiH"
    # After H the hidden state is 73; i is 105: -(178 mod 7) / 8, rank 1 + 178 mod 5; best is token 73.
    assert choice["logprobs"] == {
        "tokens": ["H", "i", "H"],
        "token_logprobs": [None, -0.375, -0.1],
        "top_logprobs": [None, {"i": -0.375, "I": -1.0}, {"H": -0.1, "I": -0.05}],
        "text_offset": [0, 1, 2],
        "top_token_ids": [None, [73], [73]],
    }
    assert choice["prompt_logprobs"] == [
        None,
        {
            "105": {"logprob": -0.375, "rank": 4, "decoded_token": "i"},
            "73": {"logprob": -1.0, "rank": 1, "decoded_token": "I"},
        },
    ]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("logprobs", [None, 0, 1, K])
@pytest.mark.parametrize("echo", [False, True])
async def test_completion_logprobs_all_variants(
    server: Server, echo: bool, logprobs: int | None, max_tokens: int
) -> None:
    answer = await server.complete(
        prompt="abc", echo=echo, logprobs=logprobs, max_tokens=max_tokens, return_token_ids=True
    )
    (choice,) = answer["choices"]
    assert choice["text"] == ("abc" if echo else "") + "Hello"[:max_tokens]
    assert choice["token_ids"] == list(b"Hello"[:max_tokens])
    assert choice["prompt_token_ids"] == list(b"abc")
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert (choice["prompt_logprobs"] is not None) == (echo and logprobs is not None)
    if logprobs is None:
        assert choice["logprobs"] is None
        return
    columns = choice["logprobs"]
    rows = 3 * echo + max_tokens
    assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(columns, rows)
    assert "".join(columns["tokens"]) == choice["text"]
    assert columns["text_offset"] == list(range(rows))
    for i in range(int(echo), rows):
        assert columns["tokens"][i] == next(iter(columns["top_logprobs"][i]))
        assert columns["top_logprobs"][i][columns["tokens"][i]] == columns["token_logprobs"][i]
        assert logprobs <= len(columns["top_logprobs"][i]) <= logprobs + 1
        assert len(columns["top_token_ids"][i]) == logprobs


async def test_completion_logprobs_echo_first_entry_is_null(server: Server) -> None:
    columns = (await choice_of(server, echo=True, logprobs=2, max_tokens=0))["logprobs"]
    assert {name: column[0] for name, column in columns.items()} == {
        "tokens": "H",
        "token_logprobs": None,
        "top_logprobs": None,
        "text_offset": 0,
        "top_token_ids": None,
    }


async def test_prompt_logprobs_without_logprobs(server: Server) -> None:
    choice = await choice_of(server, prompt="abc", prompt_logprobs=2, max_tokens=0)
    assert (choice["text"], choice["logprobs"]) == ("", None)
    assert len(choice["prompt_logprobs"]) == 3
    assert choice["prompt_logprobs"][0] is None


@pytest.mark.parametrize("k", range(K + 1))
async def test_prompt_logprobs_actual_token_first_and_once(plain_server: Server, k: int) -> None:
    prompt = [4, 5, 6, 7, 9, 20, 41, 5, 3, 2, 90, 11]  # 4 -> 5 and 5 -> 6 are among the best three
    entries = (await choice_of(plain_server, prompt=prompt, prompt_logprobs=k, max_tokens=0))["prompt_logprobs"]
    scores = expected_outcome(
        prompt, SamplingParams(0, prompt=PromptScoring()), max_model_len=MAX_MODEL_LEN
    ).prompt_logprobs
    assert scores is not None
    assert entries[0] is None
    for token, entry, (logprob, rank, ids, ranks, tops) in zip(prompt[1:], entries[1:], scores, strict=True):
        assert isinstance(ids, list)
        assert isinstance(ranks, list)
        assert isinstance(tops, list)
        alternative_ids = [i for i in ids[:k] if i != token]
        assert list(entry) == [str(token), *map(str, alternative_ids)]
        assert (entry[str(token)]["logprob"], entry[str(token)]["rank"]) == (logprob, rank)
        for i in alternative_ids:
            where = ids.index(i)
            assert (entry[str(i)]["logprob"], entry[str(i)]["rank"]) == (tops[where], ranks[where])
        assert all(entry[i]["decoded_token"] == chr(int(i)) for i in entry)


async def test_prompt_logprobs_in_every_choice(plain_server: Server) -> None:
    body = {"prompt": ["abc", [3, 4]], "n": 2, "prompt_logprobs": 1, "max_tokens": 1}
    choices = (await plain_server.complete(**body))["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [3, 3, 2, 2]
    assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]


async def test_completion_logprobs_equal_text_everywhere(server: Server) -> None:
    """lm-eval compares them for equality. The JSON is the shortest text that parses to the float32."""
    response = await server.post("/v1/completions", completion_body(echo=True, logprobs=K))
    columns = json.loads(response.text, parse_float=str)["choices"][0]["logprobs"]
    assert columns["token_logprobs"][2:] == ["-0.1", "-0.2", "-0.3", "-0.4", "-0.5", "-0.6"]
    for logprob, tops, token in zip(
        columns["token_logprobs"][1:], columns["top_logprobs"][1:], columns["tokens"][1:], strict=True
    ):
        assert tops[token] == logprob
        assert str(np.float32(logprob)) == logprob
    assert columns["top_logprobs"][2] == {"H": "-0.1", "I": "-0.05", "J": "-9999.0"}


async def test_completion_logprobs_greedy_equality(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-prob of the most likely token equals that of the best alternative exactly."""

    def best_first(inputs: ScoreInput) -> Unread:
        logprobs = (-inputs.targets / 3).astype(np.float32)
        ids = np.stack([inputs.targets, inputs.targets + 1, inputs.targets + 2], axis=1)
        return alternatives(ids, np.stack([logprobs, logprobs - 1, logprobs - 2], axis=1), logprobs, rank=1)

    monkeypatch.setattr(server.runner, "score", best_first)
    columns = (await choice_of(server, prompt=[9, 8, 7], echo=True, logprobs=1, max_tokens=1))["logprobs"]
    greedy = [
        logprob == max(tops.values())
        for logprob, tops in zip(columns["token_logprobs"][1:], columns["top_logprobs"][1:], strict=True)
    ]
    assert greedy == [True, True, False]


@pytest.mark.parametrize("text", ["Hé 😊!", "日本語", "a\ud7ffb"])
async def test_text_offset_counts_characters(text: str) -> None:
    async with serving(text.encode()) as server:
        choice = await choice_of(server, prompt=text, echo=True, logprobs=0, max_tokens=len(text.encode()))
    assert choice["text"] == text * 2
    columns = choice["logprobs"]
    offsets = columns["text_offset"]
    data = (text * 2).encode()
    assert offsets == [len(data[:i].decode(errors="ignore")) for i in range(len(data))]
    first = text.encode()[0]
    assert columns["tokens"][0] == (chr(first) if first < 128 else f"\\x{first:02x}")


async def test_text_offset_ignores_added_bos() -> None:
    async with serving(add_bos=True) as server:
        choice = await choice_of(server, echo=True, logprobs=0, max_tokens=1, return_token_ids=True)
        assert choice["text"] == "HiH"
        assert choice["prompt_token_ids"] == [BEGIN, *b"Hi"]
        assert choice["logprobs"]["tokens"] == ["<begin>", "H", "i", "H"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
        special = await choice_of(server, echo=True, logprobs=0, max_tokens=1, skip_special_tokens=False)
        assert (special["text"], special["logprobs"]["text_offset"]) == ("HiH", [0, 0, 1, 2])
        bare = await choice_of(server, add_special_tokens=False, return_token_ids=True)
        assert bare["prompt_token_ids"] == list(b"Hi")
        ids = await choice_of(server, prompt=[72], return_token_ids=True)
        assert ids["prompt_token_ids"] == [72]


@pytest.mark.parametrize(
    ("skip", "text", "offsets"),
    [(True, "<begin>HiA", [0, 7, 8, 9, 10, 10]), (False, "<begin>HiA<end><end>", [0, 7, 8, 9, 10, 15])],
)
async def test_text_offset_with_special_tokens(skip: bool, text: str, offsets: list[int]) -> None:
    fields = {"echo": True, "logprobs": 0, "ignore_eos": True, "max_tokens": 3}
    async with serving(b"A") as server:
        choice = await choice_of(server, prompt=[BEGIN, *b"Hi"], skip_special_tokens=skip, **fields)
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == ["<begin>", "H", "i", "A", "<end>", "<end>"]
    assert choice["logprobs"]["text_offset"] == offsets


async def test_output_completes_a_character_of_an_echo() -> None:
    fields: dict[str, Any] = {"prompt": [*b"Hi ", 0xF0, 0x9F], "echo": True, "logprobs": 0}
    async with serving(b"\x98\x8a!") as server:
        choice = await choice_of(server, **fields, max_tokens=3)
        chunks = [chunk["choices"][0] for chunk in await server.complete_stream(**fields, max_tokens=3)]
        incomplete = await choice_of(server, **fields, max_tokens=0)
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("Hi 😊!", [0, 1, 2, 3, 3, 3, 3, 4])
    assert [chunk["text"] for chunk in chunks] == ["Hi ", "😊", "!"]
    offsets = [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"]
    assert (incomplete["text"], incomplete["logprobs"]["text_offset"]) == ("Hi \ufffd", [0, 1, 2, 3, 3])


@pytest.mark.parametrize("stream", [False, True])
async def test_text_offset_counts_characters_before_normalization(stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": "e\u0301x", "echo": True, "logprobs": 0, "max_tokens": 1}
    async with serving(pre="qwen2") as server:
        answer = (await server.complete_stream(**fields))[0] if stream else await server.complete(**fields)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("e\u0301xH", [0, 0, 2, 3])


async def test_top_logprobs_equal_texts_keep_higher_value() -> None:
    async with serving([253]) as server:  # its alternatives are 254, itself and 255
        columns = (await choice_of(server, logprobs=3, max_tokens=1))["logprobs"]
        assert columns["tokens"] == ["\\xfd"]
        assert columns["top_logprobs"] == [{"\\xfd": -0.1, "\\xfe": -0.05, "\\xff": -9999.0}]
    async with serving([TWIN - 1]) as server:  # END, whose best alternative is TWIN
        columns = (await choice_of(server, logprobs=1, max_tokens=1))["logprobs"]
        assert columns["top_logprobs"] == [{"<end>": -0.1, "\\xff": -0.05}]
        assert columns["top_token_ids"] == [[TWIN]]


async def test_top_logprobs_equal_texts_show_more_likely(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(inputs: ScoreInput) -> Unread:
        logprobs = np.full(len(inputs.targets), -2, np.float32)
        ids, tops = np.array([TWIN, 255, 9], np.int32), np.array([-1, -2, -3], np.float32)
        rows = len(logprobs), 1
        return alternatives(np.tile(ids, rows), np.tile(tops, rows), logprobs, rank=2)

    monkeypatch.setattr(server.runner, "score", score)
    columns = (await choice_of(server, prompt=[72, 255], echo=True, logprobs=2, max_tokens=0))["logprobs"]
    assert columns["token_logprobs"] == [None, -2.0]
    assert columns["top_logprobs"] == [None, {"\\xff": -1.0}]
    assert columns["top_token_ids"] == [None, [TWIN, 255]]


async def test_completion_logprobs_return_tokens_as_token_ids(server: Server) -> None:
    choice = await choice_of(server, echo=True, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)
    assert choice["text"] == "HiH"
    assert choice["logprobs"]["tokens"] == ["token_id:72", "token_id:105", "token_id:72"]
    assert choice["logprobs"]["top_logprobs"][2] == {"token_id:72": -0.1, "token_id:73": -0.05}
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


async def test_completion_logprobs_longest_prompt(server: Server) -> None:
    answer = await server.complete(prompt=[1] * MAX_MODEL_LEN, max_tokens=0, prompt_logprobs=0)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert len(answer["choices"][0]["prompt_logprobs"]) == MAX_MODEL_LEN


async def test_prompt_logprobs_of_one_token(server: Server) -> None:
    choice = await choice_of(server, prompt=[5], echo=True, logprobs=1, max_tokens=0)
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["token_logprobs"] == [None]


async def test_completion_logprobs_minus_infinity_is_minus_9999() -> None:
    async with serving(bytes([IMPOSSIBLE])) as server:
        answer = await server.complete(prompt=[1, IMPOSSIBLE], logprobs=1, echo=True)
        choice = answer["choices"][0]
        assert choice["logprobs"]["token_logprobs"][:3] == [None, -9999.0, -9999.0]
        assert choice["prompt_logprobs"][1][str(IMPOSSIBLE)]["logprob"] == -9999.0
        chat = await server.chat(logprobs=True, messages=[{"role": "user", "content": "\x07"}], prompt_logprobs=0)
        assert chat["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
        assert chat["prompt_logprobs"][5]["7"]["logprob"] == -9999.0
