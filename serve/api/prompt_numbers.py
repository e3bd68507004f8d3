"""PromptNumbers: what an answer tells about the tokens of its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.api.errors import invalid
from serve.api.requests import GenerationRequest
from serve.api.validation import check_scored_ids, check_top_k
from serve.engine.request import EngineLimits, PromptScoring

_MAX_NUMBERS = 4 << 20  # of an answer; as JSON each takes 80 bytes
_FULL_LENGTHS = 2  # prompts of the longest kind that are always answered: one that echoes has its numbers twice


@dataclass(frozen=True, slots=True)
class PromptNumbers:
    """Which numbers of the prompts' tokens are asked for, and how many alternatives are shown where."""

    shown: int | None  # alternatives in `prompt_logprobs`; None: there is no such list
    echoed: int | None  # alternatives in an echo's log-probs; None: there are none
    start: int = 1  # tokens before it have no numbers; the first token never has
    token_ids: tuple[int, ...] = ()  # the alternatives are these, in place of the best
    columns: bool = False  # told as columns instead of an entry for each token
    whole: bool = False  # `shown` is more than the engine tells of every token: rows are asked of Engine.vocabulary()

    @property
    def scoring(self) -> PromptScoring | None:
        """What the first choice of each prompt asks of the engine. It tells the numbers of whole rows' best, too."""
        return None if self.shown is None else PromptScoring(self.start, self.token_ids)


def prompt_numbers(body: GenerationRequest, echoed: int | None, limits: EngineLimits) -> PromptNumbers:
    """Reads `prompt_logprobs`, `prompt_logprobs_start` and `prompt_logprob_token_ids`.

    Args:
        echoed: the `logprobs` of a request that echoes its prompt, else None. As in vLLM, it also shows them as
            `prompt_logprobs`.

    Raises:
        APIError: 400 that names one of them.
    """
    shown = echoed if body.prompt_logprobs is None else body.prompt_logprobs
    ids = body.prompt_logprob_token_ids
    if ids is not None:
        check_scored_ids("prompt_logprob_token_ids", ids, limits)
        if body.prompt_logprobs:
            message = "`prompt_logprob_token_ids` names the alternatives, so `prompt_logprobs` can only be 0 beside it."
            raise invalid("prompt_logprob_token_ids", message)
        shown = len(ids)
        echoed = None if echoed is None else len(ids)
    start = body.prompt_logprobs_start or 0
    if start and shown is None:
        raise invalid("prompt_logprobs_start", "`prompt_logprobs_start` needs log-probs of the prompt to be asked for.")
    whole = ids is None and shown is not None and not 0 <= shown <= limits.max_logprobs
    if whole:
        _check_whole(shown or 0, limits)
        shown = limits.vocab_size if shown == -1 else min(shown or 0, limits.vocab_size)
    columns = body.prompt_logprobs_format == "columns"
    if columns and shown is None:
        raise invalid("prompt_logprobs_format", "`prompt_logprobs_format` needs `prompt_logprobs`.")
    if columns and whole:
        message = f"`prompt_logprobs_format`: columns hold {limits.max_logprobs} alternatives at most."
        raise invalid("prompt_logprobs_format", message)
    return PromptNumbers(shown, echoed, max(1, start), tuple(ids or ()), columns, whole)


def check_start(body: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """The first token with numbers is in every prompt."""
    start = body.prompt_logprobs_start or 0
    if start and any(start >= len(prompt) for prompt in prompts):
        shortest = min(map(len, prompts))
        message = f"`prompt_logprobs_start` is {start}, but a prompt has only {shortest} tokens."
        raise invalid("prompt_logprobs_start", message)


def check_told(numbers: PromptNumbers, prompts: Sequence[Sequence[int]], copies: int, limits: EngineLimits) -> None:
    """An answer's numbers of prompts are not so many that it alone fills the server's memory.

    Args:
        copies: how often the answer has those of each prompt at the same time.
    """
    shown, echoed = (0 if each is None else each + 1 for each in (numbers.shown, numbers.echoed))
    most_of_one = max(limits.max_logprobs, len(numbers.token_ids)) + 1
    # Whole rows are written as they are sent, and once; what is kept of them is their best.
    of_a_row = (most_of_one if numbers.whole else shown * copies) + echoed * copies
    rows = sum(max(0, len(prompt) - numbers.start) for prompt in prompts)
    most = max(_MAX_NUMBERS, _FULL_LENGTHS * limits.max_model_len * most_of_one)
    if (told := rows * of_a_row) > most:
        message = (
            f"The answer would hold {told} log-probs of prompts, of at most {most}: send fewer prompts at once, or ask "
            "for less of each (`prompt_logprobs`, `logprobs` with `echo`, `n`)."
        )
        raise invalid("prompt_logprobs" if numbers.echoed is None else "logprobs", message, "too_many_logprobs")


def _check_whole(k: int, limits: EngineLimits) -> None:
    if limits.whole_vocabulary:
        return
    if k >= 0:
        check_top_k("prompt_logprobs", k, limits)
    message = (
        "`prompt_logprobs` of -1, the whole vocabulary, needs a server started with --max-logprobs -1; "
        f"the maximum of this one is {limits.max_logprobs}."
    )
    raise invalid("prompt_logprobs", message)
