"""Asks a running server for log-probs with LangChain's ChatOpenAI, and prints a line for each token.

Needs `pip install langchain-openai`. Another address: OPENAI_BASE_URL=http://host:port/v1; a key: OPENAI_API_KEY=...
"""

import json
import os
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI

QUESTION = "What is the capital of France?"


def print_answer(title: str, message: AIMessage) -> None:
    """The text, the tokens with their log-probs, and how many there were."""
    print(f"\n== {title}: {json.dumps(message.content, ensure_ascii=False)}")
    entries: list[dict[str, Any]] = message.response_metadata["logprobs"]["content"]
    for entry in entries:
        print(json.dumps(entry["token"], ensure_ascii=False), entry["logprob"])
    usage = message.usage_metadata
    assert usage is not None
    print(f"tokens: {usage['input_tokens']} of the prompt, {usage['output_tokens']} generated")


def main() -> None:
    """An answer at once, and the same one as a stream."""
    model = ChatOpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=lambda: os.environ.get("OPENAI_API_KEY", "none"),
        model=os.environ.get("MODEL", "SmolLM2-135M-Instruct"),
        max_tokens=32,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream_usage=True,
    )
    print_answer("chat", model.invoke(QUESTION))
    # Chunks add up to a message, their log-probs too.
    collected: AIMessageChunk | None = None
    for chunk in model.stream(QUESTION):
        assert isinstance(chunk, AIMessageChunk)
        collected = chunk if collected is None else collected + chunk
    assert collected is not None
    print_answer("stream", collected)


if __name__ == "__main__":
    main()
