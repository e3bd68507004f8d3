"""LLM: a model in this process. Generate, chat and score without a server."""

import asyncio
import sys
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from os import PathLike
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from model.token_logprobs import TokenLogprobs
from serve.config.engine_config import QUEUE_LIMITS, EngineConfig, EngineKeywords
from serve.config.options import from_keywords
from serve.engine.engine import Engine
from serve.engine.request import EngineStoppedError
from serve.grammar.compiler import GrammarCompiler
from serve.jobs.chat import ChatKeywords, ChatOptions, ChatPrompts
from serve.jobs.decide import Decider
from serve.jobs.generate import (
    DEFAULT_MAX_TOKENS,
    GenerationOptions,
    Generator,
    OutputRequest,
    SamplingKeywords,
    as_list,
    check_alternatives,
    check_text_length,
    generation_room,
    make_options,
)
from serve.jobs.output import Output
from serve.jobs.request_queue import LoopThread, RequestError, RequestQueue
from serve.jobs.results import Batch, Decision, Generation, Score
from serve.jobs.score import EncodedText, ScoreRequest, TextEncoder, checked_token_ids, score_texts, stream_scores
from serve.server.console import Reporter, progress_bar
from serve.server.model_files import STARTUP_ERRORS, StartupError
from serve.server.startup import load
from serve.text.chat import ChatFormat, PromptError, encode_text
from serve.text.decisions.plan import DecisionFormat
from serve.text.decisions.questions import ScoringKeywords, decision_request, scoring_options

type TokenIds = Sequence[int] | NDArray[np.integer[Any]]

_PROCESS_OPTIONS = ("log_format", "log_level", *QUEUE_LIMITS)  # of commands and servers
_REQUESTS_PER_SEQ = 4  # requests in the engine for each that runs, so that it is never idle
_MAX_PROMPT_TOKENS = 2**17  # in flight


class LLM:
    """A model, loaded and compiled, with an engine of its own.

    >>> from logprobd import LLM
    >>> llm = LLM(dtype="float32")  # SmolLM2-135M-Instruct
    >>> [answer] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
    >>> print(answer.text, answer.logprobs[:3].round(4), answer.ranks[:3])
    The capital of France is Paris. [-1.8827 -0.0197 -0.0115] [1 1 1]
    >>> [score] = llm.score([("The capital of France is", " Paris.")])
    >>> print(round(score.completion_logprob, 4), score.is_greedy)
    -0.6382 True

    Methods may be called from several threads, and while an event loop runs, as in a notebook. Ctrl-C aborts a call.
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        progress: bool | None = None,
        **options: Unpack[EngineKeywords],
    ) -> None:
        """Load a model.

        Args:
            model: hub id (see docs/models.md), local directory or .gguf file; None loads SmolLM2-135M-Instruct.
            progress: show progress on stderr, also in later calls. Defaults to True if stderr is a terminal.
            options: as documented by `logprobd serve --help`.

        Raises:
            TypeError: an option does not exist.
            ValueError: an option has a wrong value.
            StartupError: the model cannot be loaded.
        """
        config = from_keywords(EngineConfig, {**options, "model": model}, exclude=_PROCESS_OPTIONS)
        shows_progress = sys.stderr.isatty() if progress is None else progress
        reporter = Reporter(console=Console(stderr=True, highlight=False) if shows_progress else None)
        self._start(config, reporter, shows_progress=shows_progress)

    @classmethod
    def open(cls, config: EngineConfig, reporter: Reporter) -> Self:
        """Load the model of a configuration. Raise StartupError if it cannot be loaded."""
        llm = cls.__new__(cls)
        llm._start(config, reporter, shows_progress=False)
        return llm

    def _start(self, config: EngineConfig, reporter: Reporter, *, shows_progress: bool) -> None:
        try:
            self.loaded = load(config, reporter)
        except STARTUP_ERRORS as error:
            raise StartupError(str(error)) from error
        self.engine = self.loaded.start_engine()
        self.chats = ChatFormat(self.loaded.tokenizer)
        self._prompts = ChatPrompts(self.chats)
        self.decisions = DecisionFormat(self.chats, self.loaded.decisions)
        vocab_size, fast_forward = self.loaded.limits.vocab_size, config.grammar_fast_forward
        self.grammars = GrammarCompiler(self.loaded.tokenizer, vocab_size, fast_forward=fast_forward)
        self._shows_progress = shows_progress
        self._worker = LoopThread()
        self._queue = self.new_queue()
        self._queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, RequestQueue] = weakref.WeakKeyDictionary()
        self._finalizer = weakref.finalize(self, _close, self.engine, self._worker, self.grammars)

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
        sampling = self.sampling_options(**options)
        max_tokens = DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        encoded = []
        for index, prompt in enumerate(as_list(prompts)):
            param = f"prompts[{index}]"
            ids = self._prompt_ids(prompt, param)
            encoded.append(OutputRequest(index, ids, self._room(param, len(ids), max_tokens)))
        return self._generate(encoded, sampling)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        **options: Unpack[ChatKeywords],
    ) -> Batch[Generation]:
        """Answer conversations. Raises as `generate`.

        Args:
            messages: a conversation, or a list of conversations; a message is a dict with role and content.
            options: as in `generate`, but `max_tokens` defaults to all that fit, or to the model's max_new_tokens; and,
                as in chat completions, `chat_template_kwargs` and the fields of tools and reasoning.

        Returns:
            `n` generations for each conversation.
        """
        sampling = self._chat_options(options)
        if isinstance(messages, Mapping):
            raise PromptError("messages", "`messages` must be a list of messages.")
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: Sequence[Any] = [messages] if single else messages
        requests = []
        for index, conversation in enumerate(conversations):
            param = "messages" if single else f"messages[{index}]"
            requests.append(replace(self._chat_request(conversation, sampling, param), index=index))
        return self._generate(requests, sampling)

    def stream_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        max_new_tokens: int | None = None,
        **options: Unpack[ChatKeywords],
    ) -> AsyncGenerator[Output]:
        """Answer one conversation and yield the pieces, on the caller's event loop. Raises as `generate`.

        Args:
            max_new_tokens: maximum length without `max_tokens`, if that fits; None: the model's max_new_tokens.
            options: as in `chat`; `n` has no effect.
        """
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {max_new_tokens} is negative")
        sampling = self._chat_options(options)
        return self._stream(self._chat_request(messages, sampling, limit=max_new_tokens), sampling)

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
        texts = [texts] if isinstance(texts, tuple) else as_list(texts)
        encoded = [self._scored_text(encoder, text, f"texts[{i}]") for i, text in enumerate(texts)]
        results = score_texts(self._queue, self.loaded.tokenizer, encoded, logprobs)
        return Batch(self._collect("scoring", len(encoded), results))

    def decide(
        self, requests: Mapping[str, Any] | Iterable[Mapping[str, Any]], **options: Unpack[ScoringKeywords]
    ) -> list[list[Decision]]:
        """Probabilities of the options of questions. Raises as `generate`.

        Args:
            requests: one or several, each with `state` and an object of questions, or `input` and a list of questions;
                `id` and `expected`, as in files of `logprobd decide`, have no effect.
            options: fields of `ScoringOptions`.

        Returns:
            For each request, a decision for each of its questions.
        """
        scoring, decider = scoring_options(options), Decider(self._queue, self.loaded.limits)
        items = [requests] if isinstance(requests, Mapping) else requests
        parsed = [decision_request(item, f"requests[{i}]") for i, item in enumerate(items)]
        plans = (self.decisions.plan(request, scoring, decider.max_prompt_tokens) for request in parsed)
        return self._collect("deciding", len(parsed), decider.stream(plans))

    def stream_scores[R: ScoreRequest](
        self, requests: Iterable[R], logprobs: int
    ) -> AsyncGenerator[tuple[R, TokenLogprobs | RequestError]]:
        """Score texts on the caller's event loop, see `serve.jobs.score.stream_scores`."""
        return stream_scores(self.new_queue(), requests, logprobs)

    def sampling_options(self, **options: Unpack[SamplingKeywords]) -> GenerationOptions:
        """Validated options, with the model's defaults. Raises as `generate`."""
        return self.loaded.defaults.fill(make_options(options, self.loaded.limits, GenerationOptions))

    def _chat_options(self, options: ChatKeywords) -> ChatOptions:
        return self.loaded.defaults.fill(make_options(options, self.loaded.limits, ChatOptions))

    def close(self) -> None:
        """Abort running calls and stop the engine. Later calls raise EngineStoppedError."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _stream(self, request: OutputRequest, options: GenerationOptions) -> AsyncGenerator[Output]:
        queue = self._queues.setdefault(asyncio.get_running_loop(), self.new_queue())
        async with aclosing(Generator(queue, self.loaded.tokenizer, self.grammars, options).stream(request)) as outputs:
            async for output in outputs:
                yield output

    def new_queue(self) -> RequestQueue:
        """A queue for one event loop that keeps the engine busy."""
        config = self.loaded.config
        requests = min(config.max_num_queued_reqs, _REQUESTS_PER_SEQ * config.max_num_seqs)
        return RequestQueue(self.engine, requests, _MAX_PROMPT_TOKENS)

    def _chat_request(
        self, messages: Any, options: ChatOptions, param: str = "messages", limit: int | None = None
    ) -> OutputRequest:
        """A request to answer a conversation; `limit` replaces the model's max_new_tokens."""
        text, reply = self._prompts.render(messages, options, param)
        check_text_length(param, text, self.loaded.tokenizer, self.loaded.limits)
        ids = self.chats.encode(text, param=param)
        room = self._room(param, len(ids), options.max_tokens)
        if options.max_tokens is None:
            room = min(room, self.loaded.defaults.max_new_tokens or room if limit is None else limit)
        return OutputRequest(0, ids, room, reply=reply)

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
            prefix = "" if param == "messages" else f"{param}: "
            raise PromptError(error.param, f"{prefix}{error}", error.code) from None

    def _scored_text(self, encoder: TextEncoder, text: Any, param: str) -> EncodedText:
        for part in text if isinstance(text, tuple) else (text,):
            if isinstance(part, str):
                check_text_length(param, part, self.loaded.tokenizer, self.loaded.limits)
        if isinstance(text, tuple) and len(text) == 2:
            encoded = encoder.pair(*text, params=(f"{param}[0]", f"{param}[1]"))
        else:
            encoded = encoder.text(text, param)
        self._room(param, len(encoded.token_ids), 0)
        return encoded

    def _generate(self, prompts: list[OutputRequest], options: GenerationOptions) -> Batch[Generation]:
        results = Generator(self._queue, self.loaded.tokenizer, self.grammars, options).run(prompts)
        return Batch(self._collect("generating", len(prompts) * options.n, results))

    def _collect[R](self, label: str, count: int, stream: AsyncGenerator[R]) -> list[R]:
        """Collect `count` results on the loop's thread, with a progress bar."""
        if not self._finalizer.alive:
            raise EngineStoppedError("the LLM is closed")
        with progress_bar(label, count, hidden=not self._shows_progress or count < 2) as advance:
            return self._worker.collect(stream, advance)


def _close(engine: Engine, worker: LoopThread, grammars: GrammarCompiler) -> None:
    engine.stop()
    worker.stop()
    grammars.close()
