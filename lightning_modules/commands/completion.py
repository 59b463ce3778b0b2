"""Tab completion of the ``nsgd`` command: a script for a shell, from the parsers of the commands themselves."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, capture_parser

import nsgd
from lightning_modules.commands.compare import run_compare_command
from lightning_modules.commands.escape import run_escape_command
from lightning_modules.commands.fit import run_lightning
from lightning_modules.commands.parsing.types import choices_of, described, known_classes
from lightning_modules.study.options import NAMED
from lightning_modules.support.import_paths import HOMES, public

SHELLS = ("bash", "zsh")


def completion_script(shell: str) -> str:
    """The script that a shell sources to complete commands, options, classes, choices, studies and files.

    Raises:
        ValueError: If the shell is not bash or zsh, or the package shtab is missing.
    """
    if shell not in SHELLS:
        raise ValueError(f"expected --print-completion to be {' or '.join(SHELLS)}, got {shell!r}")
    try:
        import shtab
    except ImportError:
        raise ValueError("--print-completion needs the package shtab; pip install shtab") from None
    root = argparse.ArgumentParser(prog="nsgd")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for name, parser in _parsers().items():
        command = commands.add_parser(name, help=(parser.description or "").partition(". ")[0])
        if name == "compare":
            studies = sorted(path.stem for path in NAMED.glob("*.yaml"))
            command.add_argument("study", nargs="?", choices=studies, help="a study by its name")
        for option, help_, kind in _options(parser):
            action = command.add_argument(option, help=help_.replace("%", "%%"), choices=_words(kind))
            if kind is None or _is_path(kind):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # which shtab looks for
    return str(shtab.complete(root, shell))


def _parsers() -> Mapping[str, ArgumentParser]:
    lightning = capture_parser(run_lightning, ["fit"])
    (commands,) = (action for action in lightning._actions if isinstance(action, argparse._SubParsersAction))
    return {
        "compare": capture_parser(run_compare_command, []),
        "escape": capture_parser(run_escape_command, []),
        **commands.choices,
    }


def _options(parser: ArgumentParser) -> Iterator[tuple[str, str, Any]]:
    """Option, help and type, those of classes of ours among them."""
    of_classes: dict[str, Any] = {}
    known = parser._option_string_actions
    for option, action in known.items():
        kind = getattr(action, "_typehint", None)
        if not option.startswith("--") or option.endswith((".help", "+")) or option == "--help":
            continue
        yield option, (action.help or "").partition(". ")[0], kind
        for name in known_classes(kind):
            one = public(name) if name in HOMES else getattr(nsgd, name, None)
            if isinstance(one, type):
                of_classes |= {f"{option}.{parameter}": name for parameter in inspect.signature(one).parameters}
    for option, name in of_classes.items():
        if option not in known:
            yield option, f"of {name}", str


def _words(kind: Any) -> list[str] | None:
    """Words that may be typed for a type, where they are known."""
    if kind is bool:
        return ["true", "false"]
    if kind is None or _is_path(kind) or described(kind).startswith(("a list", "a mapping")):
        return None
    return [*choices_of(kind), *sorted(known_classes(kind))] or None


def _is_path(kind: Any) -> bool:
    return Path in (kind, *get_args(kind))
