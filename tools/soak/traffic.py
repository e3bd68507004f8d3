"""Traffic: random requests. Each depends on the seed and its number alone, so that it can be reproduced."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import orjson

from serve.api.responses import Detokenized, Tokenized
from tools.soak.bad_bodies import BadBodies
from tools.soak.prompts import Prompts
from tools.soak.request import CHAT, COMPLETIONS, Body, ClientBehavior, Request, ServerFacts

_PAGES = ("/v1/models", "/metrics", "/load", "/health", "/ping", "/version", "/tokenizer_info", "/openapi.json", "/")


class Traffic:
    """Random requests for one server."""

    def __init__(self, seed: int, facts: ServerFacts, *, longest: int, burst: int) -> None:
        """`longest`: maximum tokens of a long prompt and its answer; `burst`: concurrent requests of a burst."""
        self._seed, self._facts, self._longest, self._burst_size = seed, facts, longest, burst
        self._prompts = Prompts(seed, facts, longest)
        self._bad_bodies = BadBodies(facts, self._prompts)
        # Kind of request -> weight, per thousand.
        self._kinds: dict[Callable[[random.Random], Request], int] = {
            self._chat: 145,
            self._completion: 145,
            self._several_answers: 50,
            self._stop_strings: 50,
            self._filters: 100,
            self._shared_prefix: 80,
            self._long_prompt: 15,
            self._long_answer: 20,
            self._prompt_logprobs: 50,
            self._prompt_columns: 40,
            self._echo_of_many: 40,
            self._tokenize_and_back: 40,
            self._many_prompts: 4,
            self._page: 34,
            self._bad_bodies.draw: 80,
            self._leaves_waiting: 30,
            self._leaves_reading: 45,
            self._leaves_sending: 20,
            self._slow_reader: 10,
            self._burst: 2,
        }

    def draw(self, number: int) -> Request:
        """Return request `number`."""
        rng = random.Random(f"{self._seed}/{number}")
        (kind,) = rng.choices(list(self._kinds), list(self._kinds.values()))
        return kind(rng)

    def _chat(self, rng: random.Random) -> Request:
        body: Body = {"messages": self._prompts.messages(rng, rng.randint(1, 3))} | self._sampled(rng)
        body[rng.choice(("max_tokens", "max_completion_tokens"))] = rng.randint(1, 48)
        if rng.random() < 0.7:
            body |= {"logprobs": True, "top_logprobs": self._alternatives(rng)}
        return self._maybe_streamed(rng, "chat", CHAT, body)

    def _completion(self, rng: random.Random) -> Request:
        prompts = (self._prompts.text(rng, rng.randint(1, 30)), self._prompts.ids(rng, rng.randint(1, 80)))
        body: Body = {"prompt": rng.choice(prompts), "max_tokens": rng.randint(1, 48)} | self._sampled(rng)
        if rng.random() < 0.7:
            body |= {"logprobs": self._alternatives(rng), "return_tokens_as_token_ids": rng.random() < 0.5}
        return self._maybe_streamed(rng, "completion", COMPLETIONS, body)

    def _several_answers(self, rng: random.Random) -> Request:
        request = rng.choice((self._chat, self._completion))(rng)
        return self._with(request, "n > 1", n=rng.randint(2, 4))

    def _stop_strings(self, rng: random.Random) -> Request:
        stop = rng.sample((".", ",", " the", "\n", "and", "e", "a b", "##", "🙂"), rng.randint(1, 4))
        request = rng.choice((self._chat, self._completion))(rng)
        return self._with(
            request,
            "stop strings",
            stop=stop if len(stop) > 1 else stop[0],
            include_stop_str_in_output=rng.random() < 0.3,
        )

    def _filters(self, rng: random.Random) -> Request:
        """Sampling parameters that change the chosen tokens."""
        ids = self._prompts.ids(rng, 20)
        fields: list[Body] = [
            {"top_p": 0.9, "top_k": 50},
            {"min_p": 0.05},
            {"presence_penalty": 0.5, "frequency_penalty": 0.5},
            {"repetition_penalty": 1.2},
            {"logit_bias": {str(token): 20 * rng.uniform(-1, 1) for token in ids}},
            {"ignore_eos": True},
            {"min_tokens": 1, "stop_token_ids": ids[:10]},
            {"allowed_token_ids": sorted(set(ids[10:]))},
            {"bad_words": ["the", "river"]},
            {"logprobs_mode": "processed_logprobs"},
        ]
        request = rng.choice((self._chat, self._completion))(rng)
        for each in rng.sample(fields, rng.randint(1, 3)):
            request = self._with(request, "filters and penalties", **each)
        return self._named_alternatives(rng, request)

    def _named_alternatives(self, rng: random.Random, request: Request) -> Request:
        """Sometimes request log-probs of given ids instead of the top k."""
        assert isinstance(request.body, dict)
        if "logprobs" not in request.body or rng.random() < 0.7:
            return request
        named = rng.sample(range(self._facts.vocab_size), rng.randint(1, 8))
        return self._with(request, request.kind, logprob_token_ids=named)

    def _shared_prefix(self, rng: random.Random) -> Request:
        body = {"prompt": self._prompts.shared(rng), "max_tokens": rng.randint(1, 16)} | self._sampled(rng)
        if rng.random() < 0.4:
            body |= {"prompt_logprobs": self._alternatives(rng)}
        return self._maybe_streamed(rng, "shared prefix", COMPLETIONS, body)

    def _long_prompt(self, rng: random.Random) -> Request:
        room = rng.randint(1, 8)
        body = {"prompt": self._prompts.long_ids(rng, room), "max_tokens": room} | self._sampled(rng)
        if rng.random() < 0.5:
            body |= {"prompt_logprobs": rng.choice((0, 1, 5)), "prompt_logprobs_format": "columns"}
        return self._maybe_streamed(rng, "long prompt", COMPLETIONS, body)

    def _long_answer(self, rng: random.Random) -> Request:
        """One choice, or several that grow together so that a small cache preempts some."""
        n, low, high = rng.choice(((1, 100, 400), (1, 100, 400), (8, 200, 280)))
        body: Body = {"prompt": self._prompts.ids(rng, rng.randint(1, 60)), "ignore_eos": True} | self._sampled(rng)
        body |= {"max_tokens": min(rng.randint(low, high), self._longest // 2), "logprobs": self._alternatives(rng)}
        body["n"] = n
        return self._maybe_streamed(rng, "long answer", COMPLETIONS, body)

    def _prompt_logprobs(self, rng: random.Random) -> Request:
        return self._scored_prompt(rng, "prompt_logprobs")

    def _prompt_columns(self, rng: random.Random) -> Request:
        return self._with(
            self._scored_prompt(rng, "prompt_logprobs"), "prompt_logprobs, columns", prompt_logprobs_format="columns"
        )

    def _scored_prompt(self, rng: random.Random, kind: str) -> Request:
        request = rng.choice((self._chat, self._completion))(rng)
        assert isinstance(request.body, dict)
        fields: Body = {"prompt_logprobs": self._alternatives(rng), "max_tokens": rng.choice((0, 0, 1, 5))}
        if rng.random() < 0.2:
            named = rng.sample(range(self._facts.vocab_size), rng.randint(1, 8))
            fields |= {"prompt_logprobs": 0, "prompt_logprob_token_ids": named}
        if request.path == COMPLETIONS and rng.random() < 0.7:
            ids = self._prompts.ids(rng, rng.randint(2, 200))
            fields |= {"prompt": ids, "prompt_logprobs_start": rng.randrange(len(ids))}
        request.body.pop("max_completion_tokens", None)
        return self._with(request, kind, **fields)

    def _echo_of_many(self, rng: random.Random) -> Request:
        """The shape of lm-eval's log-likelihood requests."""
        count, as_text = rng.randint(1, 8), rng.random() < 0.3
        prompts: list[object] = [
            self._prompts.text(rng, rng.randint(1, 30)) if as_text else self._prompts.ids(rng, rng.randint(1, 60))
            for _ in range(count)
        ]
        body: Body = {
            "prompt": prompts,
            "echo": True,
            "logprobs": rng.choice((0, 1, 5)),
            "max_tokens": rng.choice((0, 1)),
        }
        return self._maybe_streamed(rng, "echo of many", COMPLETIONS, body | self._sampled(rng), share=0.1)

    def _many_prompts(self, rng: random.Random) -> Request:
        """More prompts than one request may have in the engine at a time."""
        prompts = [self._prompts.ids(rng, rng.randint(1, 8)) for _ in range(rng.randint(70, 100))]
        body: Body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1} | self._sampled(rng)
        return self._maybe_streamed(rng, "many prompts", COMPLETIONS, body)

    def _tokenize_and_back(self, rng: random.Random) -> Request:
        text = self._prompts.text(rng, rng.randint(1, 80))
        kind, body = "tokenize and back", {"prompt": text, "add_special_tokens": False}

        def check(answer: bytes) -> Iterator[str]:
            parsed = Tokenized.model_validate_json(answer)
            if parsed.count != len(parsed.tokens):
                yield f"the count is {parsed.count} for {len(parsed.tokens)} tokens"

        def check_back(answer: bytes) -> Iterator[str]:
            # A tokenizer may insert a space before the text.
            if Detokenized.model_validate_json(answer).prompt.strip() != text:
                yield "/tokenize and /detokenize changed the text"

        def back(answer: bytes) -> Request:
            return Request(kind, "/detokenize", {"tokens": orjson.loads(answer)["tokens"]}, check=check_back)

        return Request(kind, "/tokenize", body, check=check, follow_up=back)

    def _page(self, rng: random.Random) -> Request:
        return Request("page", rng.choice(_PAGES))

    def _leaves_waiting(self, rng: random.Random) -> Request:
        return replace(
            self._generation(rng),
            kind="leaves, waiting",
            behavior=ClientBehavior.LEAVES_WAITING,
            patience=rng.uniform(0, 0.3),
        )

    def _leaves_reading(self, rng: random.Random) -> Request:
        request = self._with(self._generation(rng), "leaves, reading", stream=True)
        return replace(request, behavior=ClientBehavior.LEAVES_READING, patience=rng.randint(1, 8))

    def _leaves_sending(self, rng: random.Random) -> Request:
        return replace(
            self._generation(rng),
            kind="leaves, sending",
            behavior=ClientBehavior.LEAVES_SENDING,
            patience=rng.uniform(0, 0.99),
        )

    def _slow_reader(self, rng: random.Random) -> Request:
        """A large answer that fills all buffers."""
        body = {"prompt": self._prompts.long_ids(rng, 4), "max_tokens": 4} | self._sampled(rng)
        request = self._maybe_streamed(rng, "slow reader", COMPLETIONS, body)
        request = self._with(request, "slow reader", prompt_logprobs=self._facts.max_logprobs)
        return replace(
            request,
            behavior=ClientBehavior.READS_SLOWLY,
            patience=rng.uniform(0.05, 0.2),
            headers={"accept-encoding": "identity"},
        )

    def _burst(self, rng: random.Random) -> Request:
        """More concurrent requests than fit into the queue of the started server."""
        body = {"prompt": self._prompts.ids(rng, 4), "max_tokens": 2} | self._sampled(rng)
        return replace(self._maybe_streamed(rng, "burst", COMPLETIONS, body), times=self._burst_size)

    def _generation(self, rng: random.Random) -> Request:
        rare = self._long_prompt if rng.random() < 0.2 else self._several_answers
        kinds = (self._chat, self._completion, self._prompt_logprobs, self._echo_of_many, self._shared_prefix)
        return rng.choice((*kinds, rare))(rng)

    def _alternatives(self, rng: random.Random) -> int:
        return min(rng.choice((0, 1, 5, 20)), self._facts.max_logprobs)

    def _sampled(self, rng: random.Random) -> Body:
        """Sampling parameters, cache salt and priority."""
        body: Body = {"model": self._facts.model, "temperature": rng.choice((0, 0, 0.7, 1)), "return_token_ids": True}
        if rng.random() < 0.8:
            body["seed"] = rng.randrange(2**31)
        if rng.random() < 0.15:
            body["cache_salt"] = rng.choice(("one", "two"))
        if rng.random() < 0.1:
            # Only higher priorities: a lower one might starve.
            body["priority"] = rng.randint(-3, -1)
        return body

    @staticmethod
    def _maybe_streamed(rng: random.Random, kind: str, path: str, body: Body, share: float = 0.5) -> Request:
        if rng.random() >= share:
            return Request(kind, path, body)
        options = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.2}
        return Request(kind, path, body | {"stream": True, "stream_options": options})

    @staticmethod
    def _with(request: Request, kind: str, **fields: object) -> Request:
        assert isinstance(request.body, dict)
        return replace(request, kind=kind, body=request.body | fields)
