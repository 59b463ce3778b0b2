"""What a folder of ``nsgd escape`` holds, read for its report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.support.files import Rows, read_csv, read_yaml

FEWEST = 20  # arrivals for a time to be drawn and fitted


@dataclass(frozen=True)
class Files:
    """Contents of a folder."""

    config: dict[str, Any]
    landscape: dict[str, Any]
    environment: dict[str, Any]
    rows: Rows
    potential: Rows  # along the way from the start over the saddle to the goal; none in folders from before it was kept

    @property
    def barrier(self) -> float:
        """Height of the barrier as the noise feels it: that of the loss, where the noise is the same everywhere."""
        felt = self.landscape.get("effective_barrier", math.nan)
        return float(self.landscape["barrier"] if math.isnan(felt) else felt)

    @property
    def follows(self) -> str:
        """What the variance of the noise follows; of studies of before, which did not say, nothing."""
        return str(self.config.get("noise_follows", "constant"))

    @property
    def momentum(self) -> float:
        """Of SGD; of studies of before, which had none, 0."""
        return float(self.config.get("momentum", 0.0))

    @property
    def slope(self) -> str:
        """What log escape time is predicted to grow by with B / η, as a formula."""
        return f"2{'(1 − β)' if self.momentum else ''}{self.height}/σ²"

    def time(self, row: dict[str, Any], column: str = "measured") -> float:
        """Steps of a row as the diffusion's time: by the rate that momentum makes of η."""
        return float(row[column] * row["lr"] / (1 - self.momentum))

    @property
    def height(self) -> str:
        """How that barrier is written."""
        return "Δf" if self.follows == "constant" else "ΔU"

    @property
    def assumption(self) -> str:
        """What is assumed of the noise, as a sentence."""
        follows = {
            "constant": "is the same everywhere",
            "loss": "grows with the loss",
            "curvature": "is the curvature's",
        }
        rest = "" if self.follows == "constant" else f", but for {self.config['noise_floor']:g} of it everywhere"
        return f"Assumed: noise whose variance {follows[self.follows]}{rest}; another noise decides otherwise."

    def of(self, quantity: str, **values: Any) -> Rows:
        """The rows of a quantity that have these values."""
        conditions = {"quantity": quantity, **values}
        return [row for row in self.rows if all(row.get(name) == value for name, value in conditions.items())]


def read_folder(folder: Path) -> Files:
    """Read a finished run of the command."""
    config, landscape, environment = (
        read_yaml(folder / f"{name}.yaml") for name in ("config", "landscape", "environment")
    )
    way = folder / "potential.csv"
    return Files(config, landscape, environment, read_csv(folder / "escape.csv"), read_csv(way) if way.exists() else [])


def prediction(row: dict[str, Any]) -> float:
    """The prediction by quadrature where there is one, else to leading order."""
    return float(row["leading"] if math.isnan(row["exact"]) else row["exact"])


def inverse(row: dict[str, Any]) -> float:
    """B / η, which the temperature falls with."""
    return float(row["batch_size"] / row["lr"])
