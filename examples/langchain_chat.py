"""Print the log-prob of each token with LangChain's ChatOpenAI, from a running server.

Needs `pip install langchain-openai`. Set OPENAI_BASE_URL=http://host:port/v1 for another address and OPENAI_API_KEY for
an API key.
"""

import json
import os
import sys
from typing import Any

try:
    from langchain_core.messages import AIMessage, AIMessageChunk
    from langchain_openai import ChatOpenAI
    from openai import APIConnectionError
except ImportError:
    sys.exit("langchain-openai is not installed: pip install langchain-openai")

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
QUESTION = "What is the capital of France?"


def print_answer(title: str, message: AIMessage) -> None:
    """Print the text, each token with its log-prob, and the usage."""
    print(f"\n== {title}: {json.dumps(message.content, ensure_ascii=False)}")
    entries: list[dict[str, Any]] = message.response_metadata["logprobs"]["content"]
    for entry in entries:
        print(json.dumps(entry["token"], ensure_ascii=False), entry["logprob"])
    usage = message.usage_metadata
    assert usage is not None
    print(f"tokens: {usage['input_tokens']} of the prompt, {usage['output_tokens']} generated")


def main() -> None:
    """Print an answer, then the same one streamed."""
    model = ChatOpenAI(
        base_url=URL,
        api_key=lambda: os.environ.get("OPENAI_API_KEY", "none"),
        model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
        max_tokens=32,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream_usage=True,
    )
    try:
        print_answer("chat", model.invoke(QUESTION))
    except APIConnectionError:
        sys.exit(f"no server at {URL}: start one with `make serve` or set OPENAI_BASE_URL")
    # The sum of all chunks is the message, including its log-probs.
    collected: AIMessageChunk | None = None
    for chunk in model.stream(QUESTION):
        assert isinstance(chunk, AIMessageChunk)
        collected = chunk if collected is None else collected + chunk
    assert collected is not None
    print_answer("stream", collected)


if __name__ == "__main__":
    main()
