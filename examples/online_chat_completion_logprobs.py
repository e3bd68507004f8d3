"""Print the log-probs of generated tokens and of prompt tokens, from a running server.

Start the server with `make serve`, then run: .venv/bin/python examples/online_chat_completion_logprobs.py
Set OPENAI_BASE_URL=http://host:port/v1 for another address and OPENAI_API_KEY for an API key.
"""

import os
import sys
from typing import Any

try:
    from openai import APIConnectionError, OpenAI
    from openai.types.chat import ChatCompletion
except ImportError:
    sys.exit("openai is not installed: pip install openai")

QUESTION = "What is the capital of France?"
RULE = "=" * 80


def complete(client: OpenAI, model: str) -> ChatCompletion:
    """Request a greedy chat completion with three alternatives for every prompt and generated token."""
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=32,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"prompt_logprobs": 3, "return_token_ids": True},
    )


def print_generated(response: ChatCompletion) -> None:
    """Print each generated token with its alternatives."""
    print("=== Generated Token Logprobs (Standard OpenAI) ===")
    print("These show the model's confidence for each token it generated.\n")
    logprobs = response.choices[0].logprobs
    for position, entry in enumerate((logprobs and logprobs.content) or []):
        print(f"Position {position}: {entry.token!r} (logprob={entry.logprob:.6f})")
        for other in entry.top_logprobs:
            same = (other.token, other.logprob) == (entry.token, entry.logprob)
            chosen = " <-- chosen" if same else ""
            print(f"    {other.token!r}: logprob={other.logprob:.6f}{chosen}")
        print()


def print_prompt(token_ids: list[int], prompt_logprobs: list[dict[str, Any] | None]) -> None:
    """Print each prompt token, followed by its alternatives, most likely first."""
    print("=== Prompt Token Logprobs (vLLM Extension) ===")
    print("These show how likely each prompt token was, given the preceding context.\n")
    for position, (token_id, entries) in enumerate(zip(token_ids, prompt_logprobs, strict=True)):
        if entries is None:
            print(f"Position {position}: token_id={token_id} -> None (first token, no prior context)")
            continue
        print(f"Position {position}: token_id={token_id}")
        for other_id, entry in entries.items():
            actual = " <-- actual" if int(other_id) == token_id else ""
            print(
                f"    token_id={int(other_id):>6}, token={entry['decoded_token']!r}, "
                f"logprob={entry['logprob']:>10.6f}, rank={entry['rank']}{actual}"
            )


def main() -> None:
    """Run the example against OPENAI_BASE_URL, by default a server on this machine."""
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        sys.exit(f"no server at {client.base_url}: start one with `make serve` or set OPENAI_BASE_URL")
    print(f"Using model: {model}\n")
    response = complete(client, model)
    print(RULE)
    print(f"Generated text: {response.choices[0].message.content}\n")
    print(f"{RULE}\n")
    print_generated(response)
    extra = response.model_extra or {}  # fields outside the OpenAI schema
    print_prompt(extra["prompt_token_ids"], extra["prompt_logprobs"])


if __name__ == "__main__":
    main()
