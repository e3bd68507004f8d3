"""Command lines declared as dataclasses: each field made by `option` is a flag."""

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

from serve import __version__
from serve.config.values import Between, OneOf, parse_bytes, parse_memory, strings, suggestion

# Headings of --help, after the groups of a command's own options.
MODEL = "Model"
LOGPROBS = "Log-probs"
SCHEDULING = "Scheduling and memory"
NETWORK = "Network and security"
API = "API"
PROCESS = "Logs and process"
GROUPS = (MODEL, LOGPROBS, SCHEDULING, NETWORK, API, PROCESS)

_KEY = "option"
_MAX_COLUMNS = 100  # width of --help
_PLACEHOLDERS = {Path: "FILE", parse_bytes: "BYTES", parse_memory: "BYTES", strings: "JSON"}


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is read from the command line."""

    default: Any  # dataclasses.MISSING: required
    group: str  # heading in --help
    help: str
    parse: Callable[[str], Any] | None  # raises ValueError; None: a switch with a --no- form
    repeatable: bool  # repeatable flag; the field is a tuple
    metavar: str  # placeholder of the value in --help


def option(
    group: str,
    text: str,
    parse: Callable[[str], Any] = str,
    *,
    default: Any = None,
    repeatable: bool = False,
    metavar: str = "",
) -> Any:
    """A dataclass field that is a flag, with `text` as its help; --max-len sets the field `max_len`.

    Args:
        parse: converts the flag's value, raising ValueError.
        default: dataclasses.MISSING for a required option.
        metavar: by default what `parse` implies.
    """
    return _field(Option(default, group, text, parse, repeatable, metavar or _placeholder(parse)))


def switch(group: str, text: str, *, default: bool = False) -> Any:
    """A dataclass field that is a flag without a value; --no-NAME turns it off."""
    return _field(Option(default, group, text, None, repeatable=False, metavar=""))


def with_default(kind: type, name: str, default: Any) -> Any:
    """The option `name` of the dataclass `kind`, with another default."""
    return _field(dataclasses.replace(_options(kind)[name], default=default))


def _field(option: Option) -> Any:
    return dataclasses.field(default=option.default, metadata={_KEY: option})


def _options(kind: type) -> dict[str, Option]:
    fields = dataclasses.fields(kind)
    return {field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata}


class CommandLine[C]:
    """Reads flags, or a YAML file or mapping of flags, into a dataclass of options."""

    def __init__(
        self,
        kind: type[C],
        *,
        prog: str,
        description: str,
        epilog: str,
        positional: str | tuple[str, ...],
        exclude: Collection[str] = (),
        complete: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Build the parser.

        Args:
            kind: the dataclass.
            positional: option that may also be given without its flag, or several required ones, in this order.
            exclude: options that are not flags of this command and keep their defaults.
            complete: changes the values by field name before `kind` is made of them; raises ValueError.
        """
        self._kind = kind
        self._complete = complete
        self._options = {name: option for name, option in _options(kind).items() if name not in exclude}
        self._positional = (positional,) if isinstance(positional, str) else positional
        self._required = [name for name, option in self._options.items() if option.default is MISSING]
        words = [name.upper() + " ..." * self._options[name].repeatable for name in self._positional]
        is_required = self._positional[0] in self._required
        self.parser = _Parser(
            prog=prog,
            usage=f"{prog} {' '.join(words) if is_required else f'[{words[0]}]'} [flags]",
            description=description,
            epilog=epilog,
            formatter_class=_Help,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        self.parser.add_argument("--version", action="version", version=f"logprobd {__version__}")
        self.parser.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file of flags; command-line flags take precedence"
        )
        for name in self._positional:
            argument = self._options[name]
            self.parser.add_argument(
                name.upper(),
                nargs="*" if argument.repeatable else "?",
                type=argument_type(argument.parse or str),
                default=None,
                help=argparse.SUPPRESS,
            )
        names = dict.fromkeys(option.group for option in self._options.values())
        ordered = sorted(names, key=lambda name: GROUPS.index(name) if name in GROUPS else -1)
        groups = {name: self.parser.add_argument_group(name) for name in ordered}
        for name, option in self._options.items():
            _add(groups[option.group], _flag(name), option)

    def read(self, arguments: Sequence[str] | None = None) -> C:
        """The configuration of a command line, by default the process's; a mistake exits with code 2."""
        try:
            values = self._parse(sys.argv[1:] if arguments is None else arguments)
            if file := values.pop("config", None):
                values = self._parse(self._words(_load_yaml(file))) | values
            return self._make(values)
        except ValueError as error:
            self.parser.print_usage(sys.stderr)
            self.parser.exit(2, f"{self.parser.prog}: error: {error}\n")

    def from_mapping(self, flags: Mapping[str, Any]) -> C:
        """The configuration that a mapping of flags to values describes.

        Raises:
            ValueError: a mistake; the message names the flag.
        """
        return self._make(self._parse(self._words(flags)))

    def _make(self, values: dict[str, Any]) -> C:
        values = {name: value for name, value in values.items() if name in self._options}
        required = {name: name.upper() if name in self._positional else _flag(name) for name in self._required}
        if missing := [shown for name, shown in required.items() if name not in values]:
            raise ValueError(f"the following arguments are required: {', '.join(missing)}")
        if self._complete is not None:
            self._complete(values)
        return self._kind(**values)

    def _parse(self, words: Sequence[str]) -> dict[str, Any]:
        # Flags may stand between several positional arguments.
        parse = self.parser.parse_known_args if len(self._positional) == 1 else self.parser.parse_known_intermixed_args
        namespace, unknown = parse(words)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            switches = [_flag(f"no_{name}") for name, option in self._options.items() if option.parse is None]
            flags = [*map(_flag, self._options), *switches, "--config", "--help", "--version"]
            raise ValueError(f"unrecognized argument {word}{suggestion(word, flags)}")
        values = vars(namespace)
        for name in self._positional:
            if (value := values.pop(name.upper(), None)) not in (None, []):
                if name in values:
                    raise ValueError(f"argument {_flag(name)}: {name.upper()} is given twice")
                values[name] = value
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def _words(self, flags: Mapping[str, Any]) -> list[str]:
        """The command line equivalent to a mapping; underscores may replace hyphens, and None leaves the default."""
        words = []
        for key, value in flags.items():
            name = str(key).replace("-", "_")
            flag = _flag(name)
            if name in ("config", "help", "version"):
                raise ValueError(f"argument {flag}: only allowed on the command line")
            is_list = isinstance(value, list) and name in self._options and self._options[name].repeatable
            for item in value if is_list else [value]:
                if isinstance(item, bool):
                    words.append(flag if item else flag.replace("--", "--no-", 1))
                elif item is not None:
                    words.append(f"{flag}={json.dumps(item) if isinstance(item, list | dict) else item}")
        return words


def from_keywords[C](kind: type[C], values: Mapping[str, Any], exclude: Collection[str] = ()) -> C:
    """A dataclass of options from Python values, which are checked as the flags are; None leaves the default.

    Args:
        exclude: options that `values` may not set.

    Raises:
        TypeError: a name is not an option; the message suggests the nearest.
        ValueError: a value is not valid; the message names the option.
    """
    options = {name: option for name, option in _options(kind).items() if name not in exclude}
    for name in values:
        if name not in options:
            raise TypeError(f"{name!r} is not an option{suggestion(name, options)}")
    given = {name: value for name, value in values.items() if value is not None}
    return kind(**{name: _checked(name, options[name], value) for name, value in given.items()})


def _checked(name: str, option: Option, value: Any) -> Any:
    try:
        if option.parse is not None:
            return option.parse(json.dumps(value) if isinstance(value, dict | list) else str(value))
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is not True or False")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _add(group: argparse._ArgumentGroup, flag: str, option: Option) -> None:
    text = option.help + _default_text(option.default)
    if option.parse is None:
        switch = group.add_argument(flag, help=text, action=argparse.BooleanOptionalAction)
        switch.metavar = flag.replace("--", "--[no-]", 1) if option.default else flag
        return
    action = "append" if option.repeatable else "store"
    group.add_argument(flag, help=text, type=argument_type(option.parse), metavar=option.metavar, action=action)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for a mistake, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Two columns; a switch is shown as its metavar, with the --no- form only if it is on by default."""

    def __init__(self, prog: str) -> None:
        columns = min(_MAX_COLUMNS, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=34, width=columns)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return str(action.metavar)
        return super()._format_action_invocation(action)


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


def _placeholder(parse: Callable[[str], Any]) -> str:
    if isinstance(parse, OneOf):
        return "|".join(parse.choices)
    if isinstance(parse, Between):
        return parse.unit or ("N" if isinstance(parse.low, int) else "X")
    return _PLACEHOLDERS.get(parse, "TEXT")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default_text(default: Any) -> str:
    if default is False or default in (MISSING, None, (), "", "{}", math.inf):
        return ""
    text = "on" if default is True else json.dumps(default) if isinstance(default, tuple) else str(default)
    return f" (default: {text.replace('%', '%%')})"
