"""Lark grammars of texts, as grammars of the same texts within JSON strings: every literal is escaped."""

import json
import re
from collections.abc import Callable, Iterable

from serve.grammar.json_schema import GrammarError

_SPECIAL = [*map(chr, range(32)), '"', "\\"]  # characters that JSON escapes
_ORDINARY = r"[^\x22\x5c\x00-\x1f]"
_STRING = r'"(?:\\.|[^"\\\n])*"'
_LARK = re.compile(
    rf"""(?P<comment>//[^\n]*|\#[^\n]*|%llguidance\s*\{{\}})
    |(?P<range>{_STRING}\.\.{_STRING})
    |(?P<string>{_STRING})(?P<case>i?)
    |/(?P<regex>(?:\\.|[^/\\\n])+)/(?P<flags>[a-z]*)
    |%import\s+common\.(?P<common>\w+)(?:\s*->\s*(?P<alias>\w+))?
    |(?P<refused>%(?:json|regex|lark|llguidance|import|override|declare)\b|<|@|&|~(?!\s*\d))
    |(?P<other>[\w.%-]+|\s+|.)""",
    re.VERBOSE | re.DOTALL,
)
_ATOM = re.compile(
    r"""(?P<class>\[\^?\]?(?:\\.|[^\]\\])*\])
    |\\(?P<code>x[0-9a-fA-F]{2}|x\{[0-9a-fA-F]+\}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\})
    |\\(?P<escape>.)
    |\(\?(?P<set>[a-zA-Z-]+)(?P<scope>[:)])
    |(?P<open>\()
    |(?P<plain>.)""",
    re.VERBOSE | re.DOTALL,
)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
# The terminals of Lark's library.
_COMMON = {
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"[0-9]+\.[0-9]*|\.[0-9]+",
    "FLOAT": r"[0-9]+[eE][+-]?[0-9]+|([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?",
    "NUMBER": r"([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][+-]?[0-9]+)?",
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "ESCAPED_STRING": r'"(\\.|[^"\\\n])*"',
}


def escaped_lark(text: str) -> str:
    """The grammar of a valid grammar's texts as they stand between the quotes of a JSON string.

    Characters have one spelling each: the short escape if there is one. Raise GrammarError, with line and column, for
    what cannot be escaped.
    """
    parts: list[str] = []
    for found in _LARK.finditer(text):
        try:
            parts.append(_escaped(found))
        except (GrammarError, ValueError, re.error) as error:
            before = text[: found.start()]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            reason = error if isinstance(error, GrammarError) else f"{found[0][:40]!r} is not supported"
            raise GrammarError(f"line {line}, column {column}: {reason} in the grammar of a tool") from None
    return "".join(parts)


def _escaped(found: re.Match[str]) -> str:
    if found["comment"] is not None:
        return ""
    if found["refused"] is not None:
        raise GrammarError(f"`{found['refused']}` is not supported")
    if found["range"] is not None:
        first, last = (re.escape(json.loads(end)) for end in re.findall(_STRING, found["range"]))
        return f"/{_escaped_regex(f'[{first}-{last}]', is_dotall=False)}/"
    if found["string"] is not None:
        value = json.loads(found["string"], strict=False)
        inner = json.dumps(value, ensure_ascii=False)[1:-1]
        if found["case"] and inner != value:
            raise GrammarError("characters that JSON escapes are not supported in a string with the flag i")
        return json.dumps(inner, ensure_ascii=False) + found["case"]
    if found["regex"] is not None:
        flags = found["flags"]
        if "x" in flags:
            raise GrammarError("the flag x is not supported")
        return f"/{_escaped_regex(found['regex'], is_dotall='s' in flags)}/{flags}"
    if found["common"] is not None:
        name = found["common"]
        if name not in _COMMON:
            raise GrammarError(f"`common.{name}` is not supported")
        return f"{found['alias'] or name}: /{_escaped_regex(_COMMON[name], is_dotall=False)}/"
    return found[0]


def _escaped_regex(pattern: str, *, is_dotall: bool) -> str:
    parts: list[str] = []
    flags = [is_dotall]  # of each open group
    for found in _ATOM.finditer(pattern):
        if found["set"] is not None:
            on, _, off = found["set"].partition("-")
            if "x" in on:
                raise GrammarError("the flag x is not supported")
            value = (flags[-1] or "s" in on) and "s" not in off
            flags[-1:] = [flags[-1], value] if found["scope"] == ":" else [value]
            parts.append(found[0])
        elif found["open"] is not None:
            flags.append(flags[-1])
            parts.append("(")
        elif found["plain"] == ")":
            if len(flags) > 1:
                flags.pop()
            parts.append(")")
        elif found["plain"] == ".":
            parts.append(_set(r"[\s\S]" if flags[-1] else r"[^\n]"))
        else:
            parts.append(_atom(found))
    return "".join(parts)


def _atom(found: re.Match[str]) -> str:
    if found["class"] is not None:
        if re.search(r"\[|&&|--|~~|\\[pPbB]", found["class"][1:].replace(r"\[", "")):
            raise GrammarError("nested classes, and properties of Unicode in classes, are not supported")
        return _set(found["class"])
    if found["code"] is not None:
        return _character(chr(int(found["code"][1:].strip("{}"), 16)), found[0])
    if (escape := found["escape"]) is not None:
        if escape in "sSDW":
            return _set(f"[\\{escape}]")
        if escape in "pP":
            raise GrammarError("properties of Unicode are not supported")
        return _character(_CONTROLS.get(escape, escape), found[0])
    return _character(found["plain"], found[0])


def _character(char: str, source: str) -> str:
    return _spelled([char]) if char in _SPECIAL else source


def _set(source: str) -> str:
    """One of the characters of a class."""
    contains: Callable[[str], object] = re.compile(source, re.ASCII).fullmatch
    special = [char for char in _SPECIAL if contains(char)]
    ordinary = f"[{source}&&{_ORDINARY}]"
    return f"(?:{ordinary}|{_spelled(special)})" if special else ordinary


def _spelled(chars: Iterable[str]) -> str:
    return f"(?-i:{'|'.join(json.dumps(char)[1:-1].replace('\\', r'\x5c').replace('"', r'\x22') for char in chars)})"
