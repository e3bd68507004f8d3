"""The scale: from how likely a token was to how it looks."""

import math
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the scale."""

    probability: float  # at least this
    style: Style
    label: str


def _step(probability: float, label: str, background: str = "", text: str = "black") -> Step:
    return Step(probability, Style.parse(f"{text} on {background}") if background else Style.null(), label)


# Backgrounds, as spaces and line breaks can be surprising, too; each with a text colour that can be read on it whatever
# the terminal's own colours are.
SCALE = (
    _step(0.9, "90 %"),
    _step(0.5, "50 %", "#d9f0a3"),
    _step(0.25, "25 %", "#f7f48b"),
    _step(0.1, "10 %", "#fed976"),
    _step(0.03, "3 %", "#fdae61"),
    _step(0.01, "1 %", "#f46d43"),
    _step(0.001, "0.1 %", "#d7301f", "white"),
    _step(0.0, "less", "#88125a", "white"),
)


def step_of(logprob: float) -> Step:
    """The step of a token; what is not a number is the most surprising of all."""
    probability = 0.0 if math.isnan(logprob) else math.exp(min(0.0, logprob))
    return next((step for step in SCALE if probability >= step.probability), SCALE[-1])


def percent(logprob: float) -> str:
    """A probability, such as "3.2 %"."""
    value = 100 * math.exp(min(0.0, logprob))
    if value < 0.01:
        return "below 0.01 %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def legend() -> Text:
    """The steps in their colours."""
    labels = [part for step in SCALE for part in ((f" {step.label} ", step.style), " ")]
    return Text.assemble(("a token's probability was at least  ", "dim"), *labels)
