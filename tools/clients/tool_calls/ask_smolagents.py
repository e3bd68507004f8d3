"""smolagents' OpenAIModel, which requires a call of a tool by default. Prints JSON."""

import json
import os

from smolagents import OpenAIModel, tool


@tool  # type: ignore[untyped-decorator]
def weather(city: str, days: int) -> str:
    """Return the forecast of a city.

    Args:
        city: name of the city
        days: number of days
    """
    return f"{city}: rain for {days} days"


def main() -> None:
    model = OpenAIModel("SmolLM2-135M-Instruct", api_base=os.environ["OPENAI_BASE_URL"], api_key="none", temperature=0)
    question = [{"role": "user", "content": [{"type": "text", "text": "What is the weather in Oslo?"}]}]
    fields = {"tools_to_call_from": [weather], "max_tokens": 200, "parallel_tool_calls": False}
    message = model.generate(question, **fields)
    deltas = [delta for event in model.generate_stream(question, **fields) for delta in event.tool_calls or ()]
    (call,) = message.tool_calls
    arguments = call.function.arguments
    printed = {
        "name": call.function.name,
        "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments,
        "streamed": json.loads("".join(delta.function.arguments or "" for delta in deltas)),
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
