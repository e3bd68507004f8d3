"""pydantic-ai: an output that the model must give by a call of a tool. Prints JSON."""

import asyncio
import json
import os

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


async def main() -> None:
    provider = OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key="none")
    model = OpenAIChatModel("SmolLM2-135M-Instruct", provider=provider)
    settings = OpenAIChatModelSettings(temperature=0, max_tokens=300, openai_logprobs=True, parallel_tool_calls=False)
    agent = Agent(model, output_type=City, model_settings=settings)
    result = await agent.run("Describe Oslo.")
    response = result.all_messages()[1]
    (call,) = [part for part in response.parts if isinstance(part, ToolCallPart)]
    async with agent.run_stream("Describe Oslo.") as stream:
        streamed = await stream.get_output()
    printed = {
        "city": result.output.model_dump(),
        "streamed": streamed.model_dump(),
        "arguments": call.args_as_dict(),
        "logprobs": len((response.provider_details or {}).get("logprobs", ())),
        "finish_reason": response.finish_reason,
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    asyncio.run(main())
