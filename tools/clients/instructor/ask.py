"""instructor: records by JSON schema and in mode JSON. Prints JSON."""

import json

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = "SmolLM2-135M-Instruct"


class City(BaseModel):
    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


results = {}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
    client = instructor.from_openai(OpenAI(max_retries=0), mode=mode)
    city, answer = client.chat.completions.create_with_completion(
        model=MODEL,
        messages=[{"role": "user", "content": "Paris has 2 million inhabitants."}],
        response_model=City,
        max_tokens=200,
        max_retries=0,
        temperature=0,
        logprobs=True,
        extra_body={"structured_outputs": {"json": City.model_json_schema()}} if mode is instructor.Mode.JSON else None,
    )
    entries = answer.choices[0].logprobs.content
    results[mode.value] = {"city": city.model_dump(), "mass": [entry.allowed_mass for entry in entries]}
print(json.dumps(results))
