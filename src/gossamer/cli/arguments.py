"""The command line's arguments, derived from the options records, and a parser whose errors have three parts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from gossamer.errors import InvalidOptionError, UnknownOptionError
from gossamer.pipeline.options import Argument


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises what it would print."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as an error of three parts."""
        raise InvalidOptionError(
            "The command cannot be understood.",
            f"{message[:1].upper()}{message[1:]}.",
            f"Run `{self.prog} --help` to see what can be given.",
        )


def add_options(parser: argparse.ArgumentParser, kinds: Iterable[type]) -> None:
    """One argument for each option of the given records that can be given as text."""
    for kind in kinds:
        for option in fields(kind):
            argument = option.metadata.get("argument")
            if argument is not None:
                _add(parser, option, argument)


def option_values(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given for the options of one record."""
    return {option.name: given[option.name] for option in fields(kind) if given.get(option.name) is not None}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; an unknown one raises and names the nearest that exists."""
    arguments, unknown = parser.parse_known_args(argv)
    if not unknown:
        return arguments
    known = sorted(_flags(parser))
    name = unknown[0].split("=")[0]
    nearest = get_close_matches(name, known, n=1)
    raise UnknownOptionError(
        f"The argument {unknown[0]!r} is not understood.",
        f"It is no option of this command. The options are: {', '.join(known)}."
        if name.startswith("-")
        else "The command takes no further words; a prompt of several words needs quotation marks.",
        f"Did you mean {nearest[0]!r}?" if nearest else "Run the command with --help to see what can be given.",
    )


def _add(parser: argparse.ArgumentParser, option: Field[Any], argument: Argument) -> None:
    flag = "--" + (argument.flag or option.name).replace("_", "-")
    help_text = argument.help.replace("%", "%%") + _default_text(option)
    if argument.form == "positional":
        parser.add_argument(option.name, nargs="?", metavar=argument.metavar, help=help_text)
    elif argument.form == "switch":
        parser.add_argument(flag, dest=option.name, action="store_true", default=None, help=help_text)
    else:
        parser.add_argument(
            flag,
            dest=option.name,
            action="append" if argument.form == "many" else "store",
            type=argument.parse,
            metavar=argument.metavar,
            help=help_text,
        )


def _default_text(option: Field[Any]) -> str:
    """The default, where it is one word or number; others are told in the help itself."""
    return f" (default: {option.default})" if type(option.default) in (str, int, float) else ""


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """Long options of a parser and of its verbs."""
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= {flag for verb in action.choices.values() for flag in _flags(verb)}
    return flags
