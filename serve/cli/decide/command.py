"""`logprobd decide`: decides the requests of a file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from serve.cli.batch.journal import LineSums
from serve.cli.batch.run import Batch, Output, run_batch
from serve.cli.batch.source import BatchError, Line, Source
from serve.cli.decide.config import SCORING_FLAGS, DecideConfig
from serve.cli.decide.report import metrics_table, option_index, read_reports, write_diagram
from serve.jobs.decide import Decider
from serve.jobs.results import Decision, openai_answer, typesafe_answer
from serve.llm import LLM
from serve.text.chat import PromptError
from serve.text.decisions.conversation import check_unique_keys
from serve.text.decisions.plan import DecisionPlan
from serve.text.decisions.questions import DecisionRequest, Question, decision_request, scoring_options


def main(config: DecideConfig) -> int:
    """Decide a file and return the exit code that --help lists."""
    return run_batch(Deciding(config))


@dataclass(slots=True)
class DecisionSums(LineSums):
    decisions: int = 0
    tokens: int = 0  # of prompts
    cached_tokens: int = 0  # of these


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A line and its JSON object, which is empty if the line is not one."""

    line: Line
    body: Mapping[str, Any] = field(default_factory=dict)


class Deciding(Batch[DecideConfig, DecisionSums]):
    label = "deciding"
    unit = "decisions"
    sums = DecisionSums

    async def run(self, llm: LLM, source: Source, output: Output[DecisionSums]) -> None:
        decider = Decider(llm.new_queue(), llm.loaded.limits)
        options = scoring_options(self.config.scoring_options)

        def plans() -> Iterator[tuple[LineRequest, DecisionPlan | PromptError]]:
            for item, request in map(_request, source.lines):
                try:
                    if isinstance(request, PromptError):
                        raise request
                    yield item, llm.decisions.plan(request, options, decider.max_prompt_tokens)
                except PromptError as error:
                    yield item, error

        async with aclosing(decider.stream_results(plans())) as items:
            async for item, result in items:
                row: dict[str, Any] = {"line": item.line.number}
                if "id" in item.body:
                    row["id"] = item.body["id"]
                if isinstance(result, Exception):
                    output.warn(f"{self.config.file}:{item.line.number}: {result}")
                    row["error"] = _error(result)
                    sums = DecisionSums(skipped=1)
                else:
                    if item.body.get("expected") is not None:
                        row["expected"] = item.body["expected"]
                    row["answers"] = _answers(item.body, result)
                    sums = _sums(result)
                output.write(item.line, orjson.dumps(row) + b"\n", sums)

    def units(self, sums: DecisionSums) -> int:
        return sums.decisions

    def describe(self, sums: DecisionSums, rate: str) -> str:
        return f"{sums.lines + sums.skipped:,} lines, {sums.decisions:,} decisions, {rate}"

    def summary(self, sums: DecisionSums) -> list[tuple[str, str]]:
        errors = f", {sums.skipped:,} with errors" if sums.skipped else ""
        cached = f", {sums.cached_tokens / sums.tokens:.0%} cached" if sums.tokens else ""
        return [
            ("lines", f"{sums.lines:,} answered{errors}"),
            ("decisions", f"{sums.decisions:,}"),
            ("tokens", f"{sums.tokens:,} of prompts{cached}"),
        ]

    def report(self, output: Path) -> str:
        reports = read_reports(output, self.config.bins)
        if not reports:
            if self.config.plot:
                raise BatchError("--plot: no line has a right answer in `expected`")
            return ""
        for path in self.config.plot:
            write_diagram(path, reports, self.config.bins)
        plots = "".join(f"{'plot':<11} {path}\n" for path in self.config.plot)
        return f"{plots}\n{metrics_table(reports, self.config.bins)}"


def _request(line: Line) -> tuple[LineRequest, DecisionRequest | PromptError]:
    body: Any = {}
    try:
        if line.error is not None:
            raise PromptError("", f"The line {line.error}.")
        try:
            body = orjson.loads(line.data)
        except orjson.JSONDecodeError as error:
            raise PromptError("", f"The line is not JSON: {error}.", "invalid_json") from None
        if not isinstance(body, dict):
            body = {}
            raise PromptError("", "The line is not a JSON object.", "invalid_type")
        check_unique_keys(line.data)
        for name in body:
            if name in SCORING_FLAGS:
                raise PromptError(name, f"`{name}` is the same for all lines: use --{name}.", "unsupported_parameter")
        request = decision_request(body)
        _check_expected(body.get("expected"), request.questions)
    except PromptError as error:
        return LineRequest(line, body), error
    return LineRequest(line, body), request


def _check_expected(expected: Any, questions: Iterable[Question]) -> None:
    if expected is None:
        return
    if not isinstance(expected, dict):
        raise PromptError("expected", "`expected` must be an object: question to right answer.", "invalid_type")
    by_name = {question.name: question for question in questions}
    for name, value in expected.items():
        path = f"expected.{name}"
        if name not in by_name:
            raise PromptError(path, f"`{path}`: no question has this name.")
        question = by_name[name]
        values: Sequence[Any] = [option.value for option in question.options]
        if question.type == "score":
            values = range(len(values))
        if option_index(values, value) is None:
            kinds = {"noul": "true or false", "choice": "an option", "score": f"a level, 0 to {len(values) - 1}"}
            raise PromptError(path, f"`{path}` must be {kinds[question.type]}.")


def _answers(body: Mapping[str, Any], decisions: Sequence[Decision]) -> Any:
    """Answers in the form of the request. How much was cached is left out: it differs between runs."""
    questions = body["questions"]
    if isinstance(questions, list):
        answers = [openai_answer(decision) for decision in decisions]
    else:
        criteria = [question.get("criteria") for question in questions.values()]
        answers = [typesafe_answer(*pair) for pair in zip(decisions, criteria, strict=True)]
    for answer in answers:
        del answer["evidence"]["cached_tokens"]
    return answers if isinstance(questions, list) else dict(zip(questions, answers, strict=True))


def _sums(decisions: Sequence[Decision]) -> DecisionSums:
    return DecisionSums(
        lines=1,
        decisions=len(decisions),
        tokens=sum(decision.evidence.prompt_tokens for decision in decisions),
        cached_tokens=sum(decision.evidence.cached_tokens for decision in decisions),
    )


def _error(error: Exception) -> dict[str, str | None]:
    if isinstance(error, PromptError):
        return {"message": str(error), "param": error.param or None, "code": error.code}
    return {"message": str(error), "param": None, "code": "engine_error"}
