"""instructor, outlines, DSPy and the `ai` package get records in the form of a schema."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.server_process import ROOT
from tools.clients.conftest import MODEL
from tools.clients.environments import node_environment, python_environment, run

pytestmark = pytest.mark.clients


def printed_by(name: str, base_url: str, home: Path) -> Any:
    return json.loads(
        run("python", f"tools/clients/{name}/ask.py", base_url=base_url, home=home, programs=python_environment(name))
    )


def check_city(city: dict[str, Any]) -> None:
    assert city.keys() == {"name", "population"}
    assert len(city["name"]) <= 20
    assert 0 <= city["population"] <= 100_000_000


def test_instructor(base_url: str, tmp_path: Path) -> None:
    printed = printed_by("instructor", base_url, tmp_path)
    assert len(printed) == 2
    for result in printed.values():
        check_city(result["city"])
        assert len(result["mass"]) > 5
        assert all(0 < mass <= 1.001 for mass in result["mass"])


def test_outlines(base_url: str, tmp_path: Path) -> None:
    printed = printed_by("outlines", base_url, tmp_path)
    check_city(json.loads(printed["city"]))
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", printed["regex"])
    assert printed["choice"] in ("large", "small")


def logprobs_of(base_url: str, request: dict[str, Any]) -> list[float]:
    """Log-probs of a direct request."""
    response = httpx2.post(f"{base_url}/chat/completions", json=request, timeout=60)
    assert response.status_code == 200, response.text
    return [entry["logprob"] for entry in response.json()["choices"][0]["logprobs"]["content"]]


def test_dspy(base_url: str, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "population": {"type": "integer"}},
        "required": ["name", "population"],
        "additionalProperties": False,
    }
    formats = {
        "openai": {"type": "json_object"},
        "logprobd": {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    }
    printed = printed_by("dspy", base_url, tmp_path)
    assert printed.keys() == formats.keys()
    for provider, response_format in formats.items():
        result = printed[provider]
        assert isinstance(result["city"]["name"], str)
        assert type(result["city"]["population"]) is int
        request = {"model": MODEL, "messages": result["messages"], "response_format": response_format}
        assert result["logprobs"] == logprobs_of(
            base_url, request | {"temperature": 0, "max_tokens": 200, "logprobs": True}
        )


def test_vercel_ai(base_url: str, tmp_path: Path) -> None:
    # node looks for packages from where the script lies.
    folder = node_environment("vercel_ai")
    script = shutil.copy(ROOT / "tools" / "clients" / "vercel_ai" / "ask.mjs", folder)
    printed = json.loads(run("node", str(script), base_url=base_url, home=tmp_path))
    assert printed.keys() == {"compatible", "chat", "responses"}
    for result in printed.values():
        whole, streamed = result["cities"]
        check_city(whole)
        assert streamed == whole
        whole, streamed = result["calls"]
        assert streamed == whole
        assert whole
        for name, arguments in whole:
            assert name == "weather"
            assert arguments.keys() == {"city", "days"}
        assert result["finish"] == ["stop", "stop", "tool-calls", "tool-calls"]
        assert result["warnings"] == []
    # The package for compatible servers shows no log-probs.
    whole, streamed = printed["chat"]["logprobs"]
    assert streamed == whole
    assert [entry["logprob"] for entry in whole] == logprobs_of(
        base_url, printed["chat"]["request"] | {"stream": False}
    )
    assert printed["responses"]["logprobs"] == [whole, whole]
