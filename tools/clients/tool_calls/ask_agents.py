"""openai-agents on chat completions: a tool that must be called first, then an answer. Prints JSON."""

import asyncio
import json

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    ToolCallItem,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

CALLS: list[dict[str, object]] = []


@function_tool  # type: ignore[untyped-decorator]
def weather(city: str, days: int) -> str:
    """Return the forecast of a city."""
    CALLS.append({"city": city, "days": days})
    return f"{city}: rain for {days} days"


async def main() -> None:
    set_tracing_disabled(True)
    agent = Agent(
        name="Forecaster",
        instructions="Be brief.",
        model=OpenAIChatCompletionsModel("SmolLM2-135M-Instruct", AsyncOpenAI()),
        model_settings=ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False),
        tools=[weather],
    )
    question = "What is the weather in Oslo?"
    result = await Runner.run(agent, question, max_turns=4)
    streamed = Runner.run_streamed(agent, question, max_turns=4)
    items = [event.item async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
    printed = {
        "calls": CALLS,
        "made": [json.loads(item.raw_item.arguments) for item in result.new_items if isinstance(item, ToolCallItem)],
        "streamed": [json.loads(item.raw_item.arguments) for item in items if isinstance(item, ToolCallItem)],
        "text": result.final_output,
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    asyncio.run(main())
