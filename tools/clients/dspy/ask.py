"""DSPy's JSON adapter: any JSON object through LiteLLM, a record by schema from a declared provider. Prints JSON."""

import json
import os
from typing import Any

import dspy
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider

MODEL = "SmolLM2-135M-Instruct"


class City(dspy.Signature):  # type: ignore[misc]
    """Extract the city."""

    text: str = dspy.InputField()
    name: str = dspy.OutputField()
    population: int = dspy.OutputField()


def ask(provider: str) -> dict[str, Any]:
    url = os.environ["OPENAI_BASE_URL"]
    settings = {"temperature": 0, "max_tokens": 200, "logprobs": True, "cache": False, "num_retries": 0}
    lm = dspy.LM(f"{provider}/{MODEL}", api_base=url, api_key="none", **settings)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        city = dspy.Predict(City)(text="Paris has 2 million inhabitants.")
    [call] = lm.history
    return {
        "city": {"name": city.name, "population": city.population},
        "logprobs": [entry.logprob for entry in city.logprobs.content],
        "messages": call["messages"],
    }


def main() -> None:
    access = AccessPolicy(provider="logprobd", env_keys=("OPENAI_API_KEY",), base_url=os.environ["OPENAI_BASE_URL"])
    definition = ProviderDefinition.chat(access, compat=OpenAIChatCompat())
    register_provider(definition, supports=ModelSupport(response_schema=True))
    print(json.dumps({provider: ask(provider) for provider in ("openai", "logprobd")}))


if __name__ == "__main__":
    main()
