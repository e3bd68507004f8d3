"""BFCL: compile the tools of the Berkeley Function Calling Leaderboard as a server does, and check random calls.

    python -m tools.bfcl FOLDER [--model MODEL] [--walks N] [--limit N]

FOLDER is `bfcl_eval/data` of the wheel `bfcl-eval`, whose files simple, multiple and parallel are read. A walk makes a
required call of tokens that the masks allow; its arguments must validate.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from compiled.state import mask_words
from model.weights.source import default_model_path
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.json_schema import GrammarError
from serve.grammar.masks import LlguidanceGrammar
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.server.model_files import local_tokenizer
from serve.text.output_parts import ArgumentsDelta, CallEnd, CallStart
from serve.text.output_splitter import OutputSplitter
from serve.text.tokenizer import Tokenizer
from serve.tools.call_grammar import call_grammar
from serve.tools.definitions import ToolField, ToolRequest, tool_request
from serve.tools.formats import HERMES

_CATEGORIES = ("simple", "multiple", "parallel")
# BFCL's names of types, Java's among them.
_TYPES: dict[str, str | None] = {
    "dict": "object",
    "HashMap": "object",
    "float": "number",
    "double": "number",
    "long": "integer",
    "tuple": "array",
    "Array": "array",
    "ArrayList": "array",
    "Boolean": "boolean",
    "String": "string",
    "char": "string",
    "any": None,
    "": None,
}
_MAX_TOKENS = 3000  # of a walk


def json_schema(value: Any, *, is_schema: bool = True) -> Any:
    """A schema of BFCL as JSON schema."""
    if not isinstance(value, dict):
        return value
    if not is_schema:
        return {name: json_schema(item) for name, item in value.items()}
    schema = {name: json_schema(item, is_schema=name != "properties") for name, item in value.items()}
    if schema.get("format") not in (None, "date", "date-time", "time", "email", "uri", "uuid"):
        del schema["format"]
    if schema.get("type") in ("array", "tuple") and isinstance(schema.get("items"), dict) and "enum" in schema:
        schema["items"] |= {"enum": schema.pop("enum")}  # of the elements
    kind = schema.pop("type", None)
    name = _TYPES.get(kind, kind) if isinstance(kind, str) else kind
    return schema if name is None else schema | {"type": name}


def entries(folder: Path) -> Iterator[tuple[str, ToolRequest]]:
    """Name and tools of every entry; a call of one of them is required."""
    for path in sorted(folder.glob("BFCL_*.json")):
        category = path.stem.partition("_v4_")[2]
        if category.split("_")[-1] not in _CATEGORIES and category.split("_")[0] not in _CATEGORIES:
            continue
        for line in path.read_text("utf-8").splitlines():
            entry = json.loads(line)
            functions = {function["name"]: function for function in entry["function"]}
            fields = [
                ToolField.model_validate(
                    {"type": "function", "function": form | {"parameters": json_schema(form["parameters"])}}
                )
                for form in functions.values()
            ]
            tools = tool_request(fields, "required", parallel="parallel" in category)
            assert tools is not None
            yield f"{category}:{entry['id']}", tools


class Walker:
    """Makes random outputs of a grammar."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(0)
        ends = [i for i in range(tokenizer.vocab_size) if set(tokenizer.token_bytes(i)) & set(b'"}],')]
        self._ends = np.array(ends)  # tokens that may close something

    def walk(self, grammar: LlguidanceGrammar) -> list[int] | None:
        """Tokens of an output; None if it does not end in time."""
        matcher, tokens = grammar.matcher(), list[int]()
        words = np.zeros(mask_words(self._tokenizer.vocab_size), np.uint32)
        while not matcher.is_finished and len(tokens) < _MAX_TOKENS:
            matcher.fill(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._tokenizer.vocab_size]
            if any(bits[index] for index in self._tokenizer.eos_token_ids):
                return tokens
            closing = self._ends[bits[self._ends] > 0]
            allowed = closing if len(closing) and self._random.random() < 0.5 else np.flatnonzero(bits)
            tokens.append(int(allowed[self._random.randrange(len(allowed))]))
            matcher.advance(tokens[-1])
            assert matcher.error is None, matcher.error
        return tokens if matcher.is_finished else None


def check_calls(tokenizer: Tokenizer, tools: ToolRequest, tokens: Sequence[int]) -> int:
    """Number of calls in an output, whose arguments must validate."""
    splitter = OutputSplitter(tokenizer, HERMES.parser(tools.schemas))
    text = b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")
    names, arguments, ends = list[str](), list[str](), 0
    for part in splitter.push(tokens, text, is_complete=True):
        match part:
            case CallStart():
                names.append(part.name)
                arguments.append("")
            case ArgumentsDelta():
                arguments[part.index] += part.text
            case CallEnd():
                ends += 1
            case _:
                raise AssertionError(f"content besides calls: {part.text!r}")
    assert names
    assert len(names) == ends
    for name, value in zip(names, arguments, strict=True):
        jsonschema.validate(json.loads(value, strict=False), dict(tools.by_name[name].parameters))
    return ends


def main() -> None:
    """Print a line for each category and each failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--walks", type=int, default=0, help="random calls of each entry")
    parser.add_argument("--limit", type=int, help="number of entries of each file")
    options = parser.parse_args()
    tokenizer = local_tokenizer(options.model or default_model_path())
    compiler, walker = GrammarCompiler(tokenizer, tokenizer.vocab_size), Walker(tokenizer)
    counts, times = Counter[tuple[str, str]](), list[float]()
    for name, tools in entries(options.folder):
        category = name.partition(":")[0]
        if options.limit is not None and counts[category, "entries"] == options.limit:
            continue
        counts[category, "entries"] += 1
        start = time.perf_counter()
        try:
            grammar = compiler.compile_blocking(
                GrammarSpec(GrammarKind.STRUCTURAL_TAG, call_grammar(tools, HERMES) or "")
            )
        except GrammarError as error:
            print(f"{name}: {error}")
            continue
        times.append(time.perf_counter() - start)
        counts[category, "compiled"] += 1
        for _ in range(options.walks):
            tokens = walker.walk(grammar)
            counts[category, "unfinished walks"] += tokens is None
            counts[category, "valid calls"] += 0 if tokens is None else check_calls(tokenizer, tools, tokens)
    compiler.close()
    for category in dict.fromkeys(category for category, _ in counts):
        figures = {kind: count for (name, kind), count in counts.items() if name == category}
        print(f"{category}: " + ", ".join(f"{count} {kind}" for kind, count in figures.items()))
    print(f"compile: median {np.median(times) * 1e3:.1f} ms, maximum {max(times) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
