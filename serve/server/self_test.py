"""Self-test of a loaded model, before it is served."""

from serve.engine.request import PromptScoring, Request, SamplingParams
from serve.jobs.request_queue import LoopThread, RequestError, RequestQueue
from serve.server.model_files import StartupError
from serve.server.startup import Loaded

_TOKENS = 16


def run_self_test(loaded: Loaded) -> None:
    """Score a prompt and generate a token, on an engine of its own.

    Raises:
        StartupError: a step fails, or a log-prob is NaN.
    """
    length = min(_TOKENS, loaded.limits.max_model_len - 1)
    ids = [i % loaded.limits.vocab_size for i in range(length)]
    request = Request("self-test", ids, SamplingParams(1, temperature=0, prompt=PromptScoring()))
    engine, thread = loaded.start_engine(), LoopThread()

    async def answer() -> None:
        async for _ in RequestQueue(engine, 1, length).events(request):
            pass

    try:
        thread.run(answer())
    except RequestError as error:
        raise StartupError(f"{loaded.name}: the self-test failed: {error}") from error
    finally:
        thread.stop()
        engine.stop()
