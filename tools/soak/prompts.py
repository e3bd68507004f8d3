"""What is asked about: words, token ids, and beginnings that many prompts share."""

import random

from tools.soak.ask import ServerFacts

_PLAIN = ("the", "a", "of", "and", "to", "in", "river", "stone", "light", "seven", "house", "letter", "almost", "while")
# Scripts, digits, space, and characters of several tokens.
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
    """Draws prompts for one server."""

    def __init__(self, seed: int, facts: ServerFacts, longest: int) -> None:
        """`longest` is the most tokens of a long prompt with its answer."""
        self._facts, self._longest = facts, longest
        sizes = random.Random(f"{seed}/prefixes")
        self._prefixes = [self.ids(sizes, sizes.randint(64, max(65, longest // 4))) for _ in range(_PREFIXES)]

    def text(self, rng: random.Random, words: int) -> str:
        """At least one word, none of them a special token."""
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
        """Any ids, those of special tokens too."""
        return [rng.randrange(self._facts.vocab_size) for _ in range(count)]

    def long_ids(self, rng: random.Random, room: int) -> list[int]:
        """As many as the model takes, or half of that, so that `room` are left for an answer."""
        most = self._longest - room
        return self.ids(rng, rng.choice((most, rng.randint(most // 2, most))))

    def shared(self, rng: random.Random) -> list[int]:
        """Begins as others do, whole or in part, and goes on alone."""
        prefix = rng.choice(self._prefixes)
        begun = len(prefix) if rng.random() < 0.7 else rng.randint(1, len(prefix))
        return prefix[:begun] + self.ids(rng, rng.randint(1, 40))

    def too_long(self, rng: random.Random) -> list[int]:
        """More than the model takes."""
        return self.ids(rng, self._facts.max_model_len + rng.randint(1, 100))
