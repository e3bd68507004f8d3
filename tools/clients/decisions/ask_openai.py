"""openai-python: decisions, synchronous and asynchronous, and its tool runner. Prints JSON."""

import asyncio
import json
from functools import partial
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.lib.decisions_tool_runner import DecisionCandidate, DecisionsToolRunner

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


def run_tools(client: OpenAI) -> dict[str, Any]:
    """Let the model choose actions until it is done, or all are taken."""
    taken: list[str] = []

    def candidates(_: object) -> list[DecisionCandidate]:
        actions: list[DecisionCandidate] = [
            {"id": name, "description": f"Take the {name}", "execute": partial(taken.append, name)}
            for name in ("key", "lamp", "map")
            if name not in taken
        ]
        return [*actions, {"id": "done", "description": "Everything is taken", "done": True}]

    runner = DecisionsToolRunner(observe=lambda: f"Taken: {taken}", candidates=candidates)
    return dict(runner.run(client, {"model": MODEL, "input": "Take everything.", "safety_identifier": "user-1"}))


async def main() -> None:
    with OpenAI(max_retries=0) as client:
        answer = client.decisions.create(**REQUEST)
        async with AsyncOpenAI(max_retries=0) as async_client:
            other = await async_client.decisions.create(
                **REQUEST, prompt_cache_key="k", extra_body={"scoring": "sequences"}
            )
        run = run_tools(client)
        try:
            client.decisions.create(**REQUEST | {"questions": REQUEST["questions"][:1] * 2})
        except BadRequestError as error:
            message = {"param": error.param, "code": error.code}
    result = {
        "answers": [part.to_dict() for part in answer.answers],
        "usage": answer.usage.to_dict(),
        "sequences": [part.to_dict() for part in other.answers],
        "run": {"status": run["status"], "completed": run["completed_candidate_ids"]},
        "error": message,
        "models": [card.id for card in OpenAI().models.list()],
    }
    print(json.dumps(result))


asyncio.run(main())
