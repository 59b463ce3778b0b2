"""``nsgd escape``: its options, and what it prints."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from rich.console import Console

from lightning_modules.commands.parsing.parser import Parser, parse
from lightning_modules.commands.sigterm import watched
from lightning_modules.report.escape.report import print_escape, write_escape
from lightning_modules.study.escape import EscapeStudy, run_escape
from lightning_modules.support.progress import progress_bar


def run_escape_command(argv: list[str]) -> int:
    """``nsgd escape``: let walkers escape, and report.

    Raises:
        ValueError: In one sentence, if the options are bad.
    """
    parser = Parser(prog="nsgd escape", description="Let SGD escape from a minimum, and compare with theory.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument("--out", type=Path, default=Path("nsgd-escape"), help="folder for results and report")
    parser.add_class_arguments(EscapeStudy)
    parsed = parse(parser, argv, "nsgd escape")
    study = EscapeStudy(**{field.name: parsed[field.name] for field in fields(EscapeStudy)})
    console = Console()
    with progress_bar(console) as update:
        run_escape(study, parsed.out, watched(update))
    report = write_escape(parsed.out)
    print_escape(parsed.out, console)
    console.print(f"Report: {report}", soft_wrap=True, markup=False)
    return 0
