"""What jsonargparse says of bad input, which is a list of all types that a value is not of, as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class BadOption(ValueError):
    """What a parser, or one inside it, complains of, in jsonargparse's words."""

    options: tuple[str, ...] = ()  # that there are


_PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "dict": "a mapping"}
_LIST = "{} --help lists the options"


def one_sentence(
    message: str, *, command: str, options: Iterable[str] = (), classes: Mapping[str, str] | None = None
) -> str:
    """What was expected, what was got and what to do.

    Args:
        message: Of jsonargparse 4; where it is of no known form it stays as it is, on one line.
        command: The command, for what to do.
        options: The options that there are, to find what a misspelt one was meant to be.
        classes: Option to the class that it names, for the options of these.
    """
    said = " ".join(message.split())
    key = ".".join(re.findall(r'Parser key "([^"]+)"', said))
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", said):
        return f"expected an option of {command}, got {found[1]}; {_meant(found[1], options) or _LIST.format(command)}"
    if found := re.search(r"Option '([^']+)' is not accepted", said):
        if not key:  # of a file
            name, known = found[1], [option.lstrip("-") for option in options]
            return f"expected an option of {command}, got {name}; {_meant(name, known) or _LIST.format(command)}"
        name = (classes or {}).get(key)
        if name is None:
            return f"expected --{key} CLASS before an option of it, got --{key}.{found[1]}; name the class"
        return f"expected an option of {name}, got --{key}.{found[1]}; {command} --{key}.help {name} lists them"
    if found := re.search(r"arguments are required: ([\w., ]+)", said):
        names = [name.strip() for name in found[1].split(",")]
        wanted = ", ".join(f"--{key}.{name}" if key else f"--{name.partition('.')[2]}" for name in names)
        return f"expected {wanted}{_for_class(said)}, got none; give it"
    if found := re.search(r"Problem with given class_path '([^']+)': (.+?)(?= - Expected a| Given value)", said):
        return f"expected --{key} to be a class that can be imported and made, got {found[1]!r}: {found[2]}"
    if found := re.search(r"does not correspond to a subclass.* (?:Given|Got) value: (\S+)$", said):
        kind = re.search(r"Subtypes: \[<class '(?:\w+\.)*(\w+)'>", said)
        wanted = kind[1] if kind else "class of its kind"
        return f"expected --{key} to be a {wanted}, got {found[1]!r}, which is none"
    if found := re.search(r"argument (--[\w.]+): expected one argument", said):
        return f"expected a value after {found[1]}, got none; give one, or '{{}}' for the defaults of a mapping"
    choices = re.findall(r"Expected a typing\.Literal\[(.+?)\](?:\.| -| Given)", said)
    plain = [_PLAIN[name] for name in re.findall(r"Expected an? <class '(\w+)'>", said) if name in _PLAIN]
    if choices or plain:
        way = f"give its options as --{key}.OPTION VALUE" if plain == ["a mapping"] else f"{command} --help says more"
        return f"expected --{key} to be {' or '.join([*choices, *plain])}, got {_got(said)!r}; {way}"
    if found := re.search(r"Expected a dot import path string: (\S+)", said):
        return (
            f"expected --{key} to be a class by its import path, such as module.Class, or a known one by its name, "
            f"got {found[1]!r}; {command} --help all lists known ones"
        )
    if not key:
        return f"{said}; {_LIST.format(command)}"
    return re.sub(r'^Parser key "([^"]+)":', r"bad --\1:", said)


def _meant(name: str, options: Iterable[str]) -> str:
    """The option that a misspelt one comes nearest to, as a question; empty if there is none."""
    known = [option for option in options if not option.endswith(".help")]
    roots = {option.partition(".")[0] for option in known}
    root, dot, rest = name.partition(".")
    near = get_close_matches(name, known, n=1) if root in roots or not dot else get_close_matches(root, roots, n=1)
    return f"did you mean {near[0] if root in roots or not dot else near[0] + dot + rest}?" if near else ""


def _got(said: str) -> str:
    found = re.search(
        r"NestedArg\(key='[^']*', val='(.*?)'\)|Got value: (\S+)|Given value: (.+?)(?= - Expected a|$)", said
    )
    return next((group for group in found.groups() if group is not None), "") if found else ""


def _for_class(said: str) -> str:
    found = re.search(r"class_path='(?:\w+\.)*(\w+)'", said)
    return f", which {found[1]} needs" if found else ""
