"""LiteLLM: decisions in OpenAI's form, and System One through its provider for vLLM. Prints JSON."""

import json
import os
from typing import Any

import litellm

URL = os.environ["OPENAI_BASE_URL"]
MODEL = "SmolLM2-135M-Instruct"
TEXT = "I was charged twice. Please help!"
QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "name": "billing", "instructions": "Is the message about billing?"},
    {
        "type": "choice",
        "name": "tone",
        "instructions": "What is the tone?",
        "choices": [{"value": "calm"}, {"value": "angry", "description": "loud"}],
    },
]
CRITERIA: dict[str, Any] = {
    "billing": {"type": "noul", "instructions": "Is the message about billing?"},
    "tone": {"type": "choice", "instructions": "What is the tone?", "criteria": {"calm": None, "angry": "loud"}},
}

answer = litellm.decisions(
    model=f"openai/{MODEL}", input=TEXT, questions=QUESTIONS, api_base=URL, api_key="none", safety_identifier="u"
)
other = litellm.systemone(
    model=f"hosted_vllm/{MODEL}", state=TEXT, questions=CRITERIA, api_base=URL.removesuffix("/v1"), api_key="none"
)
print(json.dumps({"decisions": answer.model_dump(mode="json"), "systemone": other.model_dump(mode="json")}))
