"""Print the log-prob of each token of a streamed response, and its least certain token, from a running server.

Needs `pip install openai`. Set OPENAI_BASE_URL=http://host:port/v1 for another address and OPENAI_API_KEY for an API
key. With a server that was started with --response-store FILE, a second question continues the conversation.
"""

import json
import os
import sys

try:
    from openai import APIConnectionError, BadRequestError, OpenAI
    from openai.types.responses import Response
except ImportError:
    sys.exit("openai is not installed: pip install openai")

MODEL = os.environ.get("MODEL", "SmolLM2-135M-Instruct")
QUESTIONS = ("What is the capital of France?", "And of Italy?")


def answer(client: OpenAI, question: str, previous: str | None, *, store: bool) -> Response:
    """Stream a response, print each token with its log-prob as it arrives, and return the response."""
    with client.responses.stream(
        model=MODEL,
        input=question,
        previous_response_id=previous,
        store=store,
        temperature=0,
        max_output_tokens=32,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    ) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                for entry in event.logprobs:
                    print(json.dumps(entry.token, ensure_ascii=False), entry.logprob)
            elif event.type in ("response.completed", "response.incomplete"):
                return event.response
    sys.exit("the stream has no end")


def print_weakest(response: Response) -> None:
    """Print the token that the model was least certain of."""
    entries = [
        entry
        for item in response.output
        if item.type == "message"
        for part in item.content
        if part.type == "output_text"
        for entry in part.logprobs or ()
    ]
    weakest = min(entries, key=lambda entry: entry.logprob)
    print(f"least certain: {json.dumps(weakest.token, ensure_ascii=False)} {weakest.logprob}")


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    previous: str | None = None
    for question in QUESTIONS:
        try:
            print(f"\n== {question}")
            response = answer(client, question, previous, store=True)
        except APIConnectionError:
            sys.exit(f"no server at {client.base_url}: start one with `make serve` or set OPENAI_BASE_URL")
        except BadRequestError as error:
            if error.param != "store":
                sys.exit(error.message)
            print_weakest(answer(client, question, None, store=False))  # the server stores no responses
            return
        print_weakest(response)
        previous = response.id


if __name__ == "__main__":
    main()
