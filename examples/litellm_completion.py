"""Print the log-prob of each token with LiteLLM, from a running server.

Needs `pip install litellm`. Set OPENAI_BASE_URL=http://host:port/v1 for another address and OPENAI_API_KEY for an API
key.
"""

import json
import os
import sys
from typing import Any

try:
    import litellm
except ImportError:
    sys.exit("litellm is not installed: pip install litellm")

MODEL = os.environ.get("MODEL", "SmolLM2-135M-Instruct")
SERVER: dict[str, Any] = {
    "api_base": os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "none"),
}
CHAT: dict[str, Any] = SERVER | {
    "model": f"openai/{MODEL}",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 32,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 2,
}


def print_tokens(title: str, text: str, tokens: list[tuple[str, float | None]]) -> None:
    """Print the tokens of one answer; the first token of an echoed text has no log-prob."""
    print(f"\n== {title}: {json.dumps(text, ensure_ascii=False)}")
    for token, logprob in tokens:
        print(json.dumps(token, ensure_ascii=False), json.dumps(logprob))


def main() -> None:
    """Print a chat completion, the same one streamed, and a text completion with its prompt echoed."""
    try:
        choice = litellm.completion(**CHAT).choices[0]
    except (litellm.APIConnectionError, litellm.InternalServerError):  # LiteLLM reports a refused connection as either
        sys.exit(f"no answer from {SERVER['api_base']}: start a server with `make serve` or set OPENAI_BASE_URL")
    print_tokens("chat", choice.message.content, [(entry.token, entry.logprob) for entry in choice.logprobs.content])

    text = ""
    entries: list[Any] = []
    for chunk in litellm.completion(**CHAT, stream=True):
        text += chunk.choices[0].delta.content or ""
        logprobs = getattr(chunk.choices[0], "logprobs", None)
        entries += logprobs.content if logprobs else []
    print_tokens("stream", text, [(entry.token, entry.logprob) for entry in entries])

    completion: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    model = f"text-completion-openai/{MODEL}"
    answer = litellm.text_completion(**SERVER, model=model, **completion, echo=True, logprobs=1)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    print_tokens("completions", choice.text, list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True)))


if __name__ == "__main__":
    main()
