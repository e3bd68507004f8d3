"""Answers at temperature 1 in the form of random JSON schemas: how many end by themselves, and whether these are valid.

    python -m tools.schema_answers [URL] [--schemas 50] [--answers 10]

Strings, arrays and integers of the schemas are bounded. The exit code is 1 if an answer that ended is not valid.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
from jsonschema import Draft202012Validator, ValidationError

_MAX_TOKENS = 600
_STREAMS = 8


@dataclass
class Counts:
    answers: int = 0
    ended: int = 0  # by themselves
    invalid: int = 0  # of those that ended


def random_schema(source: random.Random, levels: int = 2) -> dict[str, Any]:
    """A schema whose values are bounded; `levels` of objects and arrays are nested in it."""
    scalars: list[dict[str, Any]] = [
        {"type": "string", "maxLength": source.randint(1, 12)},
        {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        {"type": "string", "format": "ipv4"},
        {"type": "integer", "minimum": -source.randint(0, 99), "maximum": source.randint(1, 10_000)},
        {"enum": source.sample(["red", "green", 3, 4.5, None, True, "ü€"], 3)},
        {"type": ["boolean", "null"]},
        {"const": source.choice(["a b", 17, False])},
    ]
    if levels == 0:
        return source.choice(scalars)
    names = source.sample(["name", "age", "e-mail", 'a "quoted" key', "größe", "tags", "x"], source.randint(1, 4))
    required = source.sample(names, source.randint(0, len(names)))
    return source.choice(
        [
            {
                "type": "object",
                "properties": {name: random_schema(source, levels - 1) for name in names},
                "required": required,
                "additionalProperties": False,
            },
            {"type": "array", "items": random_schema(source, levels - 1), "minItems": 1, "maxItems": 3},
            {"anyOf": [random_schema(source, levels - 1), source.choice(scalars)]},
        ]
    )


def check(url: str, schemas: int, answers: int) -> Counts:
    """Ask the server for `answers` answers in the form of each of `schemas` schemas."""
    counts = Counts()
    with ThreadPoolExecutor(_STREAMS) as pool:
        for found in pool.map(lambda seed: _ask(url, seed, answers), range(schemas)):
            counts.answers += found.answers
            counts.ended += found.ended
            counts.invalid += found.invalid
    return counts


def _ask(url: str, seed: int, answers: int) -> Counts:
    schema = random_schema(random.Random(seed))
    body = {
        "messages": [{"role": "user", "content": f"Write a record that follows this schema: {json.dumps(schema)}"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}},
        "max_tokens": _MAX_TOKENS,
        "temperature": 1,
        "seed": seed,
        "n": answers,
    }
    response = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    assert response.status_code == 200, f"{response.text} for {json.dumps(schema)}"
    choices = response.json()["choices"]
    texts = [choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"]
    return Counts(answers, len(texts), sum(1 for _ in _invalid(schema, texts)))


def _invalid(schema: dict[str, Any], texts: list[str]) -> Iterator[str]:
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for text in texts:
        try:
            validator.validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            print(f"invalid: {text!r} for {json.dumps(schema)}: {error}", file=sys.stderr)
            yield text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--schemas", type=int, default=50)
    parser.add_argument("--answers", type=int, default=10, help="per schema")
    options = parser.parse_args()
    counts = check(options.url, options.schemas, options.answers)
    print(f"{counts.answers} answers, {counts.ended} ended by themselves, {counts.invalid} of these are invalid")
    return 1 if counts.invalid else 0


if __name__ == "__main__":
    sys.exit(main())
