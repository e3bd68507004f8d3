"""Several hundred texts for comparing tokenizers: languages, code, emoji, white space."""

import random

_SEED = 7
_TEXTS = (
    "Hello, world!",
    "  leading and   multiple   spaces ",
    "tabs\tand\nnew\n\nlines\n\n\n",
    "naïve café résumé Ünïcödé",
    "東京タワーは333メートルです。",
    "你好，世界！今天天气怎么样？",
    "안녕하세요 세계",
    "Привет, как дела? Это тест.",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε",
    "ქართული አማርኛ",
    "Zażółć gęślą jaźń",
    "Đây là tiếng Việt",
    "😊👍🏽👨\u200d👩\u200d👧\u200d👦🇫🇷🏳️\u200d🌈",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ ﬂ ①②③ ½ ⅓ ² ♠♥♦♣ →←↑↓",
    "def f(x):\n\treturn x  # tabs\n\n\n",
    "for (int i = 0; i < 10; ++i) { std::cout << i << '\\n'; }",
    "```python\nprint('x')\n```",
    "- list\n- of\n  - items\n\n| a | b |\n|---|---|",
    '{"json": [1, 2.5, null, true]}',
    "<html><body>&nbsp;</body></html>",
    "SELECT * FROM t WHERE a='b';",
    "1234567 apples cost $89.50 in 2024. 3.14159265358979 0x1F4A9 100%",
    "e=mc² ∑∞ √2 ≈ 1.41421356",
    "https://example.com/a?b=c&d=%20e#f",
    "I'm you're he'll WE'VE DON'T it's don't “quotes” — dashes…",
    "a  b   c    d     e      f" + " " * 40 + "x",
    "\r\nwindows\r\n",
    "\u200bzero\u200bwidth\u00a0nbsp",
    "e\u0301 A\u0308 combining ﷺ ｆｕｌｌｗｉｄｔｈ",
    "▁ underscore ▁▁",
    "\x00\x01\x02",
    "x" * 50,
)


def texts() -> list[str]:
    """Return the texts, followed by reproducible mixtures of their characters and words."""
    pick = random.Random(_SEED)
    characters = [character for text in _TEXTS for character in text]
    words = [word for text in _TEXTS for word in text.split()]
    mixed = ["".join(pick.choices(characters, k=pick.randint(1, 30))) for _ in range(150)]
    return [*_TEXTS, *mixed, *(" ".join(pick.choices(words, k=pick.randint(1, 9))) for _ in range(150))]
