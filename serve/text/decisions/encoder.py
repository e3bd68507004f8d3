"""Rendered prompts to token ids: control tokens in user text stay text, and what prompts share is encoded once."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

from transformers.utils.chat_template_utils import _get_template_literal_text

from serve.text.chat import PromptError, prompt_errors
from serve.text.decisions.conversation import CONTROL_END, CONTROL_START
from serve.text.tokenizer import Tokenizer, TokenizerError

MARK, SPLIT = "<|mark|>", "<|split|>"  # written by templates of transformers: end of the prompt, end of a segment
_MARKED = re.compile(f"{CONTROL_START}([^{CONTROL_START}{CONTROL_END}]*){CONTROL_END}|[{CONTROL_START}{CONTROL_END}]")
_MARGIN = 16  # characters of shared text after the place where a prompt is cut
_CONTEXT = 128  # characters at the end of a prompt that are searched for its last control token
_CACHED = 4096  # labels in their contexts
_BATCH = 1 << 18  # characters that are encoded at a time
_TEXT_COST = 1 << 8  # characters that a text counts at least

type _Kind = Literal["first", "inner", "split", "text"]  # of a segment: at the start, elsewhere, after SPLIT; a token


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids in two parts; prompts of one request hold the same list as `shared`."""

    shared: Sequence[int]
    tail: Sequence[int]
    context: str  # text that ends the prompt, from its last control token on

    @property
    def token_ids(self) -> list[int]:
        return [*self.shared, *self.tail]

    def __len__(self) -> int:
        return len(self.shared) + len(self.tail)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A part of a marked text that is encoded on its own."""

    text: str
    kind: _Kind
    start: int  # index in the marked text


@dataclass(frozen=True, slots=True)
class _Seam:
    """Where prompts are cut: ids before it are shared."""

    index: int  # in the marked text
    kind: _Kind  # of the segment after it
    ids: list[int]  # before it
    next_id: int | None  # that has to follow it


class PromptEncoder:
    """Encodes prompts as `apply_chat_template(sanitize_control_tokens=True)` of transformers does. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: str | None) -> None:
        """Take the control tokens from `template`: special tokens, and added tokens that it writes."""
        added = tokenizer.added_tokens()
        names = tokenizer.chat_control_tokens
        if names is None:
            literals = _get_template_literal_text(template or "")
            names = frozenset(token for token in added if token in literals and not token.isspace())
        self._tokenizer = tokenizer
        self._control = {
            token: index for token, index in added.items() if index in tokenizer.special_ids or token in names
        }
        self._pattern = re.compile(_alternatives([*self._control, MARK, SPLIT]))
        self._newline = tokenizer.encode("\n", add_special_tokens=False)
        self._bos = _leading_ids(tokenizer) if template is None else []
        self._splits_words = len({*tokenizer.words("a b")[2]}) > 1
        self._label_id = lru_cache(_CACHED)(self._read_label_id)
        self._text_ids = lru_cache(_CACHED)(self._encode_token_as_text)

    def mark(self, value: Any) -> Any:
        """`value` with its control tokens marked, in strings and in keys and values of objects.

        Raise PromptError if two keys of an object differ only in the private characters of the marks.
        """
        if isinstance(value, str):
            return self._pattern.sub(
                rf"{CONTROL_START}\g<0>{CONTROL_END}", value.replace(CONTROL_START, "").replace(CONTROL_END, "")
            )
        if isinstance(value, Mapping):
            marked = {self.mark(key): self.mark(item) for key, item in value.items()}
            if len(marked) != len(value):
                raise PromptError("state", "Two keys of an object differ only in private characters.")
            return marked
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, texts: Iterable[str], param: str) -> Iterator[Prompt]:
        """Token ids of marked texts that start alike. Raise PromptError for a text that cannot be encoded.

        The part that the texts of a batch share is encoded once, unless it could affect the ids of the others.
        """
        iterator = iter(texts)
        first = next(iterator)
        parts = ((common := _common_prefix(first, text), text[common:]) for text in iterator)
        with prompt_errors(param):
            for batch in _batches(chain([(len(first), "")], parts), lambda part: len(part[1]) + _TEXT_COST):
                seam = self._seam(first, min(common for common, _ in batch)) if len(batch) > 1 else None
                yield from self._encode_tails(first, batch, seam)

    def label_id(self, context: str, label: str) -> int | None:
        """The token that `label` is after `context`; None if it is not exactly one, or changes the tokens before it."""
        return self._label_id(context, label)

    def continuation(self, context: str, text: str, end: str, param: str) -> tuple[list[int], bool]:
        """Token ids of a marked text and the control token `end` after `context`.

        The second value is True if the text would change the tokens before it, so that it was encoded on its own.
        """
        segments = self._segments(text + end)
        first = segments[0].text if segments and segments[0].kind == "first" else ""
        with prompt_errors(param):
            base, whole = self._tokenizer.encode_batch([context, context + first])
            rest = _flatten(self._encode_segments(segments[bool(first) :]))
            if whole[: len(base)] != base:
                [ids] = self._encode_segments([_Segment(first, "inner", 0)])
                return [*ids, *rest], True
        return [*whole[len(base) :], *rest], False

    def _segments(self, marked: str) -> list[_Segment]:
        segments, end = list[_Segment](), 0
        for match in _MARKED.finditer(marked):
            segments += self._text_segments(marked[end : match.start()], end)
            if match[1]:
                kind: _Kind = "text" if match[1] in self._control or match[1] in (MARK, SPLIT) else "inner"
                segments.append(_Segment(match[1], kind, match.start(1)))
            end = match.end()
        return segments + self._text_segments(marked[end:], end)

    def _text_segments(self, text: str, start: int) -> list[_Segment]:
        segments = list[_Segment]()
        kind: _Kind = "inner" if start else "first"
        for part in text.split(SPLIT):
            if part:
                segments.append(_Segment(part, kind, start))
            start, kind = start + len(part) + len(SPLIT), "split"
        return segments

    def _encode_segments(self, segments: Sequence[_Segment]) -> list[list[int]]:
        texts = [self._leading_text(segment) + segment.text for segment in segments if segment.kind != "text"]
        encoded = iter(self._tokenizer.encode_batch(texts))
        return [
            self._text_ids(segment.text) if segment.kind == "text" else self._stripped(segment, next(encoded))
            for segment in segments
        ]

    def _leading_text(self, segment: _Segment) -> str:
        """Text before a segment for which the tokenizer adds no space, as SentencePiece does at the start of a text."""
        if segment.kind == "split":
            return next(iter(self._control), "\n")
        return "\n" if segment.kind == "inner" else ""

    def _stripped(self, segment: _Segment, ids: list[int]) -> list[int]:
        """`ids` without those of the leading text; the text is encoded without it if they do not begin with those."""
        leading = self._leading_text(segment)
        prefix = self._newline if leading == "\n" else [self._control[leading]] if leading else []
        if ids[: len(prefix)] == prefix:
            return ids[len(prefix) :]
        return self._tokenizer.encode(segment.text, add_special_tokens=False)

    def _encode_token_as_text(self, token: str) -> list[int]:
        ids = self._tokenizer.encode_plain("\n" + token)
        count = len(self._newline)
        ids = ids[count:] if ids[:count] == self._newline else self._tokenizer.encode_plain(token)
        if self._control.get(token) in ids:
            raise TokenizerError(f"The control token {token!r} in the text cannot be encoded as text.")
        return ids

    def _encode_texts(self, texts: Sequence[str], kind: _Kind = "first") -> list[list[int]]:
        """Token ids of marked texts; `kind` is that of their first segments."""
        segments = [
            [replace(segment, kind=kind) if segment.kind == "first" else segment for segment in self._segments(text)]
            for text in texts
        ]
        encoded = iter(self._encode_segments([segment for part in segments for segment in part]))
        return [[token for _ in part for token in next(encoded)] for part in segments]

    def _seam(self, text: str, common: int) -> _Seam | None:
        """A place before `common` where any text that starts with text[:common] can be cut."""
        segments = self._segments(text)
        number = max((i for i, s in enumerate(segments) if s.kind != "text" and s.start < common), default=None)
        if number is None:
            return None
        segment = segments[number]
        offset, head, next_id = self._cut(segment, common - segment.start)
        if not offset and segment.kind == "first":
            return None
        shared = [*self._bos, *_flatten(self._encode_segments(segments[:number])), *head]
        # At its start a segment can always be cut, since it is encoded on its own.
        kind = "inner" if offset else segment.kind
        return _Seam(segment.start + offset, kind, shared, next_id)

    def _cut(self, segment: _Segment, common: int) -> tuple[int, list[int], int | None]:
        """Characters before a place, at least _MARGIN before `common`, the ids before it and the next; 0 if none fits.

        Between two words can be cut, as the tokenizer encodes words one by one, and finds them from left to right.
        Without words, BPE's result is the one in which every pair of neighbours is a result, too: it can be cut where
        the next token stays the same, which `_encode_tails` checks.
        """
        leading = self._leading_text(segment)
        prefix = self._newline if leading == "\n" else [self._control[leading]] if leading else []
        ids, offsets, words = self._tokenizer.words(leading + segment.text)
        if ids[: len(prefix)] != prefix:
            return 0, [], None
        limit = min(common, len(segment.text)) - _MARGIN + len(leading)
        for i in range(len(ids) - 1, len(prefix), -1):
            is_start = words[i] != words[i - 1] if self._splits_words else self._tokenizer.is_bpe
            offset = offsets[i] - len(leading)
            if (
                is_start
                and words[i] is not None
                and offsets[i - 1] < offsets[i] <= limit
                and segment.text[offset] not in "\r\n\t"
            ):
                return offset, ids[len(prefix) : i], ids[i]
        return 0, [], None

    def _encode_tails(self, first: str, parts: Iterable[tuple[int, str]], seam: _Seam | None) -> Iterator[Prompt]:
        """Prompts of texts, given as the length of their common prefix with `first`, and the rest."""
        start = 0 if seam is None else seam.index
        for batch in _batches(parts, lambda part: part[0] - start + len(part[1])):
            tails = self._encode_texts(
                [first[start:common] + rest for common, rest in batch], seam.kind if seam else "first"
            )
            for (common, rest), tail in zip(batch, tails, strict=True):
                shared = list[int]() if seam is None else seam.ids
                if seam is None:
                    tail = [*self._bos, *tail]
                elif seam.next_id is not None and tail[:1] != [seam.next_id]:
                    [whole] = self._encode_texts([first[:common] + rest])
                    shared, tail = [], [*self._bos, *whole]
                context = self._context(first[max(0, common - _CONTEXT) : common] + rest)
                yield Prompt(shared, array("i", tail), context)

    def _context(self, text: str) -> str:
        """The end of a marked text from its last control token on, or else its last line."""
        end = _MARKED.split(text[-_CONTEXT:])[-1]
        if matches := [match.start() for match in self._pattern.finditer(end)]:
            return end[matches[-1] :]
        start = end.rstrip("\n").rfind("\n")
        return "\n" + end[start + 1 :]

    def _read_label_id(self, context: str, label: str) -> int | None:
        if self._pattern.search(label):
            return None
        base, whole = self._tokenizer.encode_batch([context, context + label])
        is_one = len(whole) == len(base) + 1 and whole[:-1] == base and not self._tokenizer.is_special(whole[-1])
        return whole[-1] if is_one else None


def _flatten(parts: Iterable[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def _batches[T](items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of at least _BATCH in size, but for the last."""
    batch, total = list[T](), 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= _BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _common_prefix(text: str, other: str) -> int:
    """Number of leading characters that are equal, by bisection."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that the tokenizer adds before a text, such as BOS."""
    text, whole = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    index = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return whole[:index]


def _alternatives(words: Iterable[str]) -> str:
    """A regular expression for the longest of `words`; unlike `a|b|...` its time does not grow with their number."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        text = ""
        while len(node) == 1 and "" not in node:
            [(character, node)] = node.items()
            text += re.escape(character)
        branches = "|".join(re.escape(character) + pattern(child) for character, child in node.items() if character)
        return text + (f"(?:{branches})" if branches else "") + ("?" if branches and "" in node else "")

    return pattern(trie)
