"""Command lines declared as dataclasses: each field made by `option` is a flag."""

import argparse
import dataclasses
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

from serve import __version__
from serve.config.values import Between, OneOf, suggestion

_KEY = "option"
_MAX_COLUMNS = 100  # width of --help


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is read from the command line."""

    group: str  # heading in --help
    help: str
    parse: Callable[[str], Any] | None  # raises ValueError; None: a switch with a --no- form
    many: bool  # repeatable flag; the field is a tuple
    positional: bool  # the flag may be omitted
    metavar: str | None  # placeholder of the value in --help


def option(
    group: str,
    text: str,
    parse: Callable[[str], Any] | None = str,
    *,
    default: Any = None,
    choices: tuple[str, ...] = (),
    many: bool = False,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is a flag, with `text` as its help; --max-len sets the field `max_len`.

    Args:
        parse: converts the flag's value, raising ValueError; None makes a switch.
        default: dataclasses.MISSING for a required option.
        many: the flag is repeatable, and the field is a tuple.
        positional: the flag may be omitted.
        metavar: placeholder of the value in --help; by default the choices, or what `parse` implies.
    """
    if choices:
        parse, metavar = OneOf(choices), metavar or "|".join(choices)
    metadata = {_KEY: Option(group, text, parse, many, positional, metavar or _placeholder(parse))}
    return dataclasses.field(default=default, metadata=metadata)


class CommandLine[C]:
    """Reads flags, or a YAML file or mapping of flags, into a dataclass of options."""

    def __init__(
        self, kind: type[C], *, prog: str, description: str, epilog: str | None = None, order: Sequence[str] = ()
    ) -> None:
        """Build the parser.

        Args:
            kind: the dataclass; fields that are not made by `option` keep their defaults.
            order: the last groups of --help. Other groups precede them in the order of their fields.
        """
        self._kind = kind
        fields = [field for field in dataclasses.fields(kind) if _KEY in field.metadata]  # type: ignore[arg-type]
        self._options: dict[str, Option] = {field.name: field.metadata[_KEY] for field in fields}
        self._required = [field.name for field in fields if field.default is MISSING]
        self._positional = [name for name, option in self._options.items() if option.positional]
        switched_on = frozenset(field.name for field in fields if field.default is True)
        self.parser = _Parser(
            prog=prog,
            usage=" ".join([prog, *map(self._usage, self._positional), "[flags]"]),
            description=description,
            epilog=epilog,
            formatter_class=functools.partial(_Help, switched_on=switched_on),
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        self.parser.add_argument("--version", action="version", version=f"logprobd {__version__}")
        self.parser.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file of flags; command-line flags take precedence"
        )
        for name in self._positional:
            parse = argument_type(self._options[name].parse or str)
            count = "*" if self._options[name].many else "?"
            self.parser.add_argument(name.upper(), nargs=count, type=parse, default=None, help=argparse.SUPPRESS)
        names = dict.fromkeys(option.group for option in self._options.values())
        ordered = [*(name for name in names if name not in order), *(name for name in order if name in names)]
        groups = {name: self.parser.add_argument_group(name) for name in ordered}
        for field in fields:
            self._add(groups[self._options[field.name].group], field.name, field.default)

    def read(
        self, arguments: Sequence[str] | None = None, complete: Callable[[dict[str, Any]], None] | None = None
    ) -> C:
        """The configuration that a command line describes; a mistake exits with code 2 and names the flag.

        Args:
            arguments: by default those of the process.
            complete: changes the values by field name, before the configuration is made of them; raises ValueError.
        """
        try:
            values = self._parse(sys.argv[1:] if arguments is None else arguments)
            if file := values.pop("config", None):
                values = self._parse(self._words(_load_yaml(file))) | values
            return self._make(values, complete)
        except ValueError as error:
            self.parser.print_usage(sys.stderr)
            self.parser.exit(2, f"{self.parser.prog}: error: {error}\n")

    def from_mapping(self, flags: Mapping[str, Any], complete: Callable[[dict[str, Any]], None] | None = None) -> C:
        """The configuration that a mapping of flags to values describes; see `read`.

        Raises:
            ValueError: a mistake; the message names the flag.
        """
        return self._make(self._parse(self._words(flags)), complete)

    def _usage(self, name: str) -> str:
        word = name.upper() + " ..." * self._options[name].many
        return word if name in self._required else f"[{word}]"

    def _add(self, group: argparse._ArgumentGroup, name: str, default: Any) -> None:
        option = self._options[name]
        about: dict[str, Any] = {"help": option.help + _default_text(default)}
        if option.parse is None:
            about["action"] = argparse.BooleanOptionalAction
        else:
            metavar = name.upper() if option.positional else option.metavar
            about |= {"type": argument_type(option.parse), "metavar": metavar}
            about |= {"action": "append"} if option.many else {}
        group.add_argument(_flag(name), **about)

    def _make(self, values: dict[str, Any], complete: Callable[[dict[str, Any]], None] | None) -> C:
        values = {name: value for name, value in values.items() if name in self._options}
        if missing := [name.upper() for name in self._required if name not in values]:
            raise ValueError(f"the following arguments are required: {', '.join(missing)}")
        if complete is not None:
            complete(values)
        return self._kind(**values)

    def _parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of the flags that are given, by field name."""
        namespace, unknown = self.parser.parse_known_args(words)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            raise ValueError(f"unrecognized argument {word}{suggestion(word, self._flags())}")
        values = vars(namespace)
        for name in self._positional:
            if (value := values.pop(name.upper())) not in (None, []):
                if name in values:
                    raise ValueError(f"argument {_flag(name)}: {name.upper()} is given twice")
                values[name] = value
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def _words(self, flags: Mapping[str, Any]) -> list[str]:
        """The command line equivalent to a mapping; underscores may replace hyphens, and None leaves the default."""
        words: list[str] = []
        for key, value in flags.items():
            name = str(key).replace("-", "_")
            if name in ("config", "help", "version"):
                raise ValueError(f"argument {_flag(name)}: only allowed on the command line")
            many = isinstance(value, list) and name in self._options and self._options[name].many
            for item in value if many else [value]:
                words += self._word(_flag(name), item)
        return words

    @staticmethod
    def _word(flag: str, value: Any) -> list[str]:
        if value is None:
            return []
        if isinstance(value, bool):
            return [flag if value else flag.replace("--", "--no-", 1)]
        return [f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}"]

    def _flags(self) -> list[str]:
        switches = [_flag(f"no_{name}") for name, option in self._options.items() if option.parse is None]
        return [*map(_flag, self._options), *switches, "--config", "--help", "--version"]


def from_keywords[C](kind: type[C], values: Mapping[str, Any]) -> C:
    """A dataclass of options from Python values, which are checked as the flags are.

    Raises:
        TypeError: a name is not an option; the message suggests the nearest.
        ValueError: a value is not valid; the message names the option.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if _KEY in field.metadata}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise TypeError(f"{name!r} is not an option{suggestion(name, fields)}")
    return kind(**{name: _checked(fields[name], value) for name, value in values.items()})


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    option: Option = field.metadata[_KEY]
    if value is None and field.default is None:
        return None
    if option.parse is None:
        if not isinstance(value, bool):
            raise ValueError(f"{field.name}: {value!r} is not True or False")
        return value
    try:
        return option.parse(str(value))
    except ValueError as error:
        raise ValueError(f"{field.name}: {error}") from None


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for a mistake, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Two columns; a switch that is on by default is shown with its --no- form."""

    def __init__(self, prog: str, *, switched_on: frozenset[str]) -> None:
        columns = min(_MAX_COLUMNS, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=34, width=columns)
        self._switched_on = switched_on

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse.BooleanOptionalAction):
            return super()._format_action_invocation(action)
        flag = action.option_strings[0]
        return flag.replace("--", "--[no-]", 1) if action.dest in self._switched_on else flag


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as a `type` of argparse, which shows the messages of ArgumentTypeError only."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def _load_yaml(path: Path) -> Mapping[str, Any]:
    import yaml  # not needed to print --help

    try:
        flags = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"argument --config: {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(flags, dict):
        raise ValueError(f"argument --config: {path}: must be a mapping of flags to values")
    return flags


def _placeholder(parse: Callable[[str], Any] | None) -> str | None:
    if parse is None:
        return None
    if isinstance(parse, Between):
        return "N" if isinstance(parse.low, int) else "X"
    return "PATH" if parse is Path else "TEXT"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default_text(default: Any) -> str:
    if default is False or default in (MISSING, None, (), "", "{}", math.inf):
        return ""
    text = "on" if default is True else json.dumps(default) if isinstance(default, tuple) else str(default)
    return f" (default: {text.replace('%', '%%')})"
