"""instructor: records by JSON schema and by a tool. Prints JSON."""

import json

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

MODEL = "SmolLM2-135M-Instruct"


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a model may add properties without end

    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


results = {}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(max_retries=0), mode=mode)
    city, answer = client.chat.completions.create_with_completion(
        model=MODEL,
        messages=[{"role": "user", "content": "Paris has 2 million inhabitants."}],
        response_model=City,
        max_tokens=200,
        max_retries=0,
        temperature=0,
        logprobs=True,
    )
    entries = answer.choices[0].logprobs.content
    results[mode.value] = {"city": city.model_dump(), "mass": [entry.allowed_mass for entry in entries]}
print(json.dumps(results))
