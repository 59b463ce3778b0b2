"""``nsgd compare`` and ``nsgd escape``: their options, and what they print."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from lightning_modules import Digits, HuggingFace  # noqa: F401 (names for --data)
from lightning_modules.compare import run_one, run_study
from lightning_modules.complaints import BadOption, one_sentence
from lightning_modules.escape import EscapeStudy, run_escape
from lightning_modules.escape_report import print_escape, write_escape
from lightning_modules.launch import Launcher
from lightning_modules.progress import progress_bar
from lightning_modules.report import print_table, write_report
from lightning_modules.study import Study

_DESCRIPTION = "Train every method with every seed, and compare."


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise BadOption(message) from ex


def _parsed(parser: _Parser, argv: list[str], command: str, given: str = "") -> Namespace:
    try:
        return parser.parse_args(argv)
    except BadOption as error:
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        said = one_sentence(str(error), command=command, options=options, classes={"data": given})
        raise ValueError(said) from error


def run_compare_command(argv: list[str]) -> int:
    """``nsgd compare``: make a study, or one run of it; 1 where a run died twice.

    Raises:
        ValueError: In one sentence, if the options are bad.
    """
    parser = _Parser(prog="nsgd compare [STUDY]", description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument("--out", type=Path, default=Path("nsgd-compare"), help="folder for results and report")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--launcher", type=Launcher, default="local", help="local, or ray for tasks of a Ray cluster")
    parser.add_argument("--run", type=int, help="make this run of the study alone, by its number from 0 on")
    parser.add_class_arguments(Study)
    parser.set_defaults({"data": {"class_path": "Digits"}})
    given = next((b for a, b in pairwise(argv) if a == "--data"), "Digits")
    parsed = _parsed(parser, _with_study(argv), "nsgd compare", given)
    values = parser.instantiate_classes(parsed)
    study = Study(**{field.name: values[field.name] for field in fields(Study)})
    console = Console()
    with progress_bar(console) as update:
        if parsed.run is not None:
            run_one(study, parsed.out, parsed.run, update)
            return 0

        def say(words: str) -> None:
            console.print(words, markup=False, highlight=False, soft_wrap=True)

        died = run_study(study, parsed.out, update, jobs=parsed.jobs, launcher=parsed.launcher, say=say)
    report = write_report(parsed.out)
    print_table(parsed.out, console)
    console.print(f"Report: {report}", soft_wrap=True)
    return 1 if died else 0


def _data_first(argv: list[str]) -> list[str]:
    """The class of the data before its options, which are read as those of the class so far."""
    at = next((i for i, word in enumerate(argv[:-1]) if word == "--data"), None)
    return argv if at is None else [*argv[at : at + 2], *argv[:at], *argv[at + 2 :]]


def _with_study(argv: list[str]) -> list[str]:
    """Options in which the name of a study has become its file; without one, digits, unless they say otherwise."""
    if argv and not argv[0].startswith("-"):
        own = Path(__file__).parent / "studies" / f"{argv[0]}.yaml"
        if not own.exists() and not Path(argv[0]).is_file():
            names = ", ".join(sorted(path.stem for path in own.parent.glob("*.yaml")))
            raise ValueError(f"expected STUDY to be {names}, or a YAML file, got {argv[0]!r}, which is neither")
        return ["--config", str(own if own.exists() else argv[0]), *_data_first(argv[1:])]
    if any(word.split("=")[0] in ("--data", "--net", "--config") for word in argv):
        return argv if "--config" in argv else _data_first(argv)
    return ["--config", str(Path(__file__).parent / "studies" / "digits.yaml"), *argv]


def run_escape_command(argv: list[str]) -> int:
    """``nsgd escape``: let walkers escape, and report.

    Raises:
        ValueError: In one sentence, if the options are bad.
    """
    parser = _Parser(prog="nsgd escape", description="Let SGD escape from a minimum, and compare with theory.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument("--out", type=Path, default=Path("nsgd-escape"), help="folder for results and report")
    parser.add_class_arguments(EscapeStudy)
    parsed = _parsed(parser, argv, "nsgd escape")
    study = EscapeStudy(**{field.name: parsed[field.name] for field in fields(EscapeStudy)})
    console = Console()
    with progress_bar(console) as update:
        run_escape(study, parsed.out, update)
    report = write_escape(parsed.out)
    print_escape(parsed.out, console)
    console.print(f"Report: {report}", soft_wrap=True)
    return 0
