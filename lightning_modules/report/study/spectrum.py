"""Where runs ended and were best, as the 2019 paper tables it: curvature there, and the distance from the start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import MISSING
from lightning_modules.support.paired import t_interval
from lightning_modules.support.quantities import DISTANCE, FROBENIUS, LAMBDA_1
from lightning_modules.support.read_outs import label_of

_COLUMNS = {
    FROBENIUS: "Frobenius norm of the Hessian",
    LAMBDA_1: "its largest eigenvalue",
    DISTANCE: "distance from the start",
}


def spectrum_tables(files: Files) -> list[dict[str, Any]]:
    """One table, where a study measured it: means over seeds with their 95 % intervals."""
    measured = [row for row in files.results if FROBENIUS in row and row["read_out"] in ("best", "last")]
    if not measured:
        return []
    body = []
    for method in files.methods:
        for read_out in ("best", "last"):
            rows = [row for row in measured if (row["method"], row["read_out"]) == (method, read_out)]
            cells = [_mean([float(row[name]) for row in rows]) for name in _COLUMNS]
            body.append([files.label(method) if read_out == "best" else "", label_of(read_out), *cells])
    size = files.config["spectrum"]
    title = (
        f"Where runs were best and ended: the Hessian of {size['samples']:,} training samples, its norm from the "
        f"{size['k']} eigenvalues of largest magnitude"
    )
    return [{"title": title, "header": ["method", "weights", *_COLUMNS.values()], "rows": body}]


def _mean(values: list[float]) -> str:
    """The mean of what is finite, with half its interval, and how many are not."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return MISSING
    lost = f" ({len(values) - len(finite)} not finite)" if len(finite) < len(values) else ""
    mean = float(np.mean(finite))
    half = f" ± {t_interval(finite)[1] - mean:.3g}" if len(finite) > 1 else ""
    return f"{mean:.4g}{half}{lost}"
