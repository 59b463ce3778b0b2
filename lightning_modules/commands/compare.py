"""``nsgd compare``: its options, and what it prints."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from rich.console import Console

from lightning_modules.commands.from_data import FROM_DATA, OWN_DATA, link_to_data, model_class, own_model
from lightning_modules.commands.parsing.given_options import given_options
from lightning_modules.commands.parsing.parser import Parser, parse
from lightning_modules.commands.sigterm import watched
from lightning_modules.data.characters import Characters
from lightning_modules.data.images import ImageData
from lightning_modules.report.study.report import print_table, write_report
from lightning_modules.report.study.series import write_series
from lightning_modules.study.compare import run_one, run_study, serve_runs
from lightning_modules.study.options import NAMED, Study
from lightning_modules.study.runs.launch import Launcher
from lightning_modules.support.nearest import meant
from lightning_modules.support.progress import progress_bar
from lightning_modules.support.study_folder import check_series

_DESCRIPTION = "Train every method with every seed, and compare."
_REGIMES = ("digits-32", "digits-1024")  # the studies that are made where none is named


def run_compare_command(argv: list[str]) -> int:
    """``nsgd compare``: make a study, or one run of it, or where none is named small and large batches of digits.

    Returns 1 where a run died twice.

    Raises:
        ValueError: In one sentence, if the options are bad.
    """
    argv = _in_two_words(argv)
    if not set(argv[::2]) <= {"--out", "--jobs"} or len(argv) % 2:
        return _compare(argv)
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    out = Path(options.pop("--out", "nsgd-compare"))
    check_series(out, _REGIMES)
    rest = [word for option in options.items() for word in option]
    died = [_compare([study, "--out", str(out / study), *rest]) for study in _REGIMES]
    both = write_series(out / "report.html", [out / study for study in _REGIMES])
    Console().print(f"Both: {both}", soft_wrap=True, markup=False)
    return max(died)


def _compare(argv: list[str]) -> int:
    parser = Parser(prog="nsgd compare [STUDY]", description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument("--out", type=Path, default=Path("nsgd-compare"), help="folder for results and report")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, in as many processes")
    parser.add_argument("--launcher", type=Launcher, default="local", help="local, or ray for tasks of a Ray cluster")
    parser.add_argument("--run", type=int, help="make this run of the study alone, by its number from 0 on")
    help_ = (
        "make the runs whose numbers come on standard input, while it is open; --jobs starts its processes with this"
    )
    parser.add_argument("--worker", action="store_true", help=help_)
    parser.add_class_arguments(Study, skip={"model", "data_config"})
    help_ = "LightningModule that is trained, in place of our Classifier with the network --net, as in nsgd fit"
    parser.add_subclass_arguments(pl.LightningModule, "model", required=False, instantiate=False, help=help_)
    argv = _with_study(argv)
    parsed, study = _study(parser, argv)
    if parsed.worker:
        serve_runs(study, parsed.out, watched)
        return 0
    console = Console()

    def say(words: str) -> None:
        console.print(words, markup=False, highlight=False, soft_wrap=True)

    with progress_bar(console) as update:
        if parsed.run is not None:
            name = run_one(study, parsed.out, parsed.run, watched(update))
            say(f"{parsed.out / name} is finished; without --run the same command makes the others, and the report")
            return 0
        died = run_study(study, parsed.out, watched(update), jobs=parsed.jobs, launcher=parsed.launcher, say=say)
    report = write_report(parsed.out)
    print_table(parsed.out, console)
    console.print(f"Report: {report}", soft_wrap=True, markup=False)
    return 1 if died else 0


def _study(parser: Parser, argv: list[str]) -> tuple[Namespace, Study]:
    """A command line, and the study that it means; what its model takes from the data is filled in."""
    given = given_options(argv)
    our_model, kind = own_model(given), model_class(given)
    data = None if our_model is None else OWN_DATA[our_model].__name__
    parser.set_defaults({"data": data and {"class_path": data}})
    if given.get("model") and kind is not None:
        link_to_data(parser, kind, given)
    named = {"data": given.get("data") or data, "model": given.get("model")}
    parsed = parse(parser, argv, "nsgd compare", {option: name for option, name in named.items() if name})
    values = parser.instantiate_classes(parsed)
    plain = yaml.safe_load(parser.dump(parsed))  # as a file has it, without what is linked
    model = plain.get("model")
    if model is not None:
        linked = {name: value for name, value in (values.model.get("init_args") or {}).items() if name in FROM_DATA}
        model = {**model, "init_args": {**linked, **(model.get("init_args") or {})}}
    # Ours say what they were made with, in a form that does for any folder; other classes need not.
    config = None if isinstance(values.data, ImageData | Characters | None) else plain["data"]
    options = {f.name: values[f.name] for f in fields(Study) if f.name not in ("model", "data_config")}
    return parsed, Study(**options, model=model, data_config=config)


def _in_two_words(argv: list[str]) -> list[str]:
    """Options that are looked for here, as --config FILE where they came as --config=FILE."""
    options = ("--config=", "--data=", "--model=", "--out=", "--jobs=")
    words = [word.split("=", 1) if word.startswith(options) else [word] for word in argv]
    return [part for parts in words for part in parts]


def _classes_first(argv: list[str]) -> list[str]:
    """The classes of data and model before their options, which are read as those of the class so far."""
    for option in ("--model", "--data"):
        at = next((i for i, word in enumerate(argv[:-1]) if word == option), None)
        argv = argv if at is None else [*argv[at : at + 2], *argv[:at], *argv[at + 2 :]]
    return argv


def _with_study(argv: list[str]) -> list[str]:
    """Options in which the name of a study has become its file; without one, digits, unless they say otherwise."""
    if argv and not argv[0].startswith("-"):
        named_file = NAMED / f"{argv[0]}.yaml"
        if not os.path.exists(named_file) and not os.path.isfile(argv[0]):
            names = sorted(path.stem for path in NAMED.glob("*.yaml"))
            is_file = Path(argv[0]).suffix in (".yaml", ".yml")
            which = "which does not exist" if is_file else "which is neither"
            raise ValueError(
                f"expected STUDY to be {', '.join(names)}, or a YAML file, got {argv[0]!r}, {which}"
                f"{meant(argv[0], names)}"
            )
        return ["--config", str(named_file) if os.path.exists(named_file) else argv[0], *_classes_first(argv[1:])]
    if any(word.split("=")[0] in ("--data", "--net", "--model", "--config") for word in argv):
        return argv if "--config" in argv else _classes_first(argv)
    return ["--config", str(NAMED / "digits.yaml"), *argv]
