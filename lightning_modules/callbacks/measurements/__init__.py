"""Callbacks that measure along a training path, a file for each, and what they hold: a budget, a sample, a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_modules.callbacks.measurements.averaging import AveragingExperiment as AveragingExperiment
from lightning_modules.callbacks.measurements.measurement import Measurement
from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic as BatchQuadratic
from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor as SharpnessMonitor
from lightning_modules.callbacks.measurements.valley import ValleyWalk as ValleyWalk

MEASUREMENTS = {kind.name: kind for kind in (SharpnessMonitor, ValleyWalk, BatchQuadratic, AveragingExperiment)}


def make_measurements(
    names: Sequence[str], *, samples: int | None = None, overhead: float = 0.15, folder: Path | None = None
) -> list[Measurement]:
    """Measurements by name, each at its default interval.

    Args:
        names: Any of sharpness, valley, quadratic and averaging, or "all".
        samples: Evaluation samples of each but quadratic, which takes batches; None for as many as the overhead pays.
        overhead: Gradients that each may cost for each gradient of training.
        folder: Where their files go, in place of the logger's folder.

    Raises:
        ValueError: If a name is unknown, or given twice.
    """
    if list(names) == ["all"]:
        names = list(MEASUREMENTS)
    if any(name not in MEASUREMENTS for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"expected measurements to be different ones of {', '.join(MEASUREMENTS)}, or all, got {', '.join(names)}"
        )
    paths = {name: None if folder is None else folder / f"{name}.csv" for name in names}
    of: dict[str, Any] = {name: {} if name == BatchQuadratic.name else {"samples": samples} for name in names}
    return [MEASUREMENTS[name](overhead=overhead, path=paths[name], **of[name]) for name in names]
