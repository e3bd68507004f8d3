"""A dataclass whose fields are a command line: each field says its flag, and a parser is made from them."""

import argparse
import dataclasses
import difflib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml

_KEY = "option"
_WIDTH = 100  # columns of --help at most


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is read from the command line."""

    group: str  # heading of --help under which it stands
    help: str
    read: Callable[[str], Any] | None  # from a word to the value; None: a switch that also has a --no- form
    choices: tuple[str, ...] | None
    many: bool  # may be given again; the field is a tuple
    positional: bool
    default: Any  # MISSING: it must be given
    metavar: str | None  # what stands for the value in --help

    @property
    def placeholder(self) -> str | None:
        """What stands for the value in --help."""
        if self.metavar is not None or self.read is None:
            return self.metavar
        return "|".join(self.choices) if self.choices else _placeholder(self.read)

    def word(self, name: str) -> str:
        """What a mistake is told of: the flag, or what stands for a word without one."""
        return self.placeholder or name if self.positional else _flag(name)

    def declaration(self, name: str) -> tuple[str, dict[str, Any]]:
        """What argparse's add_argument wants for a field of this name."""
        about: dict[str, Any] = {"help": self.help + _told(self.default), "default": self.default}
        if self.read is None:
            return _flag(name), about | {"action": argparse.BooleanOptionalAction}
        about |= {"type": self.read, "choices": self.choices, "metavar": self.placeholder}
        if self.default is MISSING:  # a file of flags may say it: what nobody says is missed when all is read
            about["default"] = None
        if self.positional:
            return name, about | {"nargs": "?"}
        if self.many:
            return _flag(name), about | {"action": "append", "default": []}
        return _flag(name), about


def option(
    group: str,
    text: str,
    read: Callable[[str], Any] | None = str,
    *,
    default: Any = None,
    choices: tuple[str, ...] | None = None,
    many: bool = False,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """A field that is an option, described by `text`; its name with hyphens is the flag.

    Args:
        read: from a word to the value, raising argparse.ArgumentTypeError; None makes a switch.
        default: dataclasses.MISSING for what must be given.
        many: it may be given again, and the field is a tuple.
        metavar: what stands for the value in --help; None: the choices, or what `read` reads.
    """
    described = Option(group, text, read, choices, many, positional, default, metavar)
    if default is MISSING:
        return dataclasses.field(metadata={_KEY: described})
    return dataclasses.field(default=default, metadata={_KEY: described})


class CommandLine[C]:
    """Reads the words of a command line, and a YAML file of them, into a dataclass of options."""

    def __init__(
        self, kind: type[C], *, prog: str, description: str, epilog: str | None = None, order: Sequence[str] = ()
    ) -> None:
        """Makes the parser.

        Args:
            kind: a dataclass; its fields that are made by `option` can be said, others keep their defaults.
            order: of the groups in --help; others come before these, as their first fields do.
        """
        self._kind = kind
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # there is no public type for "a dataclass"
        self._options: dict[str, Option] = {each.name: each.metadata[_KEY] for each in fields if _KEY in each.metadata}
        self._lists = tuple(name for name, each in self._options.items() if each.many)
        self.parser = argparse.ArgumentParser(
            prog=prog,
            usage=" ".join([prog, *self._positionals(), "[flags]"]),
            description=description,
            epilog=epilog,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.parser.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file of flags; the command line stands over it"
        )
        named = dict.fromkeys(each.group for each in self._options.values())
        sequence = [name for name in named if name not in order] + [name for name in order if name in named]
        groups = {name: self.parser.add_argument_group(name) for name in sequence}
        for name, each in self._options.items():
            word, about = each.declaration(name)
            groups[each.group].add_argument(word, **about)

    def read(self, arguments: Sequence[str] | None = None) -> C:
        """The options that are said; a mistake ends the process with code 2 and a line that names the flag.

        Args:
            arguments: those of the process, if None.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", type=Path)
        files, _ = first.parse_known_args(arguments)
        said = {} if files.config is None else self._from_file(files.config)
        self.parser.set_defaults(**{name: value for name, value in said.items() if name not in self._lists})
        values = vars(self.parser.parse_args(arguments))
        for name in self._lists:  # argparse would add to a default
            values[name] = tuple(values[name] or said.get(name, ()))
        missed = [
            each.word(name) for name, each in self._options.items() if each.default is MISSING and not values[name]
        ]
        if missed:
            self.parser.error(f"the following arguments are required: {', '.join(missed)}")
        return self._kind(**{name: values[name] for name in self._options})

    def _from_file(self, path: Path) -> dict[str, Any]:
        """Values of a YAML file, read as the flags read them."""
        try:
            said = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.parser.error(f"argument --config: {path}: {str(error).splitlines()[0]}")
        if not isinstance(said, dict):
            self.parser.error(f"argument --config: {path}: must be a mapping of flags to values")
        return vars(self.parser.parse_args(self.words_of(said)))

    def words_of(self, said: Mapping[str, Any]) -> list[str]:
        """The command line that says what a mapping of flags to values says; an underscore may stand for a hyphen."""
        words: list[str] = []
        for key, value in said.items():
            name = str(key).replace("-", "_")
            if value is not None:
                words += self._said(name, value)
        return words

    def _said(self, name: str, value: Any) -> list[str]:
        flag = _flag(name)
        if name in self._options and self._options[name].positional:
            return [str(value)]
        if isinstance(value, bool):
            return [flag if value else flag.replace("--", "--no-", 1)]
        if isinstance(value, list) and name in self._lists:
            return [word for each in value for word in (flag, str(each))]
        return [f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}"]

    def _positionals(self) -> list[str]:
        named = [(name.upper(), each.default) for name, each in self._options.items() if each.positional]
        return [name if default is MISSING else f"[{name}]" for name, default in named]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Flags in one column, what they do in another; a switch that is on by default shows how it is turned off."""

    def __init__(self, prog: str) -> None:
        columns = min(_WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=34, width=columns)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse.BooleanOptionalAction):
            return super()._format_action_invocation(action)
        flag = action.option_strings[0]
        return flag.replace("--", "--[no-]", 1) if action.default else flag


def _placeholder(read: Callable[[str], Any]) -> str:
    if isinstance(read, Between):
        return "N" if isinstance(read.low, int) else "X"
    return "PATH" if read is Path else "TEXT"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _told(default: Any) -> str:
    """A default, where there is one to tell."""
    if default is MISSING or default is False or default in (None, (), "", "{}", math.inf):
        return ""
    text = "on" if default is True else json.dumps(default) if isinstance(default, tuple) else str(default)
    return f" (default: {text.replace('%', '%%')})"


def between[N: (int, float)](low: N, high: N) -> "Between[N]":
    """Reads a number within bounds, of their type."""
    return Between(low, high)


@dataclass(frozen=True, slots=True)
class Between[N: (int, float)]:
    """Reads a number."""

    low: N
    high: N

    def __call__(self, text: str) -> N:
        """Raises argparse.ArgumentTypeError for what is no such number."""
        kind = type(self.low)
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{value} is not between {self.low} and {self.high}")
        return value


def strings(text: str) -> tuple[str, ...]:
    """Reads a JSON list of strings; raises argparse.ArgumentTypeError for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list of strings, such as ["*"]')
    return tuple(value)


def from_keywords[C](kind: type[C], values: Mapping[str, Any]) -> C:
    """A dataclass of options from Python values, which are checked as the flags are.

    Raises:
        TypeError: a name is not an option; the message suggests the nearest.
        ValueError: a value is not valid; the message names the option.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # there is no public type for "a dataclass"
    options = {field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata}
    for name in values:
        if name not in options:
            raise TypeError(f"{name!r} is not an option{suggestion(name, options)}")
    return kind(**{name: _value(name, options[name], value) for name, value in values.items()})


def _value(name: str, option: Option, value: Any) -> Any:
    if value is None and option.default is None:
        return None
    if option.read is None:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is not True or False")
        return value
    try:
        result = option.read(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    if option.choices and result not in option.choices:
        hint = suggestion(str(value), option.choices) or f"; choose from {', '.join(option.choices)}"
        raise ValueError(f"{name}: {value!r} is not valid{hint}")
    return result


def suggestion(word: str, words: Iterable[str]) -> str:
    """The nearest of `words` as the end of an error message; "" if none is near."""
    nearest = difflib.get_close_matches(word, [*words], 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
