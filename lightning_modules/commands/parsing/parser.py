"""Parsers that leave it to the caller to say what is wrong, and what is wrong in one sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from inspect import signature
from pkgutil import resolve_name
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from lightning_modules.commands.parsing.complaints import BadOption, one_sentence
from lightning_modules.commands.parsing.given_options import given_options
from lightning_modules.commands.parsing.types import described, takes_null
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
    given = {**(classes or {}), **given_options(argv, of_files=())}  # first: it says what is wrong with a file
    try:
        parsed: Namespace = parser.parse_args(argv)
    except BadOption as error:
        options = list(parser._option_string_actions)
        raise ValueError(one_sentence(error, command=command, given=given, options=options)) from error
    refuse_nulls(parser, parsed, given)
    name_publicly(parsed)
    return parsed


def refuse_nulls(parser: ArgumentParser, parsed: Namespace, given: Collection[str]) -> None:
    """Raise a ValueError where an option is null, as files have it, and its type is not; jsonargparse lets it pass.

    An option of the parser's, or of a class that one of them names; one without a default, which may come from the
    data, only where it is among those that were given by hand.
    """
    for option, action in parser._option_string_actions.items():
        kind = getattr(action, "_typehint", None)
        nullable = kind is None or action.default is None or takes_null(kind)
        if not nullable and not option.endswith(".help") and parsed.get(action.dest) is None:
            raise ValueError(f"expected {option} to be {described(kind)}, got null; leave it out for its default")
        value = parsed.get(action.dest)
        if isinstance(value, Namespace) and value.get("class_path") and value.get("init_args"):
            _refuse_nulls_of(value["class_path"], option, vars(value["init_args"]), given)


def _refuse_nulls_of(class_path: str, option: str, values: Mapping[str, Any], given: Collection[str]) -> None:
    hints: dict[str, Any] = {}
    required: set[str] = set()
    for base in reversed(resolve_name(class_path).__mro__):
        with suppress(Exception):  # of a class of the user's, whose annotations may be of any kind
            hints |= get_type_hints(base.__init__)
            required |= {name for name, p in signature(base).parameters.items() if p.default is p.empty}
    for name, value in values.items():
        kind, by_hand = hints.get(name), f"{option.lstrip('-')}.{name}" in given
        if value is None and kind is not None and not takes_null(kind) and (by_hand or name not in required):
            raise ValueError(
                f"expected {option}.{name} to be {described(kind)}, got null; leave it out for its default"
            )


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
