"""Figures and captions of what was measured along a training path, from the CSV files of the measurements alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from lightning_modules.escape_report import escape_figures
from lightning_modules.page import new_figure, write_page
from lightning_modules.rows import Rows, read_csv

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]  # (n,)
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito
_GREY = "#777777"
_CONFIRMED, _NOT_CONFIRMED, _NOT_RESOLVED = "confirmed", "not confirmed", "not resolved"


def write_measurements(folder: Path, *, title: str) -> Path:
    """Draw every measurement found in a folder, and write measurements.html beside the figures; returns its path.

    A folder ``escape`` in it, as ``nsgd escape`` writes it, has its figures on the same page.

    Raises:
        ValueError: If there is none.
    """
    figures = measurement_figures(folder)
    if (folder / "escape" / "escape.csv").exists():
        figures |= {
            name: (figure, f"Simulated walkers on a double well, no network. {words}")
            for name, (figure, words) in escape_figures(folder / "escape").items()
        }
    if not figures:
        names = ", ".join(f"{name}.csv" for name in _DRAWN)
        raise ValueError(f"expected measurements in {folder}, one of {names}; got none")
    config = folder / "config.yaml"
    appendix = {"Configuration": config.read_text()} if config.exists() else {}
    return write_page(folder / "measurements.html", title=title, figures=figures, appendix=appendix)


def measurement_figures(folder: Path) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption, of every measurement found in a folder."""
    files = {name: folder / f"{name}.csv" for name in _DRAWN}
    found = {name: read_csv(path) for name, path in files.items() if path.exists()}
    return {name: _DRAWN[name](rows) for name, rows in found.items() if rows}


# -- the valley walk ---------------------------------------------------------------------------------------------


def _valley(rows: Rows) -> tuple[Figure, str]:
    bursts = sorted({row["measurement"] for row in rows})
    shown = bursts if len(bursts) <= 3 else [bursts[0], bursts[len(bursts) // 2], bursts[-1]]
    figure, panels = new_figure(len(shown) + 1)
    for axes, burst in zip(panels, shown, strict=False):
        own = [row for row in rows if row["measurement"] == burst]
        path = [(row["step"] + row["at"], row["value"]) for row in own if row["quantity"] == "loss"]
        floors = list(zip(_of(own, "position"), _of(own, "floor"), strict=True))
        steps = [row["step"] for row in own if row["quantity"] == "position"]
        inside = [(s + p, f) for s, (p, f) in zip(steps, floors, strict=True) if 0 <= p <= 1]
        ends = [(row["step"] + row["at"], row["value"]) for row in own if row["quantity"] == "loss" and row["at"] == 0]
        axes.plot(*_columns(path), color=_COLORS[0], linewidth=1.1, label="loss between iterates")
        axes.plot(*_columns(ends), "o", color=_COLORS[0], markersize=3)
        axes.plot(*_columns(inside), "--", color=_COLORS[1], linewidth=1.2, label="floor, where it lies inside a step")
        axes.set(xlabel="optimizer steps", title=f"from step {steps[0]}" if steps else "")
    panels[0].set_ylabel("loss on the evaluation samples")
    panels[0].legend(frameon=False, fontsize=8)
    predicted, measured = _of(rows, "predicted position"), _of(rows, "position")
    panels[-1].plot(np.clip(predicted, -1, 4), np.clip(measured, -1, 4), "o", color=_COLORS[0], markersize=3, alpha=0.6)
    panels[-1].plot([-1, 4], [-1, 4], color=_GREY, linewidth=0.8)
    panels[-1].set(xlabel="floor predicted by a quadratic, in steps", ylabel="floor measured, cut to -1 ... 4")
    return figure, _valley_caption(rows)


def _valley_caption(rows: Rows) -> str:
    positions, barriers = _of(rows, "position"), _of(rows, "barrier")
    inside = int(((positions > 0) & (positions < 1)).sum())
    share = stats.binomtest(inside, len(positions)).proportion_ci(method="wilson") if len(positions) else None
    verdict = _side(share.low - 0.5, share.high - 0.5) if share else _NOT_RESOLVED
    cosines = _finite(_of(rows, "cosine"))
    floor = [row["value"] for row in rows if row["quantity"] == "floor barrier"]
    agreement = _correlation(_of(rows, "predicted position"), positions)
    middle = float(np.median(_finite(positions))) if len(_finite(positions)) else math.nan
    return (
        "The loss along each step, and the valley's floor. That most steps cross the valley, with the floor between "
        f"their ends, is {verdict} by this run: it lies inside {inside} of {len(positions)} steps"
        f"{_interval_words(share)}. The median floor lies at {middle:.2g} of a step (one half is what any stationary "
        f"run shows, with or without a valley); a quadratic predicts it with rank correlation {agreement:.2f}. "
        f"{int((barriers > 0).sum())} steps cross a barrier; along the floor there are {len(floor)}"
        f"{f', of mean height {np.mean(floor):.2g}' if floor else ''}. Mean height above the floor "
        f"{_spread(_finite(_of(rows, 'height')))}; cosine of consecutive gradients {_spread(cosines)}."
    )


# -- mini-batches as quadratics ----------------------------------------------------------------------------------


def _quadratic(rows: Rows) -> tuple[Figure, str]:
    figure, (own, unseen, rates) = new_figure(3)
    numbers = sorted({row["measurement"] for row in rows})
    for number in numbers:
        batch = [row for row in rows if row["measurement"] == number]
        best, lr = _one(batch, "best rate"), _one(batch, "lr")
        curve = _curve(batch, "own")
        if math.isfinite(best) and curve[0][1] > min(loss for _, loss in curve):
            drop = curve[0][1] - _one(batch, "predicted loss", at=best)
            own.plot(
                *_columns([(at / best, (loss - curve[0][1]) / drop) for at, loss in curve]), ".-", color=_COLORS[0]
            )
        held_out = [(at, loss) for at, loss in _curve(batch, "held out") if at <= 2 * lr * (1 + 1e-9)]
        unseen.plot(*_columns([(at / lr, loss - held_out[0][1]) for at, loss in held_out]), color=_GREY, linewidth=0.6)
    grid = np.linspace(0, 2, 50)
    own.plot(grid, grid**2 - 2 * grid, color=_COLORS[1], label="predicted by g and Hg")
    own.set(xlabel="rate / best rate of the batch", ylabel="change of its loss / predicted drop")
    own.legend(frameon=False, fontsize=8)
    unseen.plot(*_columns(_mean_curve(rows)), "o-", color=_COLORS[0], label="mean")
    unseen.axvline(0.5, color=_COLORS[1], linestyle="--", linewidth=1, label="lr / 2")
    unseen.set(xlabel="rate / lr", ylabel="change of an unseen batch's loss")
    unseen.legend(frameon=False, fontsize=8)
    steps = [row["step"] for row in rows if row["quantity"] == "lr"]
    rates.plot(steps, _of(rows, "best rate") / _of(rows, "lr"), "o", color=_COLORS[0], markersize=4)
    rates.axhline(1, color=_GREY, linewidth=0.8)
    rates.set(xlabel="optimizer steps", ylabel="best rate of a batch / lr", yscale="log")
    return figure, _quadratic_caption(rows)


def _quadratic_caption(rows: Rows) -> str:
    gaps = []
    for number in {row["measurement"] for row in rows}:
        batch = [row for row in rows if row["measurement"] == number]
        best = _one(batch, "best rate")
        if math.isfinite(best):
            mine, other = dict(_curve(batch, "own")), dict(_curve(batch, "held out"))
            gaps.append((other[best] - other[0.0]) - (mine[best] - mine[0.0]))
    low, high = _t_interval(gaps)
    curve = _mean_curve(rows)
    least = min(curve, key=lambda point: point[1])[0]
    ratios = _finite(_of(rows, "best rate") / _of(rows, "lr"))
    fits = _finite(_of(rows, "R^2"))
    explained = max(0.0, 100 * float(np.median(fits)))  # below 0 it does worse than their mean
    return (
        "One batch's loss along its own gradient, and that of a batch which the step has not seen. That the step which "
        f"is best for its own batch does less for another is {_side(low, high)} by this run: the other's loss ends "
        f"{_spread(gaps)} above, changes compared. The quadratic explains {explained:.1f} % of the "
        f"variance of the batch's own losses (median of {len(fits)}); its best rate is {np.median(ratios):.3g} times "
        f"lr (median). For unseen batches the best of the rates tried is {least:g} times lr, where one half is "
        "predicted for stationary SGD without momentum."
    )


def _curve(rows: Rows, of: str) -> list[tuple[float, float]]:
    return sorted((row["at"], row["value"]) for row in rows if row["quantity"] == "loss" and row.get("of") == of)


def _mean_curve(rows: Rows) -> list[tuple[float, float]]:
    """Mean change of unseen batches' losses against rate / lr."""
    changes: dict[float, list[float]] = {}
    for number in {row["measurement"] for row in rows}:
        batch = [row for row in rows if row["measurement"] == number]
        lr, curve = _one(batch, "lr"), _curve(batch, "held out")
        for at, loss in curve:
            if at <= 2 * lr * (1 + 1e-9) and at != _one(batch, "best rate"):
                changes.setdefault(round(at / lr, 6), []).append(loss - curve[0][1])
    return [(rate, float(np.mean(values))) for rate, values in sorted(changes.items())]


# -- the sharpest directions ---------------------------------------------------------------------------------------


def _sharpness(rows: Rows) -> tuple[Figure, str]:
    brief = not any(row["quantity"] == "change after a step" for row in rows)
    figure, (spectrum, *others) = new_figure(1 if brief else 4)
    names = sorted({row["of"] for row in rows if row["quantity"] == "eigenvalue"})
    for i, name in enumerate(reversed(names)):
        first = i + 1 == len(names)
        label, alpha, width = ("eigenvalues", 1.0, 1.6) if first else (None, 0.35, 0.8)
        points = _series(rows, "eigenvalue", name)
        spectrum.plot(*points, ".-", color=_COLORS[0], label=label, alpha=alpha, linewidth=width)
    lines = (
        ("root-sum-square", "s-", _GREY, "root-sum-square of the largest"),
        ("felt sharpness", "d-", _COLORS[2], "felt by damped steps"),
        ("stability limit", "--", "black", "(2 + 2β) / lr"),
        ("damped stability limit", ":", "black", "(2 + 2β) / (γ lr)"),
    )
    for quantity, style, color, name in lines:
        points = _series(rows, quantity)
        if len(points[0]) == 1 and color == "black":
            spectrum.axhline(points[1][0], linestyle=style, color=color, linewidth=1, label=name)
        elif points[0]:
            spectrum.plot(*points, style, color=color, linewidth=1, markersize=4, label=name)
    spectrum.plot(*_series(rows, "batch sharpness"), "x", color=_COLORS[1], markersize=4, label="batch sharpness")
    positive = all(row["value"] > 0 for row in rows if row["quantity"] == "eigenvalue")
    spectrum.set(xlabel="optimizer steps", ylabel="curvature", yscale="log" if positive else "symlog")
    spectrum.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)
    if not brief:
        _draw_steps(rows, names, *others)
    return figure, _sharpness_caption(rows, names)


def _draw_steps(rows: Rows, names: Sequence[str], cosines: Axes, steps: Axes, sections: Axes) -> None:
    """Batches' gradients in the directions, steps along them, and cross-sections."""
    for i, name in enumerate(["basis", *names[:3]]):
        at, values = _series(rows, "alignment", name)
        cosines.plot(at, np.abs(values), "o", color=_COLORS[i], markersize=4, label=f"|cos(g, {name})|")
    cosines.set(xlabel="optimizer steps", ylabel="alignment of batches' gradients", ylim=(0, 1.05))
    cosines.legend(frameon=False, fontsize=7)
    for i, name in enumerate([*names[:3], "random", "whole step"]):
        steps.plot(*_columns(_decomposition(rows, name)), ".-", color=_COLORS[i], label=name)
    steps.axhline(0, color=_GREY, linewidth=0.8)
    steps.set(xlabel="multiple of the step", ylabel="mean change of the loss", xscale="log")
    steps.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    steps.minorticks_off()
    steps.set_yscale("symlog", linthresh=_scale_of(rows))
    steps.legend(frameon=False, fontsize=7)
    last = max(row["step"] for row in rows)
    for i, name in enumerate(sorted({row["of"] for row in rows if row["quantity"] == "cross-section"})):
        own = [r for r in rows if r["quantity"] == "cross-section" and r["of"] == name and r["step"] == last]
        sections.plot(*_columns([(row["at"], row["value"]) for row in own]), ".-", color=_COLORS[i], label=name)
    sections.set(xlabel="offset, in usual steps along the direction", ylabel=f"loss, at step {last}", xscale="symlog")
    sections.legend(frameon=False, fontsize=7)


def _decomposition(rows: Rows, of: str) -> list[tuple[float, float]]:
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["quantity"] == "change after a step" and row["of"] == of:
            found.setdefault(row["at"], []).append(row["value"])
    return [(at, float(np.mean(values))) for at, values in sorted(found.items())]


def _scale_of(rows: Rows) -> float:
    """Where the axis of changes turns from linear to logarithmic: the size of a whole step's change."""
    sizes = [abs(change) for _, change in _decomposition(rows, "whole step") if math.isfinite(change)]
    return max(1e-8, min(sizes, default=0.0))


def _sharpness_caption(rows: Rows, names: Sequence[str]) -> str:
    changes = [
        row["value"]
        for row in rows
        if row["quantity"] == "change after a step" and row["of"] == "e1" and row["at"] == 1
    ]
    limits = _of(rows, "stability limit")
    values, felt = np.array(_series(rows, "eigenvalue", "e1")[1]), _of(rows, "felt sharpness")
    words = f"The top eigenvalue is {np.median(values):.3g}"
    if len(limits):
        words = f"The top eigenvalue is {np.median(values / limits):.2g} of the limit of stable steps"
        words += f", what damped steps feel {np.median(felt / limits[-len(felt) :]):.2g}" if len(felt) else ""
    few = "Eigenvalues are those of the evaluation samples; few samples make them larger."
    if not changes:
        return f"The sharpest directions. {words}, in the median. {few}"
    low, high = _t_interval(changes)
    best = np.median(_series(rows, "predicted best multiple", "e1")[1])
    inside = np.median(_series(rows, "alignment", "basis")[1])
    return (
        "The sharpest directions, gradients in them, and steps along them. That SGD's step along the sharpest "
        f"direction fails to lower the loss is {_side(low, high)} by this run: it changes the loss by "
        f"{_spread(changes)} ({len(changes)} of them). On a quadratic the best step would be {best:.2g} times as "
        f"long (median; below one half it is too long). {words}; the top {len(names)} directions hold {inside:.2g} of "
        f"a batch's gradient, in norm (medians). {few}"
    )


# -- averages as schedules -----------------------------------------------------------------------------------------


def _averaging(rows: Rows) -> tuple[Figure, str]:
    figure, (losses, gains, distances) = new_figure(3)
    names = [row["of"] for row in rows if row["quantity"] == "distance of average and schedule"]
    for shift, suffix, style, color, label in (
        (-0.1, "", "o", _COLORS[0], "average"),
        (0.1, ", schedule", "s", _COLORS[1], "schedule"),
    ):
        values = [(place + shift, _one(rows, "loss", of=f"{name}{suffix}")) for place, name in enumerate(names)]
        losses.plot(*_columns(values), style, color=color, markersize=7, label=label)
    last = _one(rows, "loss", of="last")
    losses.plot(*_columns([(-0.3, last), (len(names) - 0.7, last)]), "--", color="black", label="last iterate")
    losses.set_xticks(range(len(names)), names)
    losses.set_ylabel("loss on the evaluation samples")
    losses.margins(x=0.1, y=0.35)
    losses.legend(frameon=False, fontsize=8, loc="upper left")
    curves = (
        (gains, "two-point gain", "measured", "o-", _COLORS[0]),
        (gains, "predicted two-point gain", "predicted, Δᵀ H Δ / 8", "x--", _COLORS[1]),
        (distances, "squared distance", "measured", "o-", _COLORS[0]),
    )
    for axes, quantity, label, style, color in curves:
        points = [(row["at"], row["value"]) for row in rows if row["quantity"] == quantity]
        axes.plot(*_columns(points), style, color=color, label=label)
        axes.set(xlabel="steps between the two points", xscale="log")
    gains.set_ylabel("loss saved by averaging two points")
    gains.legend(frameon=False, fontsize=8)
    distances.set(ylabel="squared distance of the two points", yscale="log")
    return figure, _averaging_caption(rows, names)


def _averaging_caption(rows: Rows, names: Sequence[str]) -> str:
    ratios = [
        _one(rows, "distance of average and schedule", of=name) / _one(rows, "distance of average and last", of=name)
        for name in names
    ]
    largest = max(ratios)
    verdict = _CONFIRMED if largest < 0.5 else _NOT_CONFIRMED if largest >= 1 else _NOT_RESOLVED
    if not math.isfinite(largest):
        verdict = _NOT_RESOLVED
    words = "; ".join(
        f"{name} {_one(rows, 'loss', of=name):.3g} against {_one(rows, 'loss', of=f'{name}, schedule'):.3g}, "
        f"{ratio:.2f} of the way to the last iterate"
        for name, ratio in zip(names, ratios, strict=True)
    )
    gains = [(row["at"], row["value"]) for row in rows if row["quantity"] == "two-point gain"]
    spacing, gain = max(gains, key=lambda point: point[1])
    return (
        f"From the last weights, SGD at lr {_one(rows, 'lr'):.3g}: its averages, and the last iterates under the "
        f"schedules that they equal to first order. That an average is where its schedule leads is {verdict} by this "
        f"run: loss of average against schedule, and the distance between them, are {words}. The last iterate's loss "
        f"is {_one(rows, 'loss', of='last'):.3g}. Averaging two points gains most, {gain:.2g}, {spacing:g} steps apart."
    )


# -- numbers -------------------------------------------------------------------------------------------------------


def _of(rows: Rows, quantity: str) -> Numbers:
    return np.array([row["value"] for row in rows if row["quantity"] == quantity], dtype=float)


def _one(rows: Rows, quantity: str, *, of: str | None = None, at: float | None = None) -> float:
    return float(
        next(
            row["value"]
            for row in rows
            if row["quantity"] == quantity and of in (None, row.get("of")) and at in (None, row.get("at"))
        )
    )


def _series(rows: Rows, quantity: str, of: str | None = None) -> tuple[list[float], list[float]]:
    own = [row for row in rows if row["quantity"] == quantity and of in (None, row.get("of"))]
    return _columns([(row["step"], row["value"]) for row in own])


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Abscissas and ordinates; what is infinite cannot be drawn."""
    return [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]


def _finite(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean; without bounds for fewer than two values, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _side(low: float, high: float) -> str:
    """What an interval says of a claim that something is above 0."""
    return _CONFIRMED if low > 0 else _NOT_CONFIRMED if high < 0 else _NOT_RESOLVED


def _spread(values: Sequence[float] | Numbers) -> str:
    low, high = _t_interval(list(values))
    mean = float(np.mean(values)) if len(values) else math.nan
    return f"{mean:.2g}" if math.isinf(low) else f"{mean:.2g} ± {(high - low) / 2:.2g}"


def _interval_words(share: object) -> str:
    low, high = (100 * float(getattr(share, name, math.nan)) for name in ("low", "high"))
    return f" (95 % interval {low:.0f} to {high:.0f} %)" if share else ""


def _correlation(x: Numbers, y: Numbers) -> float:
    """Spearman's: of ranks, since a floor far outside of its step may lie anywhere. NaN where one does not vary."""
    both = np.isfinite(x) & np.isfinite(y)
    varies = both.sum() > 2 and np.ptp(x[both]) > 0 and np.ptp(y[both]) > 0
    return float(stats.spearmanr(x[both], y[both]).statistic) if varies else math.nan


_DRAWN: dict[str, Callable[[Rows], tuple[Figure, str]]] = {
    "sharpness": _sharpness,
    "valley": _valley,
    "quadratic": _quadratic,
    "averaging": _averaging,
}
