"""LangChain's OpenAIDecisions, with a text and with messages. Prints JSON."""

import asyncio
import json
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai.decisions import Choice, OpenAIDecisions, Predicate, Score

MODEL = "SmolLM2-135M-Instruct"
TEXT = "I was charged twice. Please help!"
QUESTIONS: dict[str, Any] = {
    "billing": Predicate(instructions="Is the message about billing?"),
    "tone": Choice(instructions="What is the tone?", choices={"calm": None, True: "angry", "true": None}),
    "urgency": Score(instructions="How urgent?", levels=["low", "high"]),
}


async def main() -> None:
    decisions = OpenAIDecisions(model=MODEL, max_retries=0)
    response = decisions.invoke({"input": TEXT, "questions": QUESTIONS})
    messages = [SystemMessage("Be strict."), HumanMessage(TEXT)]
    other = await decisions.ainvoke({"input": messages, "questions": QUESTIONS})
    result = {
        "billing": response.answers["billing"].probability,
        "tone": [*response.answers["tone"].probabilities.values()],
        "urgency": [*response.answers["urgency"].probabilities.values()],
        "usage": response.usage.model_dump(),
        "messages": sorted(other.answers),
        "request_id": response.request_id,
    }
    print(json.dumps(result))


asyncio.run(main())
