"""GrammarCompiler: grammars to masks, off the event loop, within limits, and cached."""

import asyncio
import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLTokenizer

from serve.grammar.json_schema import GrammarError
from serve.grammar.masks import LlguidanceGrammar, Vocabulary, compile_source
from serve.grammar.sandbox import GrammarLimitError, GrammarSandbox
from serve.grammar.spec import GrammarSpec, forced
from serve.text.tokenizer import Tokenizer

MAX_CHARACTERS = 1 << 20  # of one grammar
_MAX_CACHED = 64  # grammars
_MAX_CACHED_CHARACTERS = 4 << 20  # of all cached grammars
_MAX_WAITING = 64  # half of them for one key


class GrammarBusyError(Exception):
    """The maximum number of grammars, of all or of this key, waits to be compiled; try again later."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer, in a thread that no valid grammar occupies for long. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, fast_forward: bool = False) -> None:
        """Start no process yet.

        Args:
            vocab_size: the model's.
            fast_forward: allow only the tokenizer's own tokens for text that a grammar fixes.
        """
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._fast_forward = fast_forward
        tokens = [tokenizer.token_bytes(index) for index in range(vocab_size)]
        self._vocabulary = Vocabulary(tokens, tokenizer.special_ids, tokenizer.eos_token_ids)
        self._sandbox = GrammarSandbox(self._vocabulary)
        self._executor = ThreadPoolExecutor(1, "grammar")
        self._recompile_executor = ThreadPoolExecutor(1, "grammar-recompile")  # known grammars do not wait for new ones
        self._lock = threading.Lock()
        # Least recently used first; GrammarErrors are cached, too, except those of limits.
        self._cache: OrderedDict[GrammarSpec, Future[LlguidanceGrammar]] = OrderedDict()
        self._waiting: Counter[str | None] = Counter()  # new grammars by the key that sent them first
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()

    def start(self) -> None:
        """Build llguidance's tokenizer in a thread: it holds the interpreter, at best while no request runs."""
        self._executor.submit(self._llguidance_tokenizer)

    async def compile(self, spec: GrammarSpec, key: str | None = None) -> LlguidanceGrammar:
        """Return the compiled grammar.

        Args:
            key: name of the API key that sends it, if there are keys.

        Raises:
            GrammarError: it is invalid, not supported, or exceeds the limits.
            GrammarBusyError: too many grammars wait to be compiled.
        """
        return await asyncio.shield(asyncio.wrap_future(self._submit(spec, key)))

    def compile_blocking(self, spec: GrammarSpec) -> LlguidanceGrammar:
        """As `compile`, for threads that may wait."""
        return self._submit(spec, None).result()

    def close(self) -> None:
        """End what is being compiled, without waiting for it."""
        for executor in (self._executor, self._recompile_executor):
            executor.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()

    def _submit(self, spec: GrammarSpec, key: str | None) -> Future[LlguidanceGrammar]:
        if not self._vocabulary.eos_token_ids:
            raise GrammarError("the model has no token that ends an output")
        if len(spec.text) > MAX_CHARACTERS:
            raise GrammarError(f"the grammar has more than {MAX_CHARACTERS} characters")
        with self._lock:
            known = self._cache.get(spec)
            exhausted = None if known is None else _exhausted(known)
            if known is not None and exhausted is None and _is_final(known):
                self._cache.move_to_end(spec)
                return known
            if exhausted is not None:
                future = self._recompile_executor.submit(self._compile, exhausted.source)
            else:
                share = _MAX_WAITING if key is None else _MAX_WAITING // 2
                if self._waiting.total() >= _MAX_WAITING or self._waiting[key] >= share:
                    raise GrammarBusyError
                future = self._executor.submit(self._compile_new, spec, key)
                self._waiting[key] += 1
            self._evict()
            self._cache[spec] = future
            return future

    def _evict(self) -> None:
        for spec in [spec for spec, future in self._cache.items() if _exhausted(future) is not None]:
            del self._cache[spec]
        size = sum(len(spec.text) for spec in self._cache)
        while self._cache and (len(self._cache) >= _MAX_CACHED or size > _MAX_CACHED_CHARACTERS):
            size -= len(self._cache.popitem(last=False)[0].text)

    def _compile_new(self, spec: GrammarSpec, key: str | None) -> LlguidanceGrammar:
        try:
            return self._compile(self._sandbox.source(spec))
        finally:
            with self._lock:
                self._waiting -= Counter([key])  # without zeros

    def _compile(self, source: str) -> LlguidanceGrammar:
        source = forced(source) if self._fast_forward else source
        start, error = compile_source(self._llguidance_tokenizer(), source)
        if error:
            raise GrammarError("the grammar cannot be compiled")
        return LlguidanceGrammar(start, source)

    def _llguidance_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                encode = self.tokenizer.encode_plain if self._fast_forward else None
                self._tokenizer = self._vocabulary.tokenizer(encode)
            return self._tokenizer


def _is_final(future: Future[LlguidanceGrammar]) -> bool:
    """True unless the compilation failed and may succeed another time."""
    error = future.exception() if future.done() else None
    return error is None or (isinstance(error, GrammarError) and not isinstance(error, GrammarLimitError))


def _exhausted(future: Future[LlguidanceGrammar]) -> LlguidanceGrammar | None:
    """The grammar if it is exhausted."""
    if not future.done() or future.exception() is not None:
        return None
    grammar = future.result()
    return grammar if grammar.is_exhausted else None
