"""Invalid requests, each with the 4xx that it must get."""

import json
import random
from collections.abc import Callable

from tools.soak.prompts import Prompts
from tools.soak.request import CHAT, COMPLETIONS, Body, Request, ServerFacts

_KIND = "invalid request"
_JSON = {"content-type": "application/json"}


class BadBodies:
    """Random invalid requests for one server."""

    def __init__(self, facts: ServerFacts, prompts: Prompts) -> None:
        self._facts, self._prompts = facts, prompts

    def draw(self, rng: random.Random) -> Request:
        """Return a random invalid request."""
        makers: tuple[Callable[[random.Random], Request], ...] = (
            self._truncated_json,
            self._not_an_object,
            self._wrong_field,
            self._wrong_field,
            self._wrong_field,
            self._too_long,
            self._unknown_model,
            self._unknown_token_id,
            self._wrong_content_type,
            self._unknown_route,
        )
        return rng.choice(makers)(rng)

    def _truncated_json(self, rng: random.Random) -> Request:
        body = json.dumps({"messages": self._prompts.messages(rng), "max_tokens": 5}).encode()
        return Request(_KIND, CHAT, body[: rng.randrange(len(body))], 400, headers=_JSON)

    def _not_an_object(self, rng: random.Random) -> Request:
        bodies = (b"[]", b"null", b"17", b'"prompt"', b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 50_000)
        return Request(_KIND, COMPLETIONS, rng.choice(bodies), 400, headers=_JSON)

    def _wrong_field(self, rng: random.Random) -> Request:
        """A valid body with one invalid field."""
        wrong_chat: tuple[Body, ...] = (
            {"messages": []},
            {"messages": "hello"},
            {"messages": [{"role": "nobody", "content": "x"}]},
            {"messages": [{"role": "user", "content": 5}]},
            {"top_logprobs": 3},
            {"logprobs": True, "top_logprobs": self._facts.max_logprobs + 1},
            {"logprobs": 3},
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
        )
        wrong_text: tuple[Body, ...] = (
            {"prompt": None},
            {"prompt": 5},
            {"prompt": [1, "a"]},
            {"prompt": [[]]},
            {"logprobs": True},
            {"logprobs": self._facts.max_logprobs + 1},
            {"suffix": "x"},
            {"prompt_logprobs_start": 1_000_000, "prompt_logprobs": 1},
            {"prompt_logprobs_format": "rows", "prompt_logprobs": 1},
            {"prompt_logprob_token_ids": [1, 1]},
        )
        wrong: tuple[Body, ...] = (
            {"max_tokens": "5"},
            {"max_tokens": -1},
            {"max_tokens": 1.5},
            {"temperature": 3},
            {"temperature": "hot"},
            {"top_p": 0},
            {"n": 0},
            {"n": 1000},
            {"seed": 2**64},
            {"stop": ["", "x"]},
            {"stop": [5]},
            {"stream": "yes"},
            {"stream_options": {"include_usage": True}},
            {"logit_bias": {"x": 1}},
            {"logit_bias": {"5": 1000}},
            {"allowed_token_ids": []},
            {"cache_salt": "a/b"},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            {"structured_outputs": {"regex": "("}},
            {"prompt_logprobs": self._facts.max_logprobs + 1},
            {"prompt_logprobs": -2},
        )
        if rng.random() < 0.5:
            body = {"messages": self._prompts.messages(rng), "max_tokens": 5} | rng.choice(wrong_chat + wrong)
            return Request(_KIND, CHAT, body, 400)
        body = {"prompt": self._prompts.text(rng, 5), "max_tokens": 5} | rng.choice(wrong_text + wrong)
        return Request(_KIND, COMPLETIONS, body, 400)

    def _too_long(self, rng: random.Random) -> Request:
        limit = self._facts.max_model_len
        bodies: tuple[tuple[str, Body], ...] = (
            (COMPLETIONS, {"prompt": self._prompts.too_long(rng)}),
            (COMPLETIONS, {"prompt": self._prompts.ids(rng, 9), "max_tokens": limit}),
            (COMPLETIONS, {"prompt": [self._prompts.ids(rng, 3), self._prompts.too_long(rng)], "stream": True}),
            (COMPLETIONS, {"prompt": "and so on " * limit, "echo": True, "logprobs": 1}),
            (CHAT, {"messages": [{"role": "user", "content": "and so on " * limit}]}),
        )
        path, body = rng.choice(bodies)
        return Request(_KIND, path, body, 400)

    def _unknown_model(self, rng: random.Random) -> Request:
        if rng.random() < 0.3:
            return Request(_KIND, "/v1/models/no-such-model", None, 404)
        return Request(_KIND, CHAT, {"model": "no-such-model", "messages": self._prompts.messages(rng)}, 404)

    def _unknown_token_id(self, rng: random.Random) -> Request:
        ids = self._prompts.ids(rng, rng.randint(1, 2000))
        ids[rng.randrange(len(ids))] = rng.choice((self._facts.vocab_size, -1, 2**70))
        if rng.random() < 0.5:
            return Request(_KIND, "/detokenize", {"tokens": ids}, 400)
        return Request(_KIND, COMPLETIONS, {"prompt": ids}, 400)

    def _wrong_content_type(self, rng: random.Random) -> Request:
        body = json.dumps({"prompt": self._prompts.text(rng, 3)}).encode()
        return Request(_KIND, COMPLETIONS, body, 400, headers={"content-type": "text/plain"})

    def _unknown_route(self, rng: random.Random) -> Request:
        return rng.choice((Request(_KIND, "/v1/nothing", None, 404), Request(_KIND, CHAT, None, 405)))
