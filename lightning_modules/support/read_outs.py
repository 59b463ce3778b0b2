"""Names of the read-outs of a run: its last weights, averages of weights, and the weights that were best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["ema", "swa", "two-point"]

READ_OUTS = {"last": "last", "ema": "EMA", "swa": "SWA", "two-point": "two-point", "best": "best epoch"}  # in print
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Average:
    """An average of the weights along a run, at a setting of its own.

    Attributes:
        kind: "ema", exponential; "swa", of all weights at the end; "two-point", of two weights.
        value: Of "ema" the decay, (1 + t) / (10 + t) in step t while that is less; of "swa" the share of the run's
            steps, at its end; of "two-point" the number of steps between the two, of which the second is the last.
    """

    kind: Kind
    value: float

    @property
    def name(self) -> str:
        """As options and results have it: "ema-0.9", "swa-0.25", "two-point-16"."""
        return f"{self.kind}-{self.value:.12g}"

    @property
    def label(self) -> str:
        """What it is called in print."""
        if self.kind == "swa":
            return f"SWA of the last {100 * self.value:.12g} %"
        return f"EMA {self.value:.12g}" if self.kind == "ema" else f"two points {self.value:.12g} apart"

    def check(self, steps: int) -> None:
        """Raise a ValueError if a run of so many steps has no such average."""
        if self.kind == "two-point" and not self.value < steps:
            raise ValueError(
                f"expected the points of {self.name} to be fewer steps apart than the {steps} of a run, got "
                f"{self.value:.12g}; take them closer"
            )


def average(name: str) -> Average:
    """The average that a name says.

    Raises:
        ValueError: If it says none.
    """
    kind = next((kind for kind in KINDS if isinstance(name, str) and name.startswith(f"{kind}-")), None)
    try:
        value = float(name.removeprefix(f"{kind}-")) if kind is not None else None
    except ValueError:
        value = None
    if kind is None or value is None:
        raise ValueError(
            "expected an average to be named as ema-0.9 (its decay), swa-0.25 (its share of the steps) or "
            f"two-point-16 (steps between the points), got {name!r}"
        )
    if kind == "two-point" and not (value >= 1 and value.is_integer()):
        raise ValueError(f"expected the points of an average to be 1 or more whole steps apart, got {name}")
    if kind != "two-point" and not 0 < value < 1:
        what = "decay" if kind == "ema" else "share of the steps"
        raise ValueError(f"expected the {what} of an average between 0 and 1, got {name}")
    return Average(kind, value)


def averages(names: Iterable[str]) -> list[Average]:
    """The averages that names say.

    Raises:
        ValueError: If one says none, or two say the same.
    """
    found: list[Average] = []
    for name in names:
        if (one := average(name)) in found:
            raise ValueError(f"expected averages to be different, got {one.name} twice")
        found.append(one)
    return found


def kind_of(read_out: str) -> str:
    """What a read-out is, whatever its setting: itself, but of "ema-0.9" for example "ema"."""
    return read_out if read_out in READ_OUTS else average(read_out).kind


def label_of(read_out: str) -> str:
    """What a read-out is called in print."""
    return READ_OUTS.get(read_out) or average(read_out).label
