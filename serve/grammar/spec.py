"""GrammarSpec: a grammar as a request states it, and its translation for llguidance."""

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from serve.grammar.json_schema import (
    GrammarError,
    check_finite,
    closed,
    load,
    load_schema,
    regex_error,
    schema_error,
    with_whitespace,
)
from serve.grammar.structural_tag import structural_tag, tag_error

_IS_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*:)")
_POSITION = re.compile(r"(?:at )?(\d+)\((\d+)\): ")  # line and column in messages of llguidance
# By default llguidance allows only the tokenizer's own tokens for text that is fixed, which changes the distribution.
_ANY_TOKENS = {"name": "options", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: "x"'}


class GrammarKind(enum.StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the whole text
    CHOICE = "choice"  # JSON list of texts
    GRAMMAR = "grammar"  # Lark as in llguidance, or GBNF
    STRUCTURAL_TAG = "structural_tag"  # JSON, see `structural_tag`


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    kind: GrammarKind
    text: str
    whitespace: str | None = None  # regular expression of whitespace in JSON; "" allows none; None is the default
    closed: bool = False  # objects of a schema have only the properties that it names, unless it says otherwise

    def source(self, special_tokens: Mapping[str, int]) -> str:
        """The grammar in llguidance's own form.

        `special_tokens`, texts and ids, count where structural tags contain them. Raise GrammarError if the text is
        invalid.
        """
        if self.kind is GrammarKind.JSON_SCHEMA:
            schema = load_schema(self.text)
            check_finite(schema)
            schema = closed(schema) if self.closed else schema
            return _source(json_schema=with_whitespace(schema, self.whitespace))
        if self.kind is GrammarKind.REGEX:
            return _source(lark_grammar=f"start: /{regex_to_lark(self.text, '')}/")
        if self.kind is GrammarKind.CHOICE:
            return _source(lark_grammar="start: " + " | ".join(map(json.dumps, json.loads(self.text))))
        if self.kind is GrammarKind.STRUCTURAL_TAG:
            return _source(lark_grammar=structural_tag(load(self.text), special_tokens, self.whitespace))
        return _source(lark_grammar=self.text if _IS_LARK.search(self.text) else _from_gbnf(self.text))

    def explain(self, message: str) -> str:
        """llguidance's message about this grammar as one line that says where the fault is."""
        if message.startswith("NoExtension"):
            return "the grammar allows no text"
        if self.kind is GrammarKind.JSON_SCHEMA:
            return schema_error(message, load_schema(self.text))
        if self.kind is GrammarKind.REGEX:
            return regex_error(_POSITION.sub("", message, count=1))
        position = _POSITION.match(message)
        text = message[position.end() if position else 0 :]
        if self.kind is GrammarKind.STRUCTURAL_TAG:
            return tag_error(text, load(self.text))
        line = regex_error(text)
        return f"line {position[1]}, column {position[2]}: {line}" if position else line


def _source(**grammar: Any) -> str:
    return json.dumps({"grammars": [grammar, _ANY_TOKENS]})


def forced(source: str) -> str:
    """A grammar in llguidance's form that allows only the tokenizer's own tokens for text that is fixed."""
    return json.dumps({"grammars": [part for part in json.loads(source)["grammars"] if part != _ANY_TOKENS]})


def _from_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(text).removeprefix("%llguidance {}\n\n")
    except GbnfToLarkError as error:
        before = error.pos.text[: error.pos.pos]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        reason = str(error).partition(" at line ")[0]
        raise GrammarError(f"line {line}, column {column}: {reason}") from None
    except RecursionError:
        raise GrammarError("the grammar is nested too deeply") from None
    except Exception as error:  # a bare Exception, among others for a missing root rule
        raise GrammarError(str(error).partition("\n")[0]) from error
