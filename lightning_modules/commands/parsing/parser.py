"""Parsers that leave it to the caller to say what is wrong, and what is wrong in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from lightning_modules.commands.parsing.complaints import BadOption, one_sentence
from lightning_modules.commands.parsing.given_options import given_options
from lightning_modules.support.import_paths import public_path


class Parser(ArgumentParser):
    """Takes options by their full names only, and leaves it to the caller to say what is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, in the parser's own words, in place of an exit."""
        raise BadOption(message, self) from ex


def parse(parser: Parser, argv: list[str], command: str, classes: Mapping[str, Any] | None = None) -> Namespace:
    """The options of a command line.

    Args:
        parser: Of the command.
        argv: The words after the command.
        command: How it is called, for messages.
        classes: Option to the class that it names by default, for messages.

    Raises:
        ValueError: In one sentence, if the options are bad.
    """
    try:
        parsed: Namespace = parser.parse_args(argv)
    except BadOption as error:
        given = {**(classes or {}), **given_options(argv, of_files=())}
        options = list(parser._option_string_actions)
        raise ValueError(one_sentence(error, command=command, given=given, options=options)) from error
    name_publicly(parsed)
    return parsed


def name_publicly(parsed: Any) -> None:
    """Have classes of ours go by their public paths in parsed options, in place, for the files that record them."""
    if isinstance(parsed, list):
        for value in parsed:
            name_publicly(value)
    elif isinstance(parsed, Namespace | dict):
        for name, value in list((vars(parsed) if isinstance(parsed, Namespace) else parsed).items()):
            if name == "class_path" and isinstance(value, str):
                parsed[name] = public_path(value)
            name_publicly(value)
