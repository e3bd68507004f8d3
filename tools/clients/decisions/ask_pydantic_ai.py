"""pydantic-ai's decision models: OpenAI's decisions and System One. Prints JSON."""

import asyncio
import json
import os
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.decision import (
    ChoiceQuestion,
    DecisionRequest,
    NoulCriteria,
    NoulQuestion,
    ScoreQuestion,
)
from pydantic_ai.models.openai_decisions import OpenAIDecisionsModel
from pydantic_ai.models.system_one import SystemOneModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.providers.system_one import SystemOneProvider

URL = os.environ["OPENAI_BASE_URL"]
MODEL = "SmolLM2-135M-Instruct"
TEXT = "I was charged twice. Please help!"
QUESTIONS: dict[str, Any] = {
    "billing": NoulQuestion(instructions="Is the message about billing?", criteria=NoulCriteria(true="money")),
    "tone": ChoiceQuestion(instructions="What is the tone?", criteria={"calm": None, "angry": "loud"}),
    "urgency": ScoreQuestion(instructions="How urgent?", criteria=["low", "high"]),
}


class Handling(BaseModel):
    tone: Literal["calm", "angry"] = Field(description="What is the tone?")
    billing: bool = Field(description="Is the message about billing?")


async def main() -> None:
    models: dict[str, Any] = {
        "openai": OpenAIDecisionsModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none")),
        "system_one": SystemOneModel(MODEL, provider=SystemOneProvider(base_url=URL, api_key="none")),
    }
    result: dict[str, Any] = {}
    for name, model in models.items():
        response = await model.decide(DecisionRequest(state=TEXT, questions=QUESTIONS), {})
        run = await Agent(model, output_type=Handling, instructions="Read the message.").run(TEXT)
        result[name] = {
            "answers": {key: asdict(answer) for key, answer in response.answers.items()},
            "model": response.model_name,
            "input_tokens": response.usage.input_tokens,
            "agent": run.output.model_dump(),
        }
    print(json.dumps(result))


asyncio.run(main())
