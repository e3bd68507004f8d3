"""openai-agents on its Responses model, with log-probs. Prints JSON."""

import asyncio
import json

from agents import Agent, ModelSettings, Runner, set_tracing_disabled
from openai.types.responses import ResponseTextDeltaEvent

MODEL = "SmolLM2-135M-Instruct"


async def main() -> None:
    set_tracing_disabled(True)
    settings = ModelSettings(temperature=0, max_tokens=16, top_logprobs=1, store=False)
    agent = Agent(
        name="Geographer",
        instructions="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        model=MODEL,
        model_settings=settings,
    )
    question = "What is the capital of France?"
    result = await Runner.run(agent, question)
    [item] = result.raw_responses[-1].output
    streamed = Runner.run_streamed(agent, question)
    deltas = [
        event.data
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
    ]
    printed = {
        "text": result.final_output,
        "logprobs": [entry.model_dump() for entry in item.content[0].logprobs],
        "streamed": "".join(event.delta for event in deltas),
        "streamed_logprobs": [entry.logprob for event in deltas for entry in event.logprobs],
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    asyncio.run(main())
