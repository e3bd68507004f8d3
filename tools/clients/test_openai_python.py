"""openai-python: sync, async, raw streams and the streaming helper."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel, Field

from tools.clients.conftest import MODEL

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
EMOJI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello in Japanese, with an emoji."}]
PROMPT = "The capital of France is"


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(base_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def entries_of(choice: Choice) -> list[ChatCompletionTokenLogprob]:
    """A choice's log-probs, which must be there."""
    assert choice.logprobs is not None
    assert choice.logprobs.content
    return choice.logprobs.content


def test_models(client: OpenAI) -> None:
    assert [card.id for card in client.models.list()] == [MODEL]
    card = client.models.retrieve(MODEL)
    assert (card.id, card.object) == (MODEL, "model")
    assert (card.model_extra or {})["max_model_len"] == 8192


def test_chat_has_logprobs_of_output_and_prompt(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=16,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"prompt_logprobs": 1, "return_token_ids": True},
    )
    choice, extra = answer.choices[0], answer.model_extra or {}
    entries = entries_of(choice)
    assert (choice.message.content, choice.finish_reason) == ("The capital of France is Paris.", "stop")
    # The end of the turn is a token too, though the text does not show it.
    assert "".join(entry.token for entry in entries) == "The capital of France is Paris.<|im_end|>"
    assert [(entry.model_extra or {})["token_id"] for entry in entries] == (choice.model_extra or {})["token_ids"]
    for entry in entries:
        best = entry.top_logprobs
        assert len(best) == 3
        assert (best[0].token, best[0].logprob) == (entry.token, entry.logprob)  # temperature 0
        assert best[0].logprob > best[1].logprob > best[2].logprob
    ids, scores = extra["prompt_token_ids"], extra["prompt_logprobs"]
    assert answer.usage is not None
    assert (len(ids), len(scores)) == (answer.usage.prompt_tokens, answer.usage.prompt_tokens)
    assert answer.usage.completion_tokens == len(entries)
    assert scores[0] is None
    assert all(next(iter(score)) == str(token) for token, score in zip(ids[1:], scores[1:], strict=True))


def test_streaming_helper_equals_the_complete_answer(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": EMOJI,
        "max_tokens": 40,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole: ChatCompletion = client.chat.completions.create(**options)
    texts: dict[str, int] = {}
    counted, done = 0, []
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        for event in stream:
            if event.type == "content.done":
                texts[event.content] = texts.get(event.content, 0) + 1
            elif event.type == "logprobs.content.delta":
                counted += len(event.content)
            elif event.type == "logprobs.content.done":
                done.append(len(event.content))
        # Not get_final_completion(), which raises where an answer ends for its length.
        final = stream.current_completion_snapshot
    assert len(whole.choices) == len(final.choices) == 2
    for expected, choice in zip(whole.choices, final.choices, strict=True):
        assert (choice.index, choice.finish_reason) == (expected.index, expected.finish_reason)
        assert choice.message.content == expected.message.content
        collected = [entry.model_dump() for entry in entries_of(choice)]
        assert collected == [entry.model_dump() for entry in entries_of(expected)]
    assert whole.choices[0].message.content != whole.choices[1].message.content  # or the indices prove nothing
    assert texts == {choice.message.content: 1 for choice in whole.choices}
    assert counted == sum(done) == sum(len(entries_of(choice)) for choice in whole.choices)
    assert final.usage is not None
    assert whole.usage is not None
    uncached = {"prompt_tokens_details": None}  # the second request finds the prompt of the first in the cache
    assert final.usage.model_copy(update=uncached) == whole.usage.model_copy(update=uncached)


def test_stream_text_is_the_tokens_bytes(client: OpenAI) -> None:
    text, data = "", b""
    for chunk in client.chat.completions.create(
        model=MODEL, messages=EMOJI, max_tokens=40, temperature=0, logprobs=True, stream=True
    ):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for entry in (choice.logprobs and choice.logprobs.content) or []:
            data += b"" if entry.token == "<|im_end|>" else bytes(entry.bytes or ())
    assert text
    assert data.decode("utf-8", "replace") == text


async def test_concurrent_requests_equal_single_ones(client: OpenAI, async_client: AsyncOpenAI) -> None:
    contents = ["What is the capital of France?", "Name a colour.", "Count to five.", "Say hello."]
    chats: list[list[ChatCompletionMessageParam]] = [[{"role": "user", "content": content}] for content in contents]
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    alone: list[ChatCompletion] = [client.chat.completions.create(messages=chat, **options) for chat in chats]
    at_once: list[ChatCompletion] = await asyncio.gather(
        *[async_client.chat.completions.create(messages=chat, **options) for chat in chats]
    )
    for before, after in zip(alone, at_once, strict=True):
        assert after.choices[0].message.content == before.choices[0].message.content
        assert after.choices[0].logprobs == before.choices[0].logprobs


async def test_async_streaming_helper(client: OpenAI, async_client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
    async with async_client.chat.completions.stream(**options, logprobs=True, top_logprobs=1) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.model_dump() == whole.choices[0].logprobs.model_dump()


def test_completions_echo_the_prompt_with_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    # Its types have no room for the null of the first token.
    numbers: list[Any] = [*(choice.logprobs.token_logprobs or [])]
    best: list[Any] = [*(choice.logprobs.top_logprobs or [])]
    assert choice.text.startswith(PROMPT + " Paris")
    assert "".join(tokens) == choice.text
    assert all(choice.text.startswith(token, offset) for offset, token in zip(offsets, tokens, strict=True))
    assert answer.usage is not None
    assert len(tokens) == len(numbers) == len(best) == answer.usage.total_tokens
    assert (numbers[0], best[0]) == (None, None)
    for token, number, top in zip(tokens[1:], numbers[1:], best[1:], strict=True):
        assert top[token] == number
        assert len(top) in (2, 3)
    generated = answer.usage.completion_tokens
    assert all(number == max(top.values()) for number, top in zip(numbers[-generated:], best[-generated:], strict=True))


def test_completions_stream_equals_the_complete_answer(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "seed": 5, "echo": True}
    whole: Completion = client.completions.create(**options, logprobs=2)
    text = ""
    columns: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(**options, logprobs=2, stream=True):
        choice = chunk.choices[0]
        text += choice.text
        for name, values in columns.items():
            values += getattr(choice.logprobs, name)
    expected = whole.choices[0]
    assert text == expected.text
    assert columns == {name: getattr(expected.logprobs, name) for name in columns}


def test_errors_map_to_the_clients_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=21)
    assert (wrong.value.type, wrong.value.param) == ("invalid_request_error", "top_logprobs")


class City(BaseModel):
    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


CITY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Paris has 2 million inhabitants."}]


def test_parse_returns_a_record_with_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=CITY, response_format=City, max_tokens=200, temperature=0, logprobs=True
    )
    city = answer.choices[0].message.parsed
    assert city is not None
    assert city == City.model_validate_json(answer.choices[0].message.content or "")
    assert answer.choices[0].logprobs is not None
    for entry in answer.choices[0].logprobs.content or ():
        extra = entry.model_extra or {}
        assert 0 < extra["allowed_mass"] <= 1.001
        assert entry.logprob <= 0


def test_stream_helper_parses_a_record(client: OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": CITY, "max_tokens": 200, "temperature": 0, "logprobs": True}
    with client.chat.completions.stream(response_format=City, **fields) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    whole = client.chat.completions.parse(response_format=City, **fields)
    assert "".join(deltas) == whole.choices[0].message.content
    assert answer.choices[0].message.parsed == whole.choices[0].message.parsed
    parsed, expected = answer.choices[0].logprobs, whole.choices[0].logprobs
    assert parsed is not None
    assert expected is not None
    assert parsed.content == expected.content


def test_parse_raises_for_an_answer_that_is_cut_off(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=CITY, response_format=City, max_tokens=3)
