"""``nsgd fit``, ``validate``, ``test`` and ``predict``: LightningCLI for any LightningModule, with NSGD in it."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import distributed

from lightning_modules.callbacks.evaluation_weights import EvaluationWeights
from lightning_modules.callbacks.measurements import MEASUREMENTS, make_measurements
from lightning_modules.callbacks.predictions import WritePredictions
from lightning_modules.callbacks.refresh import RefreshDirections
from lightning_modules.callbacks.write_averages import WriteAverages
from lightning_modules.commands.checkpoint import CheckCheckpoint, check_path
from lightning_modules.commands.from_data import OWN_DATA, is_called, link_to_data, model_class, own_model, path_of
from lightning_modules.commands.parsing.complaints import BadOption, one_sentence
from lightning_modules.commands.parsing.given_options import given_options
from lightning_modules.commands.parsing.parser import Parser, name_publicly, refuse_nulls
from lightning_modules.models.classifier import Classifier
from lightning_modules.report.measurements.report import write_measurements
from lightning_modules.support.files import unused
from lightning_modules.support.quiet import ignore_lightning_noise
from nsgd import NSGD, damp
from nsgd.damping.step import Damped
from nsgd.options import FROM_TRAINING, DampingOptions

_ADDRESS = re.compile(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-f]+>")  # how Python writes an object without a name

_LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
_ABOVE_ZERO = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
_APART = ("ddp_spawn", "ddp_fork", "ddp_notebook")
_DAMP_OPTIONS = [field.name for field in fields(DampingOptions)]


def run_lightning(argv: list[str]) -> None:
    """Run one of the four commands: its name, then its options.

    Raises:
        ValueError: In one sentence, if the options are bad.
    """
    ignore_lightning_noise()
    # LightningCLI warns of what --optimizer is for; here it is said, and to users' own modules only.
    warnings.filterwarnings("ignore", ".*configure_optimizers. will be overridden by.*")
    # Every command logs to a folder of its own, so that nothing is overwritten.
    warnings.filterwarnings("ignore", "The dirpath has changed from.*")
    with _process_group_ended():
        _Commands(argv)


@contextmanager
def _process_group_ended() -> Iterator[None]:
    """End the group of processes that a run has begun: left to Python's end, gloo's threads may abort the process."""
    there = distributed.is_available() and distributed.is_initialized()
    yield
    # Not after an error: other processes may still wait for this one.
    if not there and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class _Commands(LightningCLI):
    """LightningCLI, with our data as a default for our models and refreshes for any damped optimizer."""

    def __init__(self, argv: list[str]) -> None:
        self.given = given_options(argv)
        super().__init__(
            parser_class=_Parser,
            parser_kwargs={"prog": "nsgd"},
            save_config_callback=_SaveConfig,
            subclass_mode_model=True,
            seed_everything_default=0,
            args=argv,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help_ = f"damp whatever optimizer there is: options of nsgd.damp, {', '.join(_DAMP_OPTIONS)}"
        parser.add_argument("--damp", type=dict[str, Any] | None, help=help_)
        help_ = f"with fit: what to measure on the way, any of {','.join(MEASUREMENTS)}, or all"
        parser.add_argument("--measure", type=str, default="", help=help_)
        help_ = "gradients that each measurement may cost for each gradient of training"
        parser.add_argument("--measure_overhead", type=float, default=0.15, help=help_)
        parser.add_lightning_class_args(_RefreshIfDamped, "refresh")
        parser.add_lightning_class_args(WritePredictions, "predictions")
        logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "."}}
        parser.set_defaults({"trainer.logger": logger, "trainer.max_epochs": 20, "trainer.log_every_n_steps": 5})
        # Not beside a class that is given: jsonargparse would hand it the options of the default, such as lr.
        own = own_model(self.given)
        data = None if own is None else path_of(OWN_DATA[own])
        defaults = {"model": path_of(Classifier), "data": data}
        parser.set_defaults({key: value for key, value in defaults.items() if key not in self.given})
        kind = model_class(self.given)
        if kind is not None and self.given.get("data", data) is not None:
            link_to_data(parser, kind, self.given)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """In place of LightningCLI's, which warns of what else stands in ``sys.argv``."""
        try:
            self.config = parser.parse_args(args)
        except BadOption as error:
            own = own_model(self.given)
            classes = {"model": own.__name__, "data": OWN_DATA[own].__name__} if own else {}
            given = {**classes, **given_options(args, of_files=())}
            options = [*self._subcommand_parsers[args[0]]._option_string_actions]
            options += [f"--optimizer.{name}" for name in inspect.signature(NSGD).parameters]
            said = one_sentence(error, command=f"nsgd {args[0]}", given=given, options=options)
            raise ValueError(said) from error
        refuse_nulls(self._subcommand_parsers[args[0]], self.config[args[0]], given_options(args, of_files=()))
        name_publicly(self.config)

    def before_instantiate_classes(self) -> None:
        check_path(self._chosen("ckpt_path"), str(self.subcommand))
        model = self._chosen("model").class_path
        if "model" not in self.given and not is_called(Classifier, model):  # of the checkpoint
            raise ValueError(
                f"the checkpoint is of {model}; give the options that it was trained with, for example --config "
                "lightning_logs/version_0/config.yaml"
            )
        unknown = [name for name in self._chosen("damp") or {} if name not in _DAMP_OPTIONS]
        if unknown:
            raise ValueError(f"expected options of --damp among {', '.join(_DAMP_OPTIONS)}, got {', '.join(unknown)}")
        for name in _ABOVE_ZERO:  # by which Lightning divides
            if self._chosen("trainer").get(name) == 0:
                raise ValueError(f"expected --trainer.{name} above 0, got 0; leave it out for its default")
        clip = self._chosen("trainer").get("gradient_clip_val")
        if clip is not None and clip < 0:  # it would turn the gradients round
            raise ValueError(f"expected --trainer.gradient_clip_val of at least 0, got {clip}; give another")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            missing_package = _find(error, ImportError)
            if missing_package is None:
                raise
            said = " ".join(str(missing_package).split())
            raise ValueError(f"expected a package that is not installed: {said}") from error
        chosen = vars(self.model).get("configure_optimizers")  # LightningCLI's, for --optimizer
        if self.subcommand == "fit" and self._trained_apart and isinstance(chosen, MethodType):
            # A bound method is pickled by its name, and found again as that of the class: another one would train.
            self.model.configure_optimizers = partial(chosen.__func__, self.model)
        loader = _LOADERS[str(self.subcommand)]
        if self.datamodule is None and not is_overridden(loader, self.model):
            raise ValueError(f"expected --data, as {type(self.model).__name__} has no {loader} of its own, got none")
        if self.subcommand == "fit" and self._chosen("optimizer") and not isinstance(self.model, tuple(OWN_DATA)):
            rank_zero_info(
                f"--optimizer takes the place of {type(self.model).__name__}.configure_optimizers and its schedules; "
                "--damp would keep them"
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            said = _ADDRESS.sub(r"\1", " ".join(str(error).split()))
            raise ValueError(f"bad --trainer options: {said}") from error
        check = CheckCheckpoint(self._chosen("ckpt_path"), str(self.subcommand))
        trainer.callbacks.insert(0, check)  # type: ignore[attr-defined]  # set by its connector
        return trainer

    def before_fit(self) -> None:
        names = [name.strip() for name in self._chosen("measure").split(",") if name.strip()]
        self._measurements = make_measurements(names, overhead=self._chosen("measure_overhead"))
        self._callbacks[:0] = self._measurements
        for callback in self._callbacks:
            if isinstance(callback, _RefreshIfDamped):
                callback.asked = any(name.startswith("refresh.") for name in self.given)
        self._callbacks.insert(0, EvaluationWeights())  # first, so that WriteAverages ends with what it leaves
        if self._chosen("damp") is not None:
            self._callbacks.insert(0, _Damp(self._chosen("damp")))

    def after_fit(self) -> None:
        averages = [callback for callback in self._callbacks if isinstance(callback, WriteAverages)]
        if self._trained_apart and (averages or self._measurements):
            rank_zero_info(
                f"--trainer.strategy {self._chosen('trainer')['strategy']} trains in processes that have ended: the "
                "tables and averages are written, a page of the one and a validation of the other --trainer.strategy "
                "ddp makes"
            )
            return
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asks all processes
        if self.trainer.is_global_zero:
            self._report(folder)
        for callback in averages:
            self._validate_averages(callback)

    @property
    def _trained_apart(self) -> bool:
        """Whether the callbacks of this process have seen nothing of the training."""
        return str(self._chosen("trainer").get("strategy")).removesuffix("_find_unused_parameters_true") in _APART

    def _report(self, folder: Path) -> None:
        files = {measurement.name: measurement.table.file for measurement in self._measurements if measurement.rows}
        written = {name: path for name, path in files.items() if path is not None}
        if written:
            optimizers = ", ".join(type(optimizer).__name__ for optimizer in self.trainer.optimizers)
            title = (
                f"{type(self.model).__name__} with {optimizers}, {self.trainer.global_step} steps: what was measured"
            )
            saved = (folder / c.config_filename for c in self._callbacks if isinstance(c, _SaveConfig))
            config = next((path for path in saved if path.exists()), None)
            print(f"Measurements: {write_measurements(folder, written, title=title, config=config)}")

    def _validate_averages(self, averages: WriteAverages) -> None:
        """Log what validation says of each read-out as ``ema/val_loss`` and the like, and print it."""
        loggers, step = self.trainer.loggers, self.trainer.global_step
        logged: dict[str, float] = {}
        validates = self.trainer.enable_validation
        self.trainer.loggers = []  # they would take the plain names for those of the last weights
        for name, path in reversed(averages.paths.items()):  # the last weights at the end: they stay in the module
            self.model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["state_dict"])
            found = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False) if validates else []
            metrics = {key: value for loader in found for key, value in loader.items()}
            logged |= {f"{name}/{key}": value for key, value in metrics.items()}
            rank_zero_info(f"{path}: {', '.join(f'{key} {value:.4g}' for key, value in metrics.items())}")
        self.trainer.loggers = loggers
        for logger in loggers:
            logger.log_metrics(logged, step=step)
            logger.save()

    @property
    def _callbacks(self) -> list[pl.Callback]:
        found: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        return found

    def _chosen(self, name: str) -> Any:
        return self.config[self.subcommand][name]


class _Parser(Parser, LightningArgumentParser):
    """Lightning's, which says what is wrong as those of the other commands do."""


class _SaveConfig(SaveConfigCallback):
    """Beside an earlier config.yaml, which a run without a logger meets, not in its place and not refusing to run."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # asks all processes
        if folder is not None and not self.already_saved:
            self.config_filename = unused(Path(folder) / self.config_filename).name
        super().setup(trainer, pl_module, stage)


class _RefreshIfDamped(RefreshDirections):
    """The callback for a command that also takes optimizers without directions, or with those of training gradients."""

    asked = False  # whether the command line has options of it

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        damped = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Damped)]
        refreshed = [optimizer for optimizer in damped if _refreshes(optimizer)]
        if self.asked and damped and not refreshed:
            raise ValueError(
                f"--refresh expected a solver that takes a second look at the loss, got {damped[0].options.solver!r}, "
                "whose directions come from the gradients of training; add --optimizer.solver gradients (or lanczos), "
                "with --damp --damp.solver gradients"
            )
        if refreshed:
            super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what directions from training's own gradients are like."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Damped) and optimizer.from_training_gradients and optimizer.refreshes:
                self._log(trainer, optimizer)

    def _candidates(self, trainer: pl.Trainer) -> list[Any]:
        return [o for o in super()._candidates(trainer) if not isinstance(o, Damped) or _refreshes(o)]


def _refreshes(optimizer: Damped) -> bool:
    return optimizer.options.solver not in FROM_TRAINING


class _Damp(pl.Callback):
    """Damp the optimizers that the module configures."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before their state is restored, which a checkpoint holds with the directions."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Damped):
                raise ValueError(
                    f"--damp expected an optimizer without directions, got {type(optimizer).__name__}; "
                    "leave --damp out, or give another --optimizer"
                )
            damp(optimizer, **self.options)


def _find(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The error of a kind that an error came from."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error
