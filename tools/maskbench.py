"""MaskBench: compile its JSON schemas as the server does, and check and time the masks of its instances.

    python -m tools.maskbench FOLDER [--model MODEL] [--processes 2] [--limit N] [--output RESULTS.jsonl]

FOLDER is `maskbench/data` of https://github.com/guidance-ai/jsonschemabench. It has no licence, so it is not part of
this repository. Each of its files has a schema, and texts that are valid or not.
"""

import argparse
import collections
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from compiled.state import mask_words
from model.weights.source import default_model_path
from serve.grammar.compiler import GrammarCompiler
from serve.grammar.json_schema import GrammarError
from serve.grammar.masks import LlguidanceGrammar
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.server.model_files import local_tokenizer
from serve.text.tokenizer import Tokenizer

_LIMITS = ("takes more than", "is too large", "more than 1048576", "nested more than")  # in messages


@dataclass
class Result:
    """The outcome of one file; times are microseconds."""

    file: str
    refusal: str | None = None  # of the schema
    crash: str | None = None
    refused_valid: int = 0
    accepted_invalid: int = 0
    tests: int = 0
    compile_time: float = 0
    mask_times: list[float] = field(default_factory=list)


class Checker:
    """Checks files with a compiler of its own."""

    def __init__(self, model: Path | None) -> None:
        self._tokenizer = local_tokenizer(model or default_model_path())
        self._compiler = GrammarCompiler(self._tokenizer, self._tokenizer.vocab_size)
        self._words = np.zeros(mask_words(self._tokenizer.vocab_size), np.uint32)

    def check(self, path: Path) -> Result:
        result, value = Result(path.name), json.loads(path.read_bytes())
        start = time.perf_counter()
        try:
            spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value["schema"]))
            grammar = self._compiler.compile_blocking(spec)
            result.compile_time = (time.perf_counter() - start) * 1e6
            for test in value["tests"]:
                text = json.dumps(test["data"], ensure_ascii=False)
                accepted = self._accepts(grammar, text, self._tokenizer, result)
                result.tests += 1
                result.refused_valid += test["valid"] and not accepted
                result.accepted_invalid += accepted and not test["valid"]
        except GrammarError as error:
            result.refusal = str(error)
        except Exception as error:  # noqa: BLE001  # it is counted
            result.crash = repr(error)
        return result

    def _accepts(self, grammar: LlguidanceGrammar, text: str, tokenizer: Tokenizer, result: Result) -> bool:
        matcher = grammar.matcher()
        for token in [*tokenizer.encode(text, add_special_tokens=False), min(tokenizer.eos_token_ids)]:
            start = time.perf_counter()
            matcher.fill(self._words)
            result.mask_times.append((time.perf_counter() - start) * 1e6)
            if matcher.error is not None or not int(self._words[token // 32]) >> token % 32 & 1:
                return False
            matcher.advance(token)
        return True


def check_files(paths: Sequence[Path], model: Path | None) -> list[Result]:
    checker, found = Checker(model), list[Result]()
    for path in paths:
        found.append(checker.check(path))
        if len(found) % 500 == 0:
            print(f"{len(found)} of {len(paths)}", flush=True)
    return found


def report(found: list[Result]) -> str:
    """The figures as text."""
    refusals = [result.refusal for result in found if result.refusal is not None]
    compiled = [result for result in found if result.refusal is None]
    wrong = [result for result in compiled if result.refused_valid or result.accepted_invalid]
    lines = [
        f"schemas                  {len(found)}",
        f"compiled, all texts right {len(compiled) - len(wrong)} ({(len(compiled) - len(wrong)) / len(found):.1%})",
        f"refused in words         {len(refusals)}",
        f"  of these by limits     {sum(any(words in text for words in _LIMITS) for text in refusals)}",
        f"crashes                  {sum(result.crash is not None for result in found)}",
        f"valid text refused       {sum(result.refused_valid > 0 for result in found)}",
        f"invalid text accepted    {sum(result.accepted_invalid > 0 for result in found)}",
        f"texts                    {sum(result.tests for result in found)}",
        _percentiles("compile", [result.compile_time for result in compiled]),
        _percentiles("mask", [time for result in compiled for time in result.mask_times]),
    ]
    reasons = collections.Counter(re.sub(r" at `.*", "", text)[:70] for text in refusals)
    return "\n".join([*lines, "", *(f"{count:6} {reason}" for reason, count in reasons.most_common(40))])


def _percentiles(name: str, times: list[float]) -> str:
    values = np.array(times or [0.0])
    p50, p99 = np.percentile(values, (50, 99))
    return f"{name:24} p50 {p50:.0f} us, p99 {p99:.0f} us, max {values.max() / 1000:.1f} ms ({len(times)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--model", type=Path, help="folder or .gguf file with the tokenizer; default model's by default"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=int, help="only every n-th file, so that about this number is checked")
    parser.add_argument("--output", type=Path, help="JSON lines with the result of each file")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("*.json"))
    paths = paths[:: max(1, len(paths) // options.limit)] if options.limit else paths
    parts = [paths[i :: options.processes] for i in range(options.processes)]
    with ProcessPoolExecutor(options.processes) as pool:
        found = [result for part in pool.map(check_files, parts, repeat(options.model)) for result in part]
    if options.output is not None:
        rows: list[dict[str, Any]] = [asdict(result) | {"mask_times": None} for result in found]
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
