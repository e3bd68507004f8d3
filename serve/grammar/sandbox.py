"""Compilation of grammars in a process first: one can overflow the stack, or take all memory or time.

The process is forked for every grammar from one that has built the tokenizer; `main` is its program.
"""

import json
import os
import pickle
import resource
import selectors
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from llguidance import LLTokenizer

from serve.grammar.json_schema import GrammarError
from serve.grammar.masks import Vocabulary, compile_source
from serve.grammar.spec import GrammarSpec

_ROOT = str(Path(__file__).parents[2])
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from serve.grammar.sandbox import main; main()"
_LENGTH = 8  # bytes before each frame
_CPU_SECONDS = 0.8
_WALL_SECONDS = 8.0  # on a busy machine
_BYTES = 512 << 20  # of additional address space
_STACK_BYTES = 4 << 20  # half of a thread's usual stack, in which the grammar is compiled again


class GrammarLimitError(GrammarError):
    """A grammar exceeds the limits of its compilation, perhaps because the machine is busy."""


class SandboxError(Exception):
    """A grammar could not be compiled because of a fault of the program."""


class GrammarSandbox:
    """Compiles grammars in another process, which is started when it is first needed. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def source(self, spec: GrammarSpec) -> str:
        """The grammar in llguidance's form, which can be compiled within the limits.

        Raises:
            GrammarError: it is invalid, not supported, or exceeds the limits (GrammarLimitError).
            SandboxError, OSError: the process failed; another one is started for the next grammar.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            _write(process.stdin, pickle.dumps(spec))
            data = _read(process.stdout)
            if data is None:
                _stop(process)  # it may take a while to end, and must not get the next grammar
            answer = json.loads(data or b"{}")
        match answer:
            case {"source": str(source)}:
                return source
            case {"error": str(message)}:
                raise GrammarError(message)
            case {"limit": str(message)}:
                raise GrammarLimitError(message)
        raise SandboxError(answer.get("failure", "the process has ended"))

    def close(self) -> None:
        """End the process and what it compiles."""
        if self._process is not None:
            _stop(self._process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command = (sys.executable, "-c", _PROGRAM, _ROOT)
            pipe = subprocess.PIPE
            # A session of its own: Ctrl-C ends the server, whose end of the pipe ends the process.
            # Overflows and panics are written to stderr, which clients must not fill.
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
            )
            weakref.finalize(self, _stop, self._process)
            assert self._process.stdin is not None
            _write(self._process.stdin, pickle.dumps(self._vocabulary))
        return self._process


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the child that compiles, which has the pipes, too
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait()


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(_LENGTH) + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """The next frame; None at the end of the pipe."""
    length = pipe.read(_LENGTH)
    return pipe.read(int.from_bytes(length)) if length else None


def main() -> None:
    """Answer every GrammarSpec from stdin with JSON on stdout: `source`, `error`, `limit` or `failure`."""
    pipe, output = sys.stdin.buffer, sys.stdout.buffer
    data = _read(pipe)
    if data is None:
        return
    vocabulary: Vocabulary = pickle.loads(data)
    tokenizer = vocabulary.tokenizer()
    while (data := _read(pipe)) is not None:
        spec: GrammarSpec = pickle.loads(data)
        _write(output, _in_child(partial(_answer, spec, tokenizer, vocabulary.special_tokens)))


def _in_child(answer: Callable[[], bytes]) -> bytes:
    """The answer of a forked process within the limits, else JSON with a `limit`."""
    receiver, sender = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(receiver)
        _set_limits()
        threading.stack_size(_STACK_BYTES)
        thread = threading.Thread(target=lambda: _send(sender, answer()))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(sender)
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector, open(receiver, "rb", 0) as pipe:
        selector.register(pipe, selectors.EVENT_READ)
        while is_ready := bool(selector.select(_WALL_SECONDS)):
            if not (part := pipe.read(1 << 20)):
                break
            parts.append(part)
    if not is_ready:
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if status == 0 and parts:
        return b"".join(parts)
    is_slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL)
    reason = f"takes more than {_CPU_SECONDS:g} s to compile" if is_slow else "is too large or nested too deeply"
    return json.dumps({"limit": f"the grammar {reason}"}).encode()


def _set_limits() -> None:
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)  # its signal ends the process
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGESIZE")
    for limit, value in ((resource.RLIMIT_AS, size + _BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))


def _send(pipe: int, data: bytes) -> None:
    with open(pipe, "wb") as file:
        file.write(data)


def _answer(spec: GrammarSpec, tokenizer: LLTokenizer, special_tokens: Mapping[str, int]) -> bytes:
    try:
        source = spec.source(special_tokens)
        _, error = compile_source(tokenizer, source)
        answer = {"error": spec.explain(error)} if error else {"source": source}
    except GrammarError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"limit": "the grammar is too large"}
    except Exception:  # noqa: BLE001 - the parent raises it
        answer = {"failure": traceback.format_exc()}
    return json.dumps(answer).encode()
