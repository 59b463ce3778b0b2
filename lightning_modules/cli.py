"""The ``nsgd`` command: ``fit``, ``validate``, ``test`` and ``predict`` by LightningCLI, ``compare``, ``escape``."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
from jsonargparse import ArgumentParser
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import nsgd
from lightning_modules import Classifier, Digits, HuggingFace, RefreshDirections  # noqa: F401 (names for --data)
from lightning_modules.callbacks import make_measurements
from lightning_modules.callbacks.predictions import WritePredictions
from lightning_modules.compare import Study, ignore_lightning_noise, run_study, total_runs
from lightning_modules.data import ImageData
from lightning_modules.escape import EscapeStudy, run_escape
from lightning_modules.escape_report import print_escape, write_escape
from lightning_modules.report import print_table, write_report
from lightning_modules.trajectory_report import write_measurements
from nsgd.damping import Damped

HELP = """usage: nsgd COMMAND [options]

NSGD, Nudged SGD: SGD that steps less along the sharpest directions of the loss.

  compare    compare NSGD with SGD, and with weight averages, on real data: a table and a report
  escape     let SGD, and NSGD, escape from a minimum, and compare with theory: a table and a report
  fit        train a classifier with NSGD or any other optimizer
  validate   evaluate a checkpoint on the validation images
  test       evaluate a checkpoint on the test images
  predict    class probabilities of the test images

nsgd COMMAND --help shows the options of a command."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0; 2 for bad input, said in one sentence; 130 if interrupted."""
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    try:
        if argv[0] == "compare":
            _compare(argv[1:])
        elif argv[0] == "escape":
            _escape(argv[1:])
        elif argv[0] in LightningCLI.subcommands():
            _lightning(argv)
        else:
            raise ValueError(
                f"expected a command among compare, {', '.join(LightningCLI.subcommands())}, escape, got {argv[0]!r}"
            )
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interrupt of its own loop into an exit.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        again = "; the same command keeps the finished runs and goes on" if argv[0] in ("compare", "escape") else ""
        print(f"nsgd: interrupted{again}", file=sys.stderr)
        return 130
    except MisconfigurationException as error:
        print(f"nsgd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        print(
            "nsgd: the checkpoint is of another network or data set; give the options that it was trained with, for "
            "example --config lightning_logs/version_0/config.yaml",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        said = _ours(error)
        if said is None:
            raise
        print(f"nsgd: {said}", file=sys.stderr)
        return 2
    return 0


def _ours(error: BaseException | None) -> BaseException | None:
    """What the project itself raised to say what is wrong with its input, however wrapped; else it is a fault."""
    packages = (Path(__file__).parent, Path(nsgd.__file__).parent)
    while error is not None:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, ValueError) and any(raised_in.is_relative_to(package) for package in packages):
            return error
        error = error.__cause__ or error.__context__
    return None


# -- compare and escape ------------------------------------------------------------------------------------------


def _complain(message: str) -> NoReturn:
    """Say what a parser complains of in one sentence, as every other bad input."""
    said = " ".join(message.split())
    if 'key "data"' in said and "required: path" in said:
        said = "HuggingFace expected --data.path, a name on the hub or a local folder, got none"
    elif 'key "data"' in said:
        said = f"expected --data to be Digits or HuggingFace, or the import path of an ImageData class: {said}"
    raise ValueError(said if "--help" in said else f"{said}; nsgd COMMAND --help lists the options")


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _complain(message)


def _compare(argv: list[str]) -> None:
    parser = _Parser(prog="nsgd compare", description="Train every method with every seed, and compare.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument("--out", type=Path, default=Path("nsgd-compare"), help="folder for results and report")
    parser.add_class_arguments(Study)
    parser.set_defaults({"data": {"class_path": "Digits"}})
    parsed = parser.parse_args(argv)
    values = parser.instantiate_classes(parsed)
    study = Study(**{field.name: values[field.name] for field in fields(Study)})
    console = Console()
    runs = total_runs(study)
    with _progress_bar(console) as update:

        def progress(name: str, done: int, loss: float | None) -> None:
            run = min(runs, 1 + done // study.steps)
            said = None if loss is None else f"loss {loss:.3f}"
            update(f"run {run} of {runs}: {name}", done, runs * study.steps, said)

        run_study(study, parsed.out, progress)
    report = write_report(parsed.out)
    print_table(parsed.out, console)
    console.print(f"Report: {report}", soft_wrap=True)


def _escape(argv: list[str]) -> None:
    parser = _Parser(prog="nsgd escape", description="Let SGD escape from a minimum, and compare with theory.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument("--out", type=Path, default=Path("nsgd-escape"), help="folder for results and report")
    parser.add_class_arguments(EscapeStudy)
    parsed = parser.parse_args(argv)
    study = EscapeStudy(**{field.name: parsed[field.name] for field in fields(EscapeStudy)})
    console = Console()
    with _progress_bar(console) as update:
        run_escape(study, parsed.out, update)
    report = write_escape(parsed.out)
    print_escape(parsed.out, console)
    console.print(f"Report: {report}", soft_wrap=True)


@contextlib.contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[str, int, int, str | None], None]]:
    """A bar of steps; it is updated with what is running, steps done, steps in all, and how that stands."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[said]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)
    task = progress.add_task("", said="")

    def update(name: str, done: int, total: int, said: str | None) -> None:
        progress.start()  # not before: bad input is said without a bar
        progress.update(task, completed=done, total=total, description=name)
        if said is not None:
            progress.update(task, said=said)

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


# -- fit, validate, test, predict --------------------------------------------------------------------------------


class _RefreshIfDamped(RefreshDirections):
    """The callback for a command that also takes optimizers without directions."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(optimizer, Damped) for optimizer in trainer.optimizers):
            super().on_train_start(trainer, pl_module)


class _LightningParser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _complain(message)


class _Commands(LightningCLI):
    """LightningCLI on our data and classifier, with refreshes for any damped optimizer."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _LightningParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="Path to a configuration file in json or yaml format."
        )
        return parser

    def before_instantiate_classes(self) -> None:
        path = self.config[self.subcommand].get("ckpt_path") if self.subcommand else None
        if not path and self.subcommand != "fit":
            raise ValueError(f"expected --ckpt_path, the checkpoint to {self.subcommand}, got none")
        if path and path not in ("best", "last", "hpc") and "://" not in path and not Path(path).exists():
            raise ValueError(f"expected --ckpt_path to be a checkpoint file, got {path!r}, which does not exist")

    def before_fit(self) -> None:
        names = [name.strip() for name in self._chosen("measure").split(",") if name.strip()]
        self._measurements = make_measurements(names, overhead=self._chosen("measure_overhead"))
        self.trainer.callbacks[:0] = self._measurements  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        if any(measurement.rows for measurement in self._measurements) and self.trainer.is_global_zero:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
            print(f"Measurements: {write_measurements(folder, title='Measured during training')}")

    def _chosen(self, name: str) -> Any:
        return self.config[self.subcommand][name]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help_ = "with fit: what to measure on the way, any of sharpness,valley,quadratic,averaging, or all"
        parser.add_argument("--measure", type=str, default="", help=help_)
        help_ = "gradients that each measurement may cost for each gradient of training"
        parser.add_argument("--measure_overhead", type=float, default=0.15, help=help_)
        parser.add_lightning_class_args(_RefreshIfDamped, "refresh")
        parser.add_lightning_class_args(WritePredictions, "predictions")
        parser.link_arguments("data.input_shape", "model.input_shape", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "."}}
        parser.set_defaults({"data": "Digits", "trainer.logger": logger})
        parser.set_defaults({"trainer.max_epochs": 20, "trainer.log_every_n_steps": 5})


def _lightning(argv: list[str]) -> None:
    ignore_lightning_noise()
    # That is what --optimizer is for.
    warnings.filterwarnings("ignore", ".*configure_optimizers. will be overridden by.*")
    # Every command logs to a folder of its own, so that nothing is overwritten.
    warnings.filterwarnings("ignore", "The dirpath has changed from.*")
    found = sys.argv
    sys.argv = ["nsgd", *argv]  # LightningCLI takes its program name from there, and warns of arguments that differ
    try:
        _Commands(Classifier, ImageData, subclass_mode_data=True, seed_everything_default=0)
    finally:
        sys.argv = found
