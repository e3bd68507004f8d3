"""Random prompts: words, token ids, and shared prefixes."""

import random

from tools.soak.request import ServerFacts

_PLAIN = ("the", "a", "of", "and", "to", "in", "river", "stone", "light", "seven", "house", "letter", "almost", "while")
# Other scripts, digits, white space, and characters of several tokens.
_OTHER = (
    "Straße",
    "naïve",
    "東京",
    "数字",
    "привет",
    "λόγος",
    "🙂",
    "👩‍💻",
    "3.14159",
    "2026-01-31",
    "f(x)",
    "\t",
    "\n\n",
)
_PREFIXES = 6


class Prompts:
    """Random prompts for one server."""

    def __init__(self, seed: int, facts: ServerFacts, longest: int) -> None:
        """`longest`: maximum tokens of a long prompt and its answer."""
        self._facts, self._longest = facts, longest
        sizes = random.Random(f"{seed}/prefixes")
        self._prefixes = [self.ids(sizes, sizes.randint(64, max(65, longest // 4))) for _ in range(_PREFIXES)]

    def text(self, rng: random.Random, words: int) -> str:
        """At least one word and no special token."""
        return " ".join(rng.choices(_PLAIN + _OTHER, k=words)).strip() or "so"

    def messages(self, rng: random.Random, turns: int = 1) -> list[dict[str, str]]:
        """A chat."""
        system = [{"role": "system", "content": self.text(rng, 8)}] if rng.random() < 0.3 else []
        pairs = [
            {"role": role, "content": self.text(rng, rng.randint(1, 10))}
            for _ in range(turns - 1)
            for role in ("user", "assistant")
        ]
        return [*system, *pairs, {"role": "user", "content": self.text(rng, rng.randint(1, 20))}]

    def ids(self, rng: random.Random, count: int) -> list[int]:
        """Random ids, including special tokens."""
        return [rng.randrange(self._facts.vocab_size) for _ in range(count)]

    def long_ids(self, rng: random.Random, room: int) -> list[int]:
        """Between half of the maximum length and all of it, minus `room` tokens for the answer."""
        limit = self._longest - room
        return self.ids(rng, rng.choice((limit, rng.randint(limit // 2, limit))))

    def shared(self, rng: random.Random) -> list[int]:
        """A shared prefix, complete or truncated, with a random continuation."""
        prefix = rng.choice(self._prefixes)
        length = len(prefix) if rng.random() < 0.7 else rng.randint(1, len(prefix))
        return prefix[:length] + self.ids(rng, rng.randint(1, 40))

    def too_long(self, rng: random.Random) -> list[int]:
        """Longer than the context."""
        return self.ids(rng, self._facts.max_model_len + rng.randint(1, 100))
