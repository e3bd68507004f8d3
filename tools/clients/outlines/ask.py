"""outlines: a record, a regular expression and a choice, by `from_vllm`. Prints JSON."""

import json
from typing import Literal

import outlines
from openai import OpenAI
from outlines.types import Regex
from pydantic import BaseModel, ConfigDict, Field


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a model may add properties without end

    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


model = outlines.from_vllm(OpenAI(max_retries=0), "SmolLM2-135M-Instruct")
prompt = "Paris has 2 million inhabitants."
print(
    json.dumps(
        {
            "city": model(prompt, City, max_tokens=200, temperature=0),
            "regex": model(prompt, Regex("[0-9]{3}-[a-f]{2}"), max_tokens=20, temperature=0),
            "choice": model(prompt, Literal["large", "small"], max_tokens=20, temperature=0),
        }
    )
)
