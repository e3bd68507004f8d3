"""Known complaints about other servers, tested on a real server. The numbers are those of the list of complaints."""

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.support.golden_cases import load_golden
from tests.support.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say hello in Japanese, with an emoji 😊."}]

type Ask = Callable[..., Any]


def numbers_from(seed: int, count: int) -> list[int]:
    """Return token ids that no other test sends."""
    return [20 + (seed + 7919 * i * i) % 40000 for i in range(count)]


@pytest.fixture
def ask(server: ServerProcess) -> Ask:
    """POST to a path and return the JSON of the answer."""

    def post(path: str = COMPLETIONS, **body: Any) -> Any:
        answer = httpx2.post(server.url + path, json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


def chunks(server: ServerProcess, path: str, **body: Any) -> list[Any]:
    """Return the chunks of a stream."""
    with httpx2.stream("POST", server.url + path, json=body | {"stream": True}, timeout=300) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_1_many_long_prompts_with_logprobs_are_served(server: ServerProcess) -> None:
    async def all_at_once() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as client:
            bodies = [
                {"prompt": numbers_from(i, 600), "max_tokens": 1, "prompt_logprobs": 20, "temperature": 0}
                for i in range(8)
            ]
            return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))

    before = server.peak_memory()
    for answer in asyncio.run(all_at_once()):
        assert answer.status_code == 200
        assert len(answer.json()["choices"][0]["prompt_logprobs"]) == 600
    assert server.peak_memory() - before < 400e6  # one [600, V] array takes 118 MB, eight of them 944 MB


def test_2_and_3_cached_prompts_score_equal_to_uncached(ask: Ask) -> None:
    ids = numbers_from(2, 200)
    cold = ask(prompt=ids, max_tokens=0, prompt_logprobs=3)
    ask(prompt=[*ids[:128], *numbers_from(3, 60)], max_tokens=0, prompt_logprobs=3)  # shares a prefix
    again = ask(prompt=ids, max_tokens=0, prompt_logprobs=3)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
    assert again["choices"][0]["prompt_logprobs"] == cold["choices"][0]["prompt_logprobs"]
    assert all(
        -9999 <= entry["logprob"] <= 0 for row in cold["choices"][0]["prompt_logprobs"][1:] for entry in row.values()
    )


def test_4_generated_logprobs_equal_scored_logprobs(ask: Ask) -> None:
    prompt = numbers_from(4, 30)
    made = ask(prompt=prompt, max_tokens=20, temperature=1, seed=1, logprobs=2, return_token_ids=True, ignore_eos=True)
    (choice,) = made["choices"]
    scored = ask(prompt=prompt + choice["token_ids"], max_tokens=0, prompt_logprobs=0, cache_salt="4")
    rows = scored["choices"][0]["prompt_logprobs"][len(prompt) :]
    returned = [row[str(token)]["logprob"] for row, token in zip(rows, choice["token_ids"], strict=True)]
    assert returned == choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 65, 255, 256, 257, 513])
def test_5_prompt_logprobs_cover_every_token_of_all_chunks(ask: Ask, length: int) -> None:
    answer = ask(prompt=numbers_from(5 + length, length), max_tokens=1, prompt_logprobs=0, return_token_ids=True)
    (choice,) = answer["choices"]
    entries = choice["prompt_logprobs"]
    assert len(entries) == len(choice["prompt_token_ids"]) == answer["usage"]["prompt_tokens"] == length
    assert entries[0] is None
    for entry, token in zip(entries[1:], choice["prompt_token_ids"][1:], strict=True):
        assert list(entry) == [str(token)]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_6_prompt_logprobs_in_streams_and_chats(server: ServerProcess, ask: Ask, path: str) -> None:
    body: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "The capital of France"}
    body |= {"max_tokens": 2, "temperature": 0, "prompt_logprobs": 2}
    whole, streamed = ask(path, **body), chunks(server, path, **body)
    places = [chunk if path == CHAT else chunk["choices"][0] for chunk in (whole, *streamed)]
    assert places[0]["prompt_logprobs"] == places[1]["prompt_logprobs"]
    assert not any("prompt_logprobs" in place for place in places[2:])


def test_7_more_alternatives_change_no_logprob(ask: Ask) -> None:
    body = {"prompt": "I said 😊 and", "max_tokens": 8, "temperature": 0}
    few, many = (ask(**body, logprobs=k)["choices"][0]["logprobs"] for k in (2, 20))
    assert few["token_logprobs"] == many["token_logprobs"]
    for two, twenty in zip(few["top_token_ids"], many["top_token_ids"], strict=True):
        assert (len(two), len(set(twenty))) == (2, 20)
        assert twenty[:2] == two
    chat = ask(CHAT, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=20)
    for entry in chat["choices"][0]["logprobs"]["content"]:
        assert len({other["token_id"] for other in entry["top_logprobs"]}) == 20
        assert [other["rank"] for other in entry["top_logprobs"]] == list(range(1, 21))


def test_8_bytes_are_exact_and_the_end_token_is_marked(ask: Ask) -> None:
    answer = ask(CHAT, messages=MESSAGES, max_tokens=60, temperature=0, logprobs=True, return_token_ids=True)
    (choice,) = answer["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["token_id"] for entry in content] == choice["token_ids"]
    ended = choice["finish_reason"] == "stop"
    spoken = b"".join(bytes(entry["bytes"]) for entry in (content[:-1] if ended else content))
    assert spoken.decode("utf-8", "replace") == choice["message"]["content"]
    prompt = ask(prompt="naïve 😊", max_tokens=0, echo=True, logprobs=0, return_token_ids=True)["choices"][0]
    names = [f"token_id:{token}" for token in prompt["prompt_token_ids"]]
    as_ids = ask(prompt="naïve 😊", max_tokens=0, echo=True, logprobs=0, return_tokens_as_token_ids=True)
    assert as_ids["choices"][0]["logprobs"]["tokens"] == names
    assert "\ufffd" not in "".join(prompt["logprobs"]["tokens"])
    finished = ask(CHAT, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0,
                   max_tokens=30, logprobs=True)["choices"][0]  # fmt: skip
    assert finished["finish_reason"] == "stop"
    assert finished["logprobs"]["content"][-1]["token"] == "<|im_end|>"


def test_8_text_offsets_are_places_in_the_text(ask: Ask) -> None:
    def echoed(prompt: Any, **fields: Any) -> tuple[str, list[int]]:
        (choice,) = ask(prompt=prompt, echo=True, logprobs=0, max_tokens=0, **fields)["choices"]
        return choice["text"], choice["logprobs"]["text_offset"]

    assert echoed("Hello\x04 world") == ("Hello\x04 world", [0, 6])  # without a token for the control character
    assert echoed([0, 504, 3575]) == ("<|endoftext|>The capital", [0, 13, 16])
    body = {"prompt": [57, 1137, 40303], "echo": True, "logprobs": 0, "max_tokens": 1, "allowed_token_ids": [228]}
    (choice,) = ask(**body)["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("I said 😊", [0, 1, 6, 7])


def test_9_batching_changes_no_logprob(server: ServerProcess) -> None:
    async def crowd(size: int) -> list[Any]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as client:
            body = {"max_tokens": 12, "logprobs": 5, "prompt_logprobs": 5, "seed": 9, "temperature": 1}
            prompts = [numbers_from(9, 70), *(numbers_from(100 + i, 40 + 30 * i) for i in range(size))]
            salted = [{"prompt": ids, "cache_salt": f"{size}"} | body for ids in prompts]
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=each) for each in salted))
            return [answer.json() for answer in answers]

    alone, crowded = asyncio.run(crowd(0))[0], asyncio.run(crowd(3))[0]
    assert alone["choices"] == crowded["choices"]
    assert alone["system_fingerprint"] == crowded["system_fingerprint"]
    assert "float32" in alone["system_fingerprint"]


def test_10_logprobs_mode_of_a_request_is_reported(ask: Ask) -> None:
    body = {"prompt": numbers_from(10, 20), "max_tokens": 6, "temperature": 0.5, "seed": 3, "logprobs": 20}
    answers = {mode: ask(**body, logprobs_mode=mode) for mode in ("raw_logprobs", "processed_logprobs")}
    assert {mode: answer["logprobs_mode"] for mode, answer in answers.items()} == {mode: mode for mode in answers}
    raw, processed = (answer["choices"][0] for answer in answers.values())
    assert raw["text"] == processed["text"]
    for before, after in zip(raw["logprobs"]["top_logprobs"], processed["logprobs"]["top_logprobs"], strict=True):
        a, b = (list(values.values())[:20] for values in (before, after))
        for i in range(1, 20):  # a temperature of 0.5 doubles every difference
            assert b[i] - b[0] == pytest.approx(2 * (a[i] - a[0]), abs=1e-3)
    filtered = ask(**body | {"top_k": 3}, logprobs_mode="processed_logprobs")["choices"][0]["logprobs"]
    for own, top in zip(filtered["token_logprobs"], filtered["top_logprobs"], strict=True):
        kept = [value for value in top.values() if value > -9999]
        assert own in kept
        assert len(kept) == 3
        assert math.fsum(map(math.exp, kept)) == pytest.approx(1, abs=1e-5)


def test_12_probability_0_is_valid_json(server: ServerProcess) -> None:
    body = {"prompt": "One, two,", "max_tokens": 2, "logprobs": 5, "allowed_token_ids": [504, 505, 506]}
    body |= {"logprobs_mode": "processed_logprobs"}
    text = httpx2.post(server.url + COMPLETIONS, json=body, timeout=60).text
    assert "NaN" not in text
    assert "Infinity" not in text
    for top in json.loads(text)["choices"][0]["logprobs"]["top_logprobs"]:
        values = sorted(top.values())
        assert values.count(-9999.0) >= 2
        assert math.fsum(math.exp(value) for value in values) == pytest.approx(1, abs=1e-5)


def test_13_token_ids_round_trip(ask: Ask) -> None:
    returned = ask(CHAT, messages=MESSAGES, max_tokens=5, temperature=0, return_token_ids=True, logprobs=True)
    (choice,) = returned["choices"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == returned["usage"]["completion_tokens"]
    body = {"prompt": returned["prompt_token_ids"], "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    again = ask(**body, logprobs=0)["choices"][0]
    assert again["token_ids"] == choice["token_ids"]
    numbers = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert again["logprobs"]["token_logprobs"] == numbers
    chat = ask(CHAT, prompt_token_ids=returned["prompt_token_ids"], max_tokens=5, temperature=0, logprobs=True)
    assert [entry["logprob"] for entry in chat["choices"][0]["logprobs"]["content"]] == numbers


def test_14_echo_with_logprobs_is_complete_or_refused(server: ServerProcess, ask: Ask) -> None:
    ids = numbers_from(14, 12)
    for max_tokens in (0, 1):
        logprobs = ask(prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0)["choices"][0][
            "logprobs"
        ]
        assert {len(column) for column in logprobs.values()} == {12 + max_tokens}
        assert None not in logprobs["token_logprobs"][1:]
    refused = httpx2.post(server.url + COMPLETIONS, json={"prompt": ids, "echo": True, "suffix": "x"}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")


def test_15_prompt_logprobs_of_a_suffix_labels_and_columns(ask: Ask) -> None:
    ids, labels = numbers_from(15, 100), [100, 200, 300]
    body = {"prompt": ids, "max_tokens": 0, "prompt_logprobs_start": 90, "prompt_logprob_token_ids": labels}
    entries = ask(**body)["choices"][0]["prompt_logprobs"]
    assert entries[:90] == [None] * 90
    columns = ask(**body, prompt_logprobs_format="columns")["choices"][0]["prompt_logprobs_columns"]
    assert columns["token_ids"] == ids[90:]
    assert columns["top_token_ids"] == [labels] * 10
    for entry, token, own, others in zip(
        entries[90:], ids[90:], columns["logprobs"], columns["top_logprobs"], strict=True
    ):
        assert entry[str(token)]["logprob"] == own
        assert [entry[str(label)]["logprob"] for label in labels] == others


def test_16_logprobs_zero_and_absent_as_in_openai(ask: Ask) -> None:
    body = {"prompt": "Hello", "max_tokens": 2, "temperature": 0}
    assert ask(**body)["choices"][0]["logprobs"] is None
    zero = ask(**body, logprobs=0)["choices"][0]["logprobs"]
    assert [list(top.values()) for top in zero["top_logprobs"]] == [[own] for own in zero["token_logprobs"]]
    chat = {"messages": MESSAGES, "max_tokens": 2, "temperature": 0}
    assert ask(CHAT, **chat)["choices"][0]["logprobs"] is None
    for extra in ({}, {"top_logprobs": 0}, {"top_logprobs": None}):
        content = ask(CHAT, **chat, logprobs=True, **extra)["choices"][0]["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in content] == [[], []]
    five = ask(CHAT, **chat, logprobs=True, top_logprobs=5)["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in five] == [5, 5]


def test_17_max_logprobs_is_in_the_model_card(server: ServerProcess) -> None:
    (card,) = httpx2.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    body = {"prompt": "Hi", "max_tokens": 1, "logprobs": card["max_logprobs"]}
    assert httpx2.post(server.url + COMPLETIONS, json=body, timeout=60).status_code == 200
    refused = httpx2.post(server.url + COMPLETIONS, json=body | {"logprobs": card["max_logprobs"] + 1}, timeout=60)
    assert refused.status_code == 400
    assert "--max-logprobs" in refused.json()["error"]["message"]


def test_18_logprobs_and_ranks_equal_hugging_face(ask: Ask) -> None:
    for prompt in load_golden("smollm2-q4_1-gguf-f32")[:2]:
        answer = ask(prompt=list(prompt.token_ids), max_tokens=0, prompt_logprobs=20)
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        for entry, expected in zip(entries, prompt.scored, strict=True):
            own = entry[str(expected.token_id)]
            assert own["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
            assert own["rank"] in expected.ranks
            best = sorted(entry.values(), key=lambda each: each["rank"])
            assert [each["rank"] for each in best[:20]] == list(range(1, 21))
            assert best[0]["logprob"] == pytest.approx(expected.top[0][1], abs=1e-4)
