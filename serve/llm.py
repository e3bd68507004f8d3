"""LLM: a model in this process. Generate, chat and score without a server."""

import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serve.config.config import QUEUE_LIMITS, EngineConfig
from serve.config.options import from_keywords
from serve.engine.engine import Engine
from serve.engine.request import EngineStoppedError
from serve.jobs.generate import (
    GenerationOptions,
    Generator,
    OutputRequest,
    SamplingKeywords,
    check_alternatives,
    make_options,
)
from serve.jobs.request_queue import InFlight, LoopThread, RequestQueue
from serve.jobs.results import Batch, Generation, Score, Tokens, token_columns
from serve.jobs.score import EncodedText, Scorer, TextEncoder, Window, checked_token_ids
from serve.server.console import Reporter
from serve.server.model_files import STARTUP_ERRORS, StartupError
from serve.server.startup import load
from serve.text.chat import ChatFormat, PromptError, check_messages, check_text_length, encode_text, generation_room

type TokenIds = Sequence[int] | NDArray[np.integer[Any]]

_PROCESS_OPTIONS = ("log_format", "log_level", *QUEUE_LIMITS)  # of commands and servers
_REQUESTS_PER_SEQ = 4  # requests in the engine for each that runs, so that it never waits for one
_MAX_TOKENS = 2**17  # prompt tokens in flight
_DEFAULT_MAX_TOKENS = 16  # of generate(), as in OpenAI's completions


class LLM:
    """A model, loaded and compiled, with an engine of its own.

    >>> from logprobd import LLM
    >>> llm = LLM(dtype="float32")  # SmolLM2-135M-Instruct
    >>> [answer] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
    >>> print(answer.text, answer.logprobs[:3], answer.ranks[:3])
    The capital of France is Paris. [-1.8827324  -0.01966858 -0.01146698] [1 1 1]
    >>> [score] = llm.score([("The capital of France is", " Paris.")])
    >>> print(score.completion_logprob, score.is_greedy)
    -0.6382160186767578 True

    Methods may be called from several threads, and while an event loop runs, as in a notebook. Ctrl-C aborts a call.
    """

    def __init__(self, model: str | None = None, *, progress: bool | None = None, **options: Any) -> None:
        """Load a model.

        Args:
            model: hub id, local directory or .gguf file; None loads SmolLM2-135M-Instruct.
            progress: show progress on stderr, also in later calls. Defaults to True if stderr is a terminal.
            options: options of `logprobd serve` that concern the model and the engine, such as dtype, max_model_len,
                max_num_seqs, max_logprobs, seed.

        Raises:
            TypeError: an option does not exist.
            ValueError: an option has a wrong value.
            StartupError: the model cannot be loaded.
        """
        config = from_keywords(EngineConfig, options | {"model": model}, without=_PROCESS_OPTIONS)
        shows_progress = sys.stderr.isatty() if progress is None else progress
        reporter = Reporter(console=Console(stderr=True, highlight=False) if shows_progress else None)
        self._start(config, reporter, shows_progress=shows_progress)

    @classmethod
    def open(cls, config: EngineConfig, reporter: Reporter) -> Self:
        """Load the model of a configuration.

        Raises:
            StartupError: the model cannot be loaded.
        """
        llm = cls.__new__(cls)
        llm._start(config, reporter, shows_progress=False)
        return llm

    def _start(self, config: EngineConfig, reporter: Reporter, *, shows_progress: bool) -> None:
        try:
            self.loaded = load(config, reporter)
        except STARTUP_ERRORS as error:
            raise StartupError(str(error)) from error
        self.engine = self.loaded.start_engine()
        self.chats = ChatFormat(self.loaded.tokenizer, self.loaded.chat_template)
        self._shows_progress = shows_progress
        self._worker = LoopThread()
        self._queue = self.request_queue()
        self._finalizer = weakref.finalize(self, _close, self.engine, self._worker)

    def request_queue(self) -> RequestQueue:
        """A queue for one event loop that keeps the engine busy."""
        config = self.loaded.config
        requests = min(config.max_num_queued_reqs, _REQUESTS_PER_SEQ * config.max_num_seqs)
        return RequestQueue(self.engine, InFlight(requests, _MAX_TOKENS))

    def generate(
        self, prompts: str | TokenIds | Sequence[str | TokenIds], **options: Unpack[SamplingKeywords]
    ) -> Batch[Generation]:
        """Continue prompts.

        Args:
            prompts: a text, token ids, or a list of these.
            options: sampling options of OpenAI's and vLLM's API. `max_tokens` defaults to 16; the others default to the
                model's generation_config.json. `logprobs` and `prompt_logprobs` are numbers of alternatives per token.

        Returns:
            `n` generations for each prompt.

        Raises:
            TypeError: an option does not exist.
            ValueError: an option or a prompt is not valid.
            RequestError: the engine failed on a request.
            EngineStoppedError: the LLM is closed.
        """
        sampling = self._sampling(options)
        max_tokens = _DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        encoded = []
        for index, prompt in enumerate(_as_list(prompts)):
            param = f"prompts[{index}]"
            ids = self._prompt_ids(prompt, param)
            encoded.append(OutputRequest(index, ids, self._room(param, len(ids), max_tokens)))
        return self._generate(encoded, sampling)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Unpack[SamplingKeywords],
    ) -> Batch[Generation]:
        """Answer conversations. Raises as `generate`.

        Args:
            messages: a conversation, or a list of conversations; a message is a dict with role and content.
            chat_template_kwargs: variables of the chat template.
            options: as in `generate`, but `max_tokens` defaults to all that fit, or to the model's max_new_tokens.

        Returns:
            `n` generations for each conversation.
        """
        sampling = self._sampling(options)
        single = bool(messages) and isinstance(messages[0], dict)
        encoded = []
        for index, conversation in enumerate([messages] if single else messages):
            param = "messages" if single else f"messages[{index}]"
            ids = self.chat_ids(check_messages(list(conversation), param=param), chat_template_kwargs, param)
            room = self._room(param, len(ids), sampling.max_tokens)
            if sampling.max_tokens is None:
                room = min(room, self.loaded.defaults.max_new_tokens or room)
            encoded.append(OutputRequest(index, ids, room))
        return self._generate(encoded, sampling)

    def score(self, texts: Any, *, logprobs: int = 0, add_special_tokens: bool = True) -> Batch[Score]:
        """Log-probs and ranks of all tokens of texts. Raises as `generate`.

        Args:
            texts: a text, token ids, a pair (prompt, completion), or a list of these. A pair is a tuple of two texts or
                two lists of token ids.
            logprobs: number of alternatives per token.
            add_special_tokens: add the tokens that the model expects around a text, such as BOS.
        """
        check_alternatives("logprobs", logprobs, self.loaded.limits.max_logprobs)
        encoder = TextEncoder(self.chats, self.loaded.limits.vocab_size, add_special_tokens)
        texts = [texts] if isinstance(texts, tuple) else _as_list(texts)
        encoded = [self._scored_text(encoder, text, f"texts[{i}]") for i, text in enumerate(texts)]
        scorer = Scorer(self._queue, logprobs)

        async def run(item: tuple[int, EncodedText]) -> Score:
            index, text = item
            count = len(text.token_ids)
            scores = await scorer.score(text.token_ids, [Window(0, count, 1)] if count > 1 else [])
            columns = token_columns(self.loaded.tokenizer, text.token_ids, scores, starts_sequence=True)
            return Score(index=index, completion_start=text.completion_start, **columns)

        return Batch(self._run("scoring", [*enumerate(encoded)], run, lambda item: len(item[1].token_ids)))

    def chat_ids(
        self, messages: list[dict[str, Any]], variables: dict[str, Any] | None = None, param: str = "messages"
    ) -> list[int]:
        """Token ids of checked messages.

        Args:
            messages: as returned by `check_messages`.
            variables: of the chat template.
            param: path of the messages, for errors.

        Raises:
            PromptError: the template refuses the messages, or they are too long.
        """
        text = self.chats.render(messages, variables=variables, param=param)
        check_text_length(param, text, self.loaded.tokenizer, self.loaded.limits)
        return self.chats.encode(text, param=param)

    def close(self) -> None:
        """Abort running calls and stop the engine. Later calls raise EngineStoppedError."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sampling(self, options: SamplingKeywords) -> GenerationOptions:
        return self.loaded.defaults.fill(make_options(options, self.loaded.limits.max_logprobs))

    def _prompt_ids(self, prompt: Any, param: str) -> list[int]:
        if isinstance(prompt, str):
            check_text_length(param, prompt, self.loaded.tokenizer, self.loaded.limits)
            ids = encode_text(self.loaded.tokenizer, prompt, add_special_tokens=True, param=param)
        else:
            ids = checked_token_ids(prompt, self.loaded.limits.vocab_size, param)
        if not ids:
            raise PromptError(param, f"`{param}` gives no tokens.")
        return ids

    def _room(self, param: str, prompt_tokens: int, max_tokens: int | None) -> int:
        try:
            return generation_room(param, prompt_tokens, max_tokens, self.loaded.limits)
        except PromptError as error:
            raise PromptError(param, f"{param}: {error}", error.code) from None

    def _scored_text(self, encoder: TextEncoder, text: Any, param: str) -> EncodedText:
        if isinstance(text, tuple) and len(text) == 2:
            encoded = encoder.pair(*text, params=(f"{param}[0]", f"{param}[1]"))
        else:
            encoded = encoder.text(text, param)
        self._room(param, len(encoded.token_ids), 0)
        return encoded

    def _generate(self, prompts: list[OutputRequest], options: GenerationOptions) -> Batch[Generation]:
        tokenizer = self.loaded.tokenizer
        generator = Generator(self._queue, tokenizer, options)
        shared: dict[int, Tokens] = {}  # by index of the prompt, which its first output scores

        async def run(prompt: OutputRequest) -> Generation:
            output = await generator.generate(prompt)
            if output.prompt_scores is not None:
                columns = token_columns(tokenizer, prompt.token_ids, output.prompt_scores, starts_sequence=True)
                shared[prompt.index] = Tokens(**columns)
            scores = output.all_scores(options.logprobs)
            return Generation(
                index=prompt.index,
                choice=prompt.choice,
                text=output.text,
                finish_reason=str(output.finish_reason),
                stop_reason=output.stop_reason,
                prompt_token_ids=prompt.token_ids,
                prompt=None,
                **token_columns(tokenizer, output.token_ids, scores, starts_sequence=False),
            )

        items = [replace(prompt, choice=choice) for prompt in prompts for choice in range(options.n)]
        results = self._run("generating", items, run, lambda item: len(item.token_ids))
        return Batch([replace(result, prompt=shared.get(result.index)) for result in results])

    def _run[T, R](
        self, label: str, items: list[T], run: Callable[[T], Coroutine[Any, Any, R]], num_tokens: Callable[[T], int]
    ) -> list[R]:
        """Run all items on the loop's thread; results in order."""
        if not self._finalizer.alive:
            raise EngineStoppedError("the LLM is closed")
        with _progress(label, len(items) if self._shows_progress else 0) as advance:

            async def collect() -> list[R]:
                results: list[R] = []
                async with aclosing(self._queue.run_in_order(items, run, num_tokens)) as stream:
                    async for result in stream:
                        results.append(result)
                        advance()
                return results

            return self._worker.run(collect())


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr if there is more than one item. Yields a callback for each finished item."""
    if total < 2:
        yield lambda: None
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def _as_list(value: Any) -> list[Any]:
    """A list of inputs; one text, one list of token ids or one conversation is a list of length 1."""
    if isinstance(value, str):
        return [value]
    items = [item.tolist() if isinstance(item, np.ndarray) else item for item in value]
    return [items] if items and isinstance(items[0], Integral | dict) else items


def _close(engine: Engine, worker: LoopThread) -> None:
    engine.stop()
    worker.stop()
