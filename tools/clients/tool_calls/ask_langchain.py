"""LangChain's bind_tools and structured output by a function, whole and streamed. Prints JSON."""

import json
from typing import Any

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the weather in Oslo?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


@tool  # type: ignore[untyped-decorator]
def weather(city: str, days: int) -> str:
    """Return the forecast of a city."""
    return f"{city}: rain for {days} days"


def main() -> None:
    model: Any = ChatOpenAI(model=MODEL, temperature=0, max_completion_tokens=300, logprobs=True)
    bound = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke(QUESTION)
    whole: AIMessageChunk | None = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    (call,) = message.tool_calls
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    answer = model.bind_tools([weather], tool_choice="none").invoke([HumanMessage(QUESTION), message, result])
    city = ChatOpenAI(model=MODEL, temperature=0, max_completion_tokens=300).with_structured_output(
        City, method="function_calling"
    )
    printed = {
        "calls": [{"name": call["name"], "args": call["args"]}],
        "streamed": [{"name": call["name"], "args": call["args"]} for call in whole.tool_calls],
        "finish_reason": message.response_metadata["finish_reason"],
        "logprobs": len(message.response_metadata["logprobs"]["content"]),
        "streamed_logprobs": len(whole.response_metadata["logprobs"]["content"]),
        "answer": answer.content,
        "city": city.invoke("Describe Oslo.").model_dump(),
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
