"""What the runs of a study are compared by: a quantity that their module logs in validation and test, and the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_modules.support.paired import Effect
from lightning_modules.support.quantities import DISTANCE, FROBENIUS, LAMBDA_1

Mode = Literal["min", "max"]

COSTS = ("step", "gradients", "seconds")  # columns of what a run has cost so far

EVALUATED = 5000  # training samples, at most, that the training loss is taken on

_VALIDATION = re.compile(r"(?<![a-z])(validation|valid|val|eval|dev)(?![a-z])")
_SUFFIX = re.compile(r"(/dataloader_idx_\d+|_epoch|_step)$")  # that Lightning gives to names
_ACCURACY = {"acc", "accuracy"}
_LESS = {"loss", "error", "err", "perplexity", "ppl", "mse", "rmse", "mae", "nll", "wer", "cer"}
_MORE = _ACCURACY | {"auc", "auroc", "f1", "iou", "miou", "map", "r2", "precision", "recall", "dice", "bleu", "psnr"}
_POSITIVE = {"loss", "perplexity", "ppl", "mse", "rmse", "mae", "nll"}  # losses, which are compared as ratios
# Columns of results and steps that are the study's own.
_TAKEN = {"method", "seed", "read_out", "lr", "train_loss", "step", "epoch", "loss", "gradients", "seconds"}
_TAKEN |= {"refreshes", "hvps", "state", "alignment", "overlap", "trial", "start_loss", FROBENIUS, LAMBDA_1, DISTANCE}


def better(monitor: str) -> Mode:
    """Whether less or more of a quantity is better, by the words of its name.

    Raises:
        ValueError: If they do not tell.
    """
    words = set(_words(monitor))
    if words & _MORE:
        return "max"
    if words & _LESS:
        return "min"
    raise ValueError(f"expected --mode min or max with --monitor {monitor}, whose name does not tell, got none")


def failed_runs(
    rows: Iterable[Mapping[str, Any]], methods: Iterable[str], seeds: Collection[int]
) -> dict[str, set[int]]:
    """Seeds of each method whose run died, or ended no better than it began.

    The latter is a training loss of the last weights that is not finite, or not below the least loss of a first batch
    before training, of all runs (``start_loss``, which studies of before did not keep). One bar for all: that of a run
    may lie far above chance.

    Args:
        rows: Of results.csv.
        methods: Names.
        seeds: Those of the study.
    """
    last = [row for row in rows if row["read_out"] == "last"]
    starts = [float(row.get("start_loss", math.inf)) for row in last]
    bar = min((start for start in starts if not math.isnan(start)), default=math.inf)
    learned = {(row["method"], row["seed"]) for row in last if _learned(float(row["train_loss"]), bar)}
    return {method: {seed for seed in seeds if (method, seed) not in learned} for method in methods}


def _learned(loss: float, bar: float) -> bool:
    return math.isfinite(loss) and loss < bar


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", _SUFFIX.sub("", name.lower()))


@dataclass(frozen=True)
class Measure:
    """A number of a run, and how it is called and printed."""

    column: str  # in results.csv
    label: str
    lower_is_better: bool
    factor: int = 1  # from the number to what is printed
    digits: int = 4
    unit: str = ""
    difference_unit: str = ""
    effect: Effect = "difference"  # what it is compared as, as long as all values allow it

    def badness(self, row: Mapping[str, Any]) -> float:
        """What the best row has least of; infinite where it diverged, or is missing."""
        value = float(row.get(self.column, math.nan))
        if not math.isfinite(value):
            return math.inf
        return value if self.lower_is_better else -value

    @property
    def header(self) -> str:
        """Of a column or an axis."""
        return f"{self.label}{self.unit and ', ' + self.unit.strip()}"


@dataclass(frozen=True)
class Score:
    """A quantity by the name that a module logs it under in validation, and whether less of it or more is better.

    Attributes:
        monitor: The name.
        mode: What is better.
        shares: Whether an accuracy is a share of 1, which is printed in per cent, and not in per cent already.
    """

    monitor: str
    mode: Mode
    shares: bool = True

    def __post_init__(self) -> None:
        if self.monitor in _TAKEN:
            raise ValueError(
                f"expected --monitor to be logged in validation under a name of its own, got {self.monitor!r}, which "
                "the study's files use; log it as val_... too"
            )

    @property
    def validated(self) -> list[str]:
        """Names of what is kept of a validation: the loss, where one is logged, and this."""
        return list(dict.fromkeys((_VAL_LOSS.column, self.monitor)))

    @property
    def tested(self) -> str:
        """Its name in a test: that of validation with "test" in place of the word for validation."""
        name, count = _VALIDATION.subn("test", self.monitor, count=1)
        return name if count else f"test_{name}"

    @property
    def as_logged_in_a_test(self) -> list[str]:
        """Names that it may be logged under in a test, the likeliest first; of one loader they have no number."""
        names = [self.tested, self.monitor]
        return list(dict.fromkeys([*names, *(_SUFFIX.sub("", name) for name in names)]))

    @property
    def is_share(self) -> bool:
        """Whether it is an accuracy, which is printed in per cent."""
        return self.shares and bool(_ACCURACY & set(_words(self.monitor)))

    @property
    def validation(self) -> Measure:
        """The quantity in validation."""
        return self._measure(self.monitor)

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.mode == "max" else -1

    def criterion(self, columns: Collection[str]) -> Measure:
        """What the settings of a method are chosen by: the validation loss, or this where none is logged."""
        own = self.monitor == _VAL_LOSS.column or _VAL_LOSS.column not in columns
        return self.validation if own else _VAL_LOSS

    def measures(self, columns: Collection[str]) -> list[Measure]:
        """What results are compared by, the main one first: in test where that was made, in validation, and the loss.

        Args:
            columns: Of the results.
        """
        every = [self._measure(self.tested), self.validation, TRAIN_LOSS]
        return [measure for measure in every if measure.column in columns]

    def _measure(self, column: str) -> Measure:
        name = _VALIDATION.sub("validation", _SUFFIX.sub("", column), count=1)
        words = [{"acc": "accuracy"}.get(word, word) for word in re.split(r"[_/\s]+", name)]
        share = (100, 1, " %", " points") if self.is_share else (1, 4, "", "")
        named = set(_words(self.monitor))  # by the name alone, so before any run
        effect: Effect = "ratio" if self.mode == "min" and named & _POSITIVE and not named & _MORE else "difference"
        return Measure(column, " ".join(words), self.mode == "min", *share, effect)


TRAIN_LOSS = Measure("train_loss", "training loss", lower_is_better=True, effect="ratio")
_VAL_LOSS = Measure("val_loss", "validation loss", lower_is_better=True)
