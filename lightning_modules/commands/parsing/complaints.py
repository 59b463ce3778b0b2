"""What is wrong with a command line, in one sentence; jsonargparse lists all types that a value is not of.

Where the fault lies is read off the exceptions and the parsers that met them. Four expressions read jsonargparse's
words: the key of a value, an option that there is not, one that is missing, and a class whose help is asked for.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_modules.commands.parsing.types import choices_of, described, known_classes, takes_only_classes
from lightning_modules.support.nearest import did_you_mean, meant

_KEY = re.compile(r'Parser key "([^"]+)"')
_NO_OPTION = re.compile(r"(?:Group '(?P<group>[^']+)' .*)?[Oo]ption '(?P<option>[^']+)'")
_MISSING = re.compile(r"arguments are required: ([\w., ]+)")

_HELP_OF = re.compile(r"(--[\w.]+)\.help: [\w ]+: ?(.*)")

_FEW = 20  # options that one sentence can name


class BadOption(ValueError):
    """The complaint of a parser, or of one inside it for the options of a class, in jsonargparse's words."""

    def __init__(self, message: str, parser: ArgumentParser) -> None:
        super().__init__(message)
        self.parser = parser


def one_sentence(error: BadOption, *, command: str, given: Mapping[str, Any], options: Iterable[str] = ()) -> str:
    """Say what was expected, what was got and what to do.

    Args:
        error: Of the parser of the command. Where it is of no known form its words stay, on one line.
        command: The command, for what to do.
        given: Options by name to what was given for them, by hand or by default.
        options: The options that there are, as ``--lr``, to find what a misspelt one was meant to be.
    """
    errors = [e for e in _causes(error) if isinstance(e, BadOption)]
    inner, words = errors[-1], " ".join(str(errors[-1]).split())
    key = ".".join(match[1] for e in errors if (match := _KEY.match(str(e))))
    lists = f"{command} --help lists the options"
    if asked := _HELP_OF.match(words):
        return f"expected {asked[1]}.help CLASS, a class by its import path or its name, got {asked[2]!r}; name one"
    if (cause := inner.__cause__) is None:  # words that no option takes
        taken = words.partition("arguments:")[2].split() or ["''"]
        word = next((word for word in taken if word.startswith("-")), taken[-1]).partition("=")[0]
        return f"expected an option of {command}, got {word}; {_option_meant(word, options) or lists}"
    if isinstance(cause, argparse.ArgumentError) and cause.argument_name:
        mapping = described(_type(inner.parser, cause.argument_name)).startswith("a mapping")
        mend = "; give one, or '{}' for the defaults" if mapping else "; give one"
        return f"expected a value after {cause.argument_name}, got none{mend}"
    if match := _NO_OPTION.search(words):
        name = ".".join(filter(None, match.groups()))
        return _no_option(name, key, inner.parser, command, given, options)
    if match := _MISSING.search(words):
        names = [name.strip().removeprefix(f"{command.split()[-1]}.") for name in match[1].split(",")]
        missing = ", ".join(f"--{key}.{name}" if key else f"--{name}" for name in names)
        return f"expected {missing}{f', which {_last(given[key])} needs' if key in given else ''}, got none; give it"
    return _bad_value(inner, key, words, command, given) if key else f"{words}; {lists}"


def _no_option(
    name: str, key: str, parser: ArgumentParser, command: str, given: Mapping[str, Any], options: Iterable[str]
) -> str:
    if not key:  # of a file
        mend = _option_meant(name, options, "") or f"{command} --help lists the options"
        return f"expected an option of {command}, got {name}; {mend}"
    kind = given.get(key)
    if kind is None:
        return f"expected --{key} CLASS before an option of it, got --{key}.{name}; name the class"
    if name == "class_path":
        return (
            f"expected the options of {_last(kind)} in init_args, got them beside class_path; write {key} as "
            f"{{class_path: {kind}, init_args: {{OPTION: VALUE}}}}"
        )
    known = [option.lstrip("-") for option in _options(parser) if not option.endswith("help")]
    if not re.fullmatch(r"[\w.]+", str(kind)):  # a mapping of options, and no class
        mend = did_you_mean(name, known, f"--{key}.") or f"{command} --help lists the options"
        return f"expected an option of --{key}, got {name} in it; {mend}"
    mend = did_you_mean(name, known, f"--{key}.") or f"{command} --{key}.help {kind} lists them"
    return f"expected an option of {_last(kind)}, got --{key}.{name}; {mend}"


def _bad_value(error: BadOption, key: str, words: str, command: str, given: Mapping[str, Any]) -> str:
    own_key = _KEY.match(str(error))
    kind, value = _type(error.parser, f"--{own_key[1]}") if own_key else None, _value(key, given)
    if value is None:  # of a file that gives options inside it one by one, as key.name
        inside = {name.removeprefix(f"{key}."): of for name, of in given.items() if name.startswith(f"{key}.")}
        value = inside or None
    if key == "config":
        return f"expected --config to be a YAML file, got {value!r}, which {_state(value)}"
    if kind is None and isinstance(value, str) and any(o.startswith(f"--{key}.") for o in _options(error.parser)):
        return f"expected options one by one, as --{key}.OPTION VALUE, or a YAML file of them, got --{key} {value}"
    if kind is None or value is None:
        return f"bad --{key}: {_KEY.sub('', words).lstrip(': ')}"
    for cause in _causes(error):
        if isinstance(cause, ImportError | AttributeError):
            mend = meant(str(cause.name), dir(cause.obj)) if isinstance(cause, AttributeError) else ""
            return f"expected --{key} to be a class that can be imported and made, got {value!r}: {cause}{mend}"
    choices = choices_of(kind)
    unknown = [word for word in re.findall(r"[\w-]+", str(value)) if word not in choices] if choices else []
    near = did_you_mean(*((unknown[0], choices) if unknown else (_last(value), known_classes(kind))))
    if not takes_only_classes(kind):
        return f"expected --{key} to be {described(kind)}, got {value!r}; {near or _way(key, kind, value, command)}"
    if "." in str(value):
        return f"expected --{key} to be {described(kind)}, got {value!r}, which is none"
    return (
        f"expected --{key} to be a class by its import path, such as module.Class, or a known one by its name, got "
        f"{value!r}; {near or f'{command} --help all lists known ones'}"
    )


def _value(key: str, given: Mapping[str, Any]) -> Any:
    """The value that was given for an option, by itself or in a mapping of options."""
    if key in given or "." not in key:
        return given.get(key)
    whole, _, name = key.rpartition(".")
    values = given.get(whole)
    values = yaml.safe_load(values) if isinstance(values, str) else values
    return values.get(name) if isinstance(values, Mapping) else None


def _way(key: str, kind: Any, value: Any, command: str) -> str:
    """Advice on how a value is given, where it is no word."""
    if described(kind).startswith("a list"):
        one_or_more = str(value) if re.fullmatch(r"[\w.,: +-]+", str(value)) else "one,two"
        return f"write a list as '[{one_or_more}]'"
    return (
        f"give its options as --{key}.OPTION VALUE" if described(kind) == "a mapping" else f"{command} --help says more"
    )


def _option_meant(name: str, options: Iterable[str], dashes: str = "--") -> str:
    """The option that a misspelt one comes nearest to, as a question, or those of its group; empty if there is none."""
    known = [option.lstrip("-") for option in options if option.startswith("--") and not option.endswith(".help")]
    name = name.lstrip("-")
    root, dot, rest = name.partition(".")
    roots = {option.partition(".")[0] for option in known}
    if dot and root not in roots:
        return did_you_mean(root, roots, dashes).replace("?", f".{rest}?")
    if dot and (members := [option.partition(".")[2] for option in known if option.startswith(f"{root}.")]):
        few = f"{dashes}{root} has {', '.join(members)}" if len(members) <= _FEW else ""
        return did_you_mean(rest, members, f"{dashes}{root}.") or few
    inside = [option for option in known if option.rpartition(".")[2] == name]  # --gamma for --nsgd.gamma
    return did_you_mean(inside[0] if inside else name, known, dashes)


def _options(parser: ArgumentParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--")]


def _type(parser: ArgumentParser, option: str) -> Any:
    """The type of an option's values; None where it has none, as a config file."""
    return getattr(parser._option_string_actions.get(option), "_typehint", None)


def _state(path: Any) -> str:
    return "cannot be read as one" if os.path.isfile(str(path)) else "does not exist"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _last(kind: Any) -> str:
    return str(kind).rpartition(".")[2]
