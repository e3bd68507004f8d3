"""instructor and outlines get records in the form of a schema."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools.clients.environments import python_environment, run

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
