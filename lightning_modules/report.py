"""Every figure and table of a study, made from the files in its folder and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from lightning_modules.compare import EVALUATED, GRID, TUNED, TUNING_SEEDS, factors
from lightning_modules.page import new_figure, print_tables, write_page
from lightning_modules.rows import Rows, read_csv
from lightning_modules.trajectory_report import measurement_figures

COLORS = {"sgd": "#444444", "nsgd": "#0072b2", "bulk-sgd": "#d55e00", "dom-sgd": "#009e73"}  # Okabe and Ito
STYLES = {"sgd": "-", "nsgd": "-", "bulk-sgd": "--", "dom-sgd": "-."}  # curves that coincide stay visible
NAMES = {"sgd": "SGD", "nsgd": "NSGD", "bulk-sgd": "Bulk-SGD", "dom-sgd": "Dom-SGD"}
READ_OUTS = {"last": "last", "ema": "EMA", "swa": "SWA", "two-point": "two-point"}
AXES = {"step": "optimizer steps", "gradients": "gradients, refreshes included", "seconds": "seconds of training"}
_MEASURES = (("test_accuracy", "Test accuracy, %", 100, 1), ("train_loss", "Training loss", 1, 4))  # scale, digits
_TEXT_COLUMNS = ("weights", "method", "paired t-test")
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Files:
    """What a study's folder holds."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: Rows
    summary: Rows
    metrics: dict[str, list[Rows]]  # method -> one list of steps for each seed


def read_folder(folder: Path) -> Files:
    """Read a finished study."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = {
        method: [read_csv(folder / "runs" / f"{method}-{seed}" / "metrics.csv") for seed in range(config["seeds"])]
        for method in config["methods"]
    }
    environment = yaml.safe_load((folder / "environment.yaml").read_text())
    return Files(
        folder, config, environment, read_csv(folder / "results.csv"), read_csv(folder / "summary.csv"), metrics
    )


def write_report(folder: Path) -> Path:
    """Draw the figures as PNG and write report.html, self-contained, beside them; returns its path."""
    files = read_folder(folder)
    figures = {
        "training-loss": (_training_loss(files), "Training loss against the three axes of cost. " + _band(files)),
        "validation-accuracy": (_validation(files), "Validation accuracy after each epoch. " + _band(files)),
    }
    if any("weight_1" in row for runs in files.metrics.values() for row in runs[0]):
        figures["eigenvalues"] = (_eigenvalues(files), _eigenvalues_caption(files))
    for method in files.config["methods"]:
        measured = measurement_figures(folder / "runs" / f"{method}-0")
        figures |= {
            f"{name}-{method}": (figure, f"{NAMES[method]}, first seed. {words}")
            for name, (figure, words) in measured.items()
        }
    return write_page(
        folder / "report.html",
        title=_title(files),
        tables=_tables(files),
        text_columns=_TEXT_COLUMNS,
        caption=_caption(files),
        figures=figures,
        appendix={
            "Configuration": yaml.safe_dump(files.config, sort_keys=False),
            "Environment": yaml.safe_dump(files.environment, sort_keys=False),
        },
    )


def print_table(folder: Path, console: Console) -> None:
    """Print the study's tables to a terminal."""
    files = read_folder(folder)
    console.print(_title(files), style="bold", markup=False)
    print_tables(console, _tables(files), text_columns=_TEXT_COLUMNS, wrapped=("paired t-test",))
    console.print(_caption(files), markup=False)


# -- the table ---------------------------------------------------------------------------------------------------


def _title(files: Files) -> str:
    data = files.config["data"]
    name = data["init_args"].get("path") or data["class_path"].rpartition(".")[2]
    methods = ", ".join(NAMES[m] for m in files.config["methods"])
    return f"{methods} on {name}: {files.config['net']}, {files.config['epochs']} epochs, {files.config['seeds']} seeds"


def _tables(files: Files) -> list[dict[str, Any]]:
    """Accuracy, training loss and cost: a title, a header and rows of text each."""
    methods = files.config["methods"]
    compared = "sgd" in methods and len(methods) > 1
    tables = []
    for measure, title, scale, digits in _MEASURES:
        header = ["weights", "method", "mean"] + (["minus SGD", "paired t-test"] if compared else [])
        rows = []
        for entry in (e for e in files.summary if e["measure"] == measure):
            row = [_estimate(entry["mean"], entry["half_width"], scale, digits)]
            row += _difference(entry, scale, digits) if compared else []
            name = READ_OUTS[entry["read_out"]] if entry["method"] == methods[0] else ""
            rows.append([name, NAMES[entry["method"]], *row])
        tables.append({"title": title, "header": header, "rows": rows})
    columns = ("step", "gradients", "seconds", "refreshes", "hvps")
    costs = [
        [NAMES[m], *(f"{_mean(r[c] for r in files.results if r['method'] == m):.4g}" for c in columns)] for m in methods
    ]
    header = ["method", "steps", "gradients", "seconds", "refreshes", "Hessian-vector products"]
    return [*tables, {"title": "Cost of a run", "header": header, "rows": costs}]


def _estimate(value: float, half: float, scale: float, digits: int, sign: str = "") -> str:
    if not math.isfinite(value):
        return "diverged"
    kind = f".{digits}f" if abs(value * scale) < 1e4 else ".2e"
    text = f"{value * scale:{sign}{kind}}"
    return text if math.isnan(half) else f"{text} ± {half * scale:{kind}}"


def _difference(entry: dict[str, Any], scale: float, digits: int) -> list[str]:
    """The difference to SGD, and what the test says of it."""
    if entry["method"] == "sgd":
        return ["", ""]
    text = _estimate(entry["difference"], entry["difference_half_width"], scale, digits, "+")
    if math.isnan(entry["p"]):
        return [text, "no test"]  # one seed, a run that diverged, or the same difference for every seed
    verdict = "significant" if entry["p"] < _SIGNIFICANT else "no significant difference"
    return [text, f"{verdict} (p = {entry['p']:.2g})"]


def _caption(files: Files) -> str:
    config = files.config
    rates = ", ".join(
        f"{NAMES[m]} {next(r['lr'] for r in files.results if r['method'] == m):g}" for m in config["methods"]
    )
    grid = ", ".join(f"{lr:g}" for lr in GRID)
    tuned = {
        "grid": f"each tuned on the grid {grid} by validation loss over {len(TUNING_SEEDS)} other seeds",
        "tuned": f"tuned beforehand on the grid {grid} by validation loss, at the default settings"
        if (config["data"]["class_path"].rpartition(".")[2], config["net"], config["momentum"]) in TUNED
        else "not tuned",
    }.get(str(config["lr"]), "given, not tuned")
    tests = sum(r["measure"] == "test_accuracy" and not math.isnan(r["p"]) for r in files.summary)
    uncorrected = f"; p-values are not corrected for their number, {tests} in each table" if tests else ""
    means = f"Means over {config['seeds']} paired seeds ± half of the 95 % t-interval{uncorrected}"
    return (
        f"{means if config['seeds'] > 1 else 'One seed, so no intervals and no tests'}. Learning rates: "
        f"{rates} ({tuned}); momentum {config['momentum']:g}; batch size {config['data']['init_args']['batch_size']}; "
        f"threads: {config['threads']}. One gradient is a forward and backward pass on a training batch, and refreshes "
        "are counted in. Averages are read-outs of the same runs; training losses are taken on at most "
        f"{EVALUATED:,} images, accuracies on all." + _diverged(files)
    )


def _diverged(files: Files) -> str:
    """Says for how many seeds the loss of the last weights is not finite."""
    lost = {
        method: sum(
            r["method"] == method and r["read_out"] == "last" and not math.isfinite(r["train_loss"])
            for r in files.results
        )
        for method in files.config["methods"]
    }
    named = ", ".join(f"{NAMES[m]} {n} of {files.config['seeds']}" for m, n in lost.items() if n)
    return f" Runs that diverged: {named}; their accuracy is that of chance." if named else ""


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# -- figures -----------------------------------------------------------------------------------------------------


def _column(runs: list[Rows], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One column of every seed, (seeds, steps), NaN where a cell is empty."""
    return np.array([[row.get(name, math.nan) for row in run] for run in runs], dtype=float)


def _band(files: Files) -> str:
    return f"Lines are means over {files.config['seeds']} seeds, bands reach from the lowest to the highest."


def _curve(axes: Axes, method: str, x: Any, y: Any) -> None:
    axes.plot(x, y.mean(0), STYLES[method], color=COLORS[method], label=NAMES[method], linewidth=1.6)
    axes.fill_between(x, y.min(0), y.max(0), color=COLORS[method], alpha=0.15, linewidth=0)


def _epoch_ends(run: Rows) -> list[int]:
    return [i for i, row in enumerate(run) if i + 1 == len(run) or run[i + 1]["epoch"] != row["epoch"]]


def _has_finite(axes: Axes) -> bool:
    """Whether there is anything to draw: a method that diverged has no curve from there on."""
    return any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in axes.get_lines())


def _training_loss(files: Files) -> Figure:
    figure, panels = new_figure(3)
    for method, runs in files.metrics.items():
        ends = _epoch_ends(runs[0])
        starts = [0, *(e + 1 for e in ends[:-1])]
        loss = _column(runs, "loss")
        means = np.stack([loss[:, a : b + 1].mean(1) for a, b in zip(starts, ends, strict=True)], axis=1)
        for axes, name in zip(panels, AXES, strict=True):
            _curve(axes, method, _column(runs, name).mean(0)[ends], means)
    for axes, label in zip(panels, AXES.values(), strict=True):
        axes.set(xlabel=label, yscale="log" if _has_finite(axes) else "linear")
    panels[0].set_ylabel("training loss, mean of each epoch")
    panels[0].legend(frameon=False)
    return figure


def _validation(files: Files) -> Figure:
    figure, panels = new_figure(3)
    for method, runs in files.metrics.items():
        ends = _epoch_ends(runs[0])
        accuracy = 100 * _column(runs, "val_accuracy")[:, ends]
        for axes, name in zip(panels, AXES, strict=True):
            _curve(axes, method, _column(runs, name).mean(0)[ends], accuracy)
    for axes, label in zip(panels, AXES.values(), strict=True):
        axes.set_xlabel(label)
    panels[0].set_ylabel("validation accuracy, %")
    panels[0].legend(frameon=False)
    return figure


def _refreshed(files: Files) -> dict[str, Rows]:
    """For each method that has directions, the rows of its first seed at which they were refreshed."""
    found = {method: [row for row in runs[0] if "weight_1" in row] for method, runs in files.metrics.items()}
    return {method: rows for method, rows in found.items() if rows}


def _limits(files: Files, method: str) -> list[tuple[str, float, str]]:
    """Label, level and line style of the limits of stable steps, outside and along the directions."""
    lr = float(next(r["lr"] for r in files.results if r["method"] == method))
    options = files.config["nsgd"]
    gamma, bulk_scale = factors(method, options["gamma"], options["bulk_scale"])
    edge = 2 + 2 * files.config["momentum"]
    inside, outside = ("(2 + 2β) / (γ lr)", gamma * lr, ":"), ("(2 + 2β) / lr", bulk_scale * lr, "--")
    wanted = [outside] if gamma == bulk_scale else [outside, inside]
    return [(label, edge / rate, style) for label, rate, style in wanted if rate > 0]


def _eigenvalues(files: Files) -> Figure:
    refreshed = _refreshed(files)
    figure, panels = new_figure(len(refreshed))
    figure.set_size_inches(5.2 * len(refreshed), 3.8)
    for axes, (method, rows) in zip(panels, refreshed.items(), strict=True):
        steps = [row["step"] for row in rows]
        k = max(sum(name.startswith("weight_") for name in row) for row in rows)  # at first there may be fewer
        for i in range(k, 0, -1):
            values = [row.get(f"weight_{i}", math.nan) for row in rows]
            axes.plot(
                steps, values, color=COLORS[method], alpha=1 if i == 1 else 0.35, linewidth=1.6 if i == 1 else 0.8
            )
        lines = _limits(files, method)
        for label, level, style in lines:
            axes.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{label} = {level:.3g}")
        positive = all(value > 0 for row in rows for name, value in row.items() if name.startswith("weight_"))
        axes.set(xlabel="optimizer steps", yscale="log" if positive else "symlog", title=NAMES[method])
        if lines:
            axes.legend(frameon=False, loc="lower left", fontsize=8)
    panels[0].set_ylabel("estimated curvature at each refresh")
    return figure


def _eigenvalues_caption(files: Files) -> str:
    options = files.config["nsgd"]
    source = "the running batch" if options["source"] == "batch" else "the training set"
    samples = options["samples"] or ("all" if options["source"] == "batch" else 2560)
    kind = (
        "second moments of the gradients of small groups, which stand in for eigenvalues"
        if options["solver"] in ("auto", "gradients")
        else "eigenvalues that products found"
    )
    return (
        f"Curvature along the {options['k']} directions as each refresh estimated it on {samples} samples of {source} "
        f"({kind}, averaged over refreshes), first seed; the strong line is the largest. Dashed: the limit (2 + 2β)/lr "
        "of stable steps in undamped directions; dotted: (2 + 2β)/(γ lr), the limit in damped ones (none where γ = 0); "
        "β is the momentum. Small samples overestimate the curvature of the whole training loss."
    )
