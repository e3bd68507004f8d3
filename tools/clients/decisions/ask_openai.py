"""openai-python: decisions and its tool runners, synchronous and asynchronous. Prints JSON."""

import asyncio
import json
from functools import partial
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.lib.decisions_tool_runner import (
    AsyncDecisionCandidate,
    AsyncDecisionsToolRunner,
    DecisionCandidate,
    DecisionsRunnerParams,
    DecisionsToolRunner,
)

MODEL = "SmolLM2-135M-Instruct"
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "input": "I was charged twice. Please help!",
    "questions": [
        {"type": "predicate", "name": "billing", "instructions": "Is the message about billing?"},
        {
            "type": "choice",
            "name": "tone",
            "instructions": "What is the tone?",
            "choices": [{"value": "calm"}, {"value": True, "description": "angry"}, {"value": "true"}],
        },
        {
            "type": "score",
            "name": "urgency",
            "instructions": "How urgent?",
            "levels": [{"label": "low"}, {"label": "high"}],
        },
    ],
}


ACTIONS = ("key", "lamp", "map")
DONE: Any = {"id": "done", "description": "Everything is taken", "done": True}
RUN: DecisionsRunnerParams = {"model": MODEL, "input": "Take everything.", "safety_identifier": "user-1"}


def action(name: str, execute: Any) -> Any:
    return {"id": name, "description": f"Take the {name}", "execute": execute}


def run_tools(client: OpenAI) -> dict[str, Any]:
    """Let the model choose actions until it is done, or all are taken."""
    taken: list[str] = []

    def candidates(_: object) -> list[DecisionCandidate]:
        return [*(action(name, partial(taken.append, name)) for name in ACTIONS if name not in taken), DONE]

    return dict(DecisionsToolRunner(observe=lambda: f"Taken: {taken}", candidates=candidates).run(client, RUN))


async def run_tools_async(client: AsyncOpenAI) -> dict[str, Any]:
    """As `run_tools`."""
    taken: list[str] = []

    async def take(name: str) -> None:
        taken.append(name)

    async def observe() -> str:
        return f"Taken: {taken}"

    async def candidates(_: object) -> list[AsyncDecisionCandidate]:
        return [*(action(name, partial(take, name)) for name in ACTIONS if name not in taken), DONE]

    return dict(await AsyncDecisionsToolRunner(observe=observe, candidates=candidates).run(client, RUN))


async def main() -> None:
    with OpenAI(max_retries=0) as client:
        answer = client.decisions.create(**REQUEST)
        async with AsyncOpenAI(max_retries=0) as async_client:
            other = await async_client.decisions.create(
                **REQUEST, prompt_cache_key="k", extra_body={"scoring": "sequences"}
            )
            async_run = await run_tools_async(async_client)
        run = run_tools(client)
        try:
            client.decisions.create(**REQUEST | {"questions": REQUEST["questions"][:1] * 2})
        except BadRequestError as error:
            message = {"param": error.param, "code": error.code}
    result = {
        "answers": [part.to_dict() for part in answer.answers],
        "usage": answer.usage.to_dict(),
        "sequences": [part.to_dict() for part in other.answers],
        "runs": [{"status": r["status"], "completed": r["completed_candidate_ids"]} for r in (run, async_run)],
        "error": message,
        "models": [card.id for card in OpenAI().models.list()],
    }
    print(json.dumps(result))


asyncio.run(main())
