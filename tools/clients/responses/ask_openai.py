"""openai-python: responses, streamed and stored. Prints JSON."""

import json
from typing import Any

from openai import BadRequestError, NotFoundError, OpenAI

MODEL = "SmolLM2-135M-Instruct"
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "input": "What is the capital of France?",
    "temperature": 0,
    "max_output_tokens": 16,
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
    "store": True,
}


def main() -> None:
    client = OpenAI(max_retries=0)
    response = client.responses.create(**REQUEST)
    with client.responses.stream(**REQUEST) as stream:
        events = [event.model_dump(mode="json") for event in stream]
        final = stream.get_final_response()
    follow_up = client.responses.create(
        **REQUEST | {"input": "And of Italy?"}, previous_response_id=response.id, instructions="Be brief."
    )
    items = client.responses.input_items.list(follow_up.id, order="asc")
    retrieved = client.responses.retrieve(response.id)
    client.responses.delete(response.id)
    try:
        client.responses.retrieve(response.id)
    except NotFoundError as error:
        deleted = error.code
    try:
        client.responses.create(**REQUEST | {"top_logprobs": 21})
    except BadRequestError as error:
        refused = [error.param, error.code]
    printed = {
        "text": response.output_text,
        "response": response.model_dump(mode="json"),
        "retrieved": retrieved.model_dump(mode="json"),
        "events": events,
        "final": final.model_dump(mode="json"),
        "follow_up": follow_up.output_text,
        "items": [item.model_dump(mode="json") for item in items],
        "deleted": deleted,
        "refused": refused,
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
