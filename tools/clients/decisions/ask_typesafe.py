"""typesafe-sdk, synchronous and asynchronous, with a body that it compresses with zstd. Prints JSON."""

import asyncio
import json
import os
from typing import Any

from typesafe_sdk import AsyncTypeSafeClient, TypeSafeClient, TypeSafeUnprocessableEntityError

URL = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
MODEL = "SmolLM2-135M-Instruct"
STATE = {"subject": "Charged twice", "text": "I was charged twice. " * 100}
QUESTIONS: dict[str, Any] = {
    "billing": {"type": "noul", "instructions": "Is the message about billing?"},
    "tone.of voice": {
        "type": "choice",
        "instructions": "What is the tone?",
        "criteria": {"calm": None, "angry": "loud"},
    },
    "urgency": {"type": "score", "instructions": "How urgent?", "criteria": ["low", {"when": "today"}]},
    "single": {"type": "choice", "criteria": {"only": None}, "instructions": "Which?"},
}


async def main() -> None:
    options: dict[str, Any] = {"base_url": URL, "api_key": "none", "compression": "zstd"}
    with TypeSafeClient(**options) as client:
        response = client.system_one(STATE, QUESTIONS, model=MODEL, timeout=60)
        models = [card.name for card in client.models.list().models]
        try:
            client.system_one(
                STATE, {"odd": {"type": "noul", "instructions": "?", "labels": {"true": "impossible"}}}, model=MODEL
            )
        except TypeSafeUnprocessableEntityError as error:
            message = str(error)
    async with AsyncTypeSafeClient(**options) as async_client:
        other = await async_client.system_one(STATE, QUESTIONS, model=MODEL, timeout=60)
    result = {
        "answers": {name: answer.model_dump() for name, answer in response.answers.items()},
        "same": response.answers == other.answers,
        "usage": response.usage.model_dump(),
        "models": models,
        "error": message,
    }
    print(json.dumps(result))


asyncio.run(main())
