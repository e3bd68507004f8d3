"""anthropic: messages, streamed and counted, with log-probs. Prints JSON."""

import json
import os
from typing import Any

from anthropic import Anthropic, BadRequestError

MODEL = "SmolLM2-135M-Instruct"
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 16,
    "extra_body": {"temperature": 0, "logprobs": True, "top_logprobs": 2},
}


def main() -> None:
    base_url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
    client = Anthropic(base_url=base_url, api_key="none", max_retries=0)
    message = client.messages.create(**REQUEST)
    with client.messages.stream(**REQUEST) as stream:
        events = [event.model_dump(mode="json") for event in stream]
        final = stream.get_final_message()
    prompt = {name: REQUEST[name] for name in ("model", "system", "messages")}
    # The content of an answer is sent back as it is.
    history = [*REQUEST["messages"], {"role": "assistant", "content": message.content}, REQUEST["messages"][0]]
    again = client.messages.create(**REQUEST | {"messages": history})
    try:
        client.messages.create(**REQUEST | {"max_tokens": 0})
    except BadRequestError as error:
        refused = [error.type, error.error_code, bool(error.request_id)]
    printed = {
        "message": message.model_dump(mode="json"),
        "events": events,
        "final": final.model_dump(mode="json"),
        "count": client.messages.count_tokens(**prompt).input_tokens,
        "again": again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0),
        "refused": refused,
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
