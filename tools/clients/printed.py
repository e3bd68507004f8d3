"""What the examples print: a section for each request, which begins with "== NAME: TEXT" and has a line a token."""

import json
import re
from dataclasses import dataclass

from openai import OpenAI

QUESTION = "What is the capital of France?"
PROMPT = "The capital of France is"

type Numbers = list[tuple[str | None, float | None]]  # tokens and their log-probs


@dataclass(frozen=True, slots=True)
class Section:
    """A text and its tokens."""

    text: str | None
    tokens: Numbers
    rest: list[str]  # lines that are neither


def sections(printed: str) -> dict[str, Section]:
    """The sections by name."""
    found = {}
    for part in re.split(r"^== ", printed, flags=re.MULTILINE)[1:]:
        head, *lines = part.splitlines()
        name, _, text = head.partition(": ")
        tokens: Numbers = []
        rest = []
        for line in lines:
            if match := re.fullmatch(r'(null|".*") (\S+)', line):
                tokens.append((json.loads(match[1]), json.loads(match[2])))
            elif line:
                rest.append(line)
        found[name] = Section(json.loads(text) if text else None, tokens, rest)
    return found


@dataclass(frozen=True, slots=True)
class Expected:
    """The same requests' answers over openai-python, whose tests are its own."""

    chat: Section
    prompt: Section
    completions: Section


def ask(base_url: str, model: str) -> Expected:
    """Sends what all examples send."""
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=32,
            temperature=0,
            logprobs=True,
            extra_body={"prompt_logprobs": 0, "return_token_ids": True},
        )
        completion = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, echo=True, logprobs=1
        )
    choice, extra = answer.choices[0], answer.model_extra or {}
    assert choice.logprobs is not None
    chat: Numbers = [(entry.token, entry.logprob) for entry in choice.logprobs.content or []]
    prompt: Numbers = [(None, None)]
    for token, entries in zip(extra["prompt_token_ids"][1:], extra["prompt_logprobs"][1:], strict=True):
        prompt.append((entries[str(token)]["decoded_token"], entries[str(token)]["logprob"]))
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    echoed: Numbers = list(zip(logprobs.tokens or [], logprobs.token_logprobs or [], strict=True))
    # Where a server answers nothing, nothing compares equal.
    assert min(len(chat), len(prompt), len(echoed)) > 4
    return Expected(
        Section(choice.message.content, chat, []),
        Section(None, prompt, []),
        Section(completion.choices[0].text, echoed, []),
    )
