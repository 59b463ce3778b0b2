"""Figures of measurements: drawn from the files alone, with captions that follow their numbers."""

from __future__ import annotations

import html
import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_modules import AveragingExperiment, BatchQuadratic, Classifier, Digits, SharpnessMonitor, ValleyWalk
from lightning_modules.callbacks.measurements import MEASUREMENTS, make_measurements
from lightning_modules.report.measurements.averaging import Pair, draw_averaging, summarize_averaging
from lightning_modules.report.measurements.report import measurement_figures, measurements_in, write_measurements
from lightning_modules.report.verdicts import CONFIRMED, NOT_CONFIRMED, NOT_RESOLVED
from lightning_modules.support import quantities
from lightning_modules.support.files import read_csv, write_csv
from nsgd import NSGD


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of 80 steps on digits wrote, every measurement twice or more where it can be."""
    import pytorch_lightning as pl

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("measured")
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.2)
    callbacks = [
        SharpnessMonitor(samples=32, every=30, k=3, products=12, path=folder / "sharpness.csv"),
        ValleyWalk(samples=32, every=40, length=12, points=4, path=folder / "valley.csv"),
        BatchQuadratic(every=15, path=folder / "quadratic.csv"),
        AveragingExperiment(samples=32, steps=8, path=folder / "averaging.csv"),
    ]
    trainer = pl.Trainer(
        max_steps=80,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SharpnessMonitor at step")  # of so few samples
        trainer.fit(module, datamodule=Digits())
    return folder


def altered(measured: Path, to: Path, name: str, change: Any) -> str:
    """The caption after changing every row."""
    rows = read_csv(measured / f"{name}.csv")
    write_csv(to / f"{name}.csv", [change(dict(row)) for row in rows])
    return measurement_figures(measurements_in(to))[name][1]


@pytest.mark.draws
def test_one_page_holds_a_figure_of_each_and_asks_for_nothing_else(measured):
    page = write_measurements(measured, measurements_in(measured), title="A run").read_text()
    assert page.count("<figure>") == len(MEASUREMENTS)
    assert page.count("<svg") >= len(MEASUREMENTS)
    for name in MEASUREMENTS:
        assert (measured / f"{name}.png").read_bytes()[1:4] == b"PNG"
    assert "nan" not in " ".join(caption for _, caption in measurement_figures(measurements_in(measured)).values())


@pytest.mark.parametrize("name", quantities.MEASUREMENTS)
def test_a_measurement_has_a_file_of_its_name_in_each_room(name):
    for room in (
        "nsgd.trajectory",
        "lightning_modules.callbacks.measurements",
        "lightning_modules.report.measurements",
    ):
        assert importlib.util.find_spec(f"{room}.{name}") is not None
    assert name in MEASUREMENTS


def test_only_what_was_measured_is_drawn(measured, tmp_path):
    (tmp_path / "valley.csv").write_bytes((measured / "valley.csv").read_bytes())
    assert list(measurement_figures(measurements_in(tmp_path))) == ["valley"]
    (tmp_path / "valley.csv").unlink()
    with pytest.raises(ValueError, match=r"expected a file of sharpness, .* with rows for .*, got none"):
        write_measurements(tmp_path, measurements_in(tmp_path), title="")


@pytest.mark.parametrize(
    ("position", "verdict"), [(0.4, " is confirmed by"), (1.7, " is not confirmed by"), (None, " is not resolved by")]
)
def test_the_valleys_caption_follows_the_floors(measured, tmp_path, position, verdict):
    count = 0

    def change(row):
        nonlocal count
        if row["quantity"] == "position":
            count += 1
            row["value"] = position or (0.5 if count % 2 else 1.5)
        return row

    caption = altered(measured, tmp_path, "valley", change)
    assert verdict in caption
    inside = {0.4: "inside 24 of 24", 1.7: "inside 0 of 24", None: "inside 12 of 24"}[position]
    assert inside in caption


@pytest.mark.parametrize(("shift", "verdict"), [(1.0, "is confirmed"), (-9.0, "is not confirmed")])
def test_the_quadratics_caption_follows_the_unseen_losses(measured, tmp_path, shift, verdict):
    def change(row):
        if row["quantity"] == "loss" and row["of"] == "held out" and row["at"] > 0:
            row["value"] += shift
        return row

    assert verdict in altered(measured, tmp_path, "quadratic", change)


@pytest.mark.parametrize("below", [0, 1, 6])
def test_the_fixed_batch_is_compared_with_the_lowest_of_its_path(measured, tmp_path, below):
    count = 0

    def change(row):
        nonlocal count
        if row["quantity"] == "loss" and row.get("of") == "fixed":
            if row["at"] > 0:
                count += 1
                row["value"] = 0.4 if count <= below else 0.6
            else:
                row["value"] = {0: 2.0, 30: 0.5}.get(row["step"], 1.0)
        return row

    caption = altered(measured, tmp_path, "quadratic", change)
    assert count == 6
    assert "goes from 2 to 1, 0.5 at the lowest" in caption
    assert f"ends below that from {below} of 6 points" in caption
    assert "Assumed: the batch's loss is a quadratic along its gradient." in caption


def test_a_file_without_a_fixed_batch_is_drawn_without_it(measured, tmp_path):
    rows = [row for row in read_csv(measured / "quadratic.csv") if row.get("of") != "fixed"]
    write_csv(tmp_path / "quadratic.csv", rows)
    assert "fixed batch" not in measurement_figures(measurements_in(tmp_path))["quadratic"][1]


def test_one_batch_alone_resolves_nothing(measured, tmp_path):
    rows = [row for row in read_csv(measured / "quadratic.csv") if row["measurement"] == 1]
    write_csv(tmp_path / "quadratic.csv", rows)
    assert "is not resolved" in measurement_figures(measurements_in(tmp_path))["quadratic"][1]


@pytest.mark.parametrize(
    ("change_of", "verdict"), [(lambda i: 1 + i / 9, "is confirmed"), (lambda i: -1 - i / 9, "is not confirmed")]
)
def test_the_sharpest_directions_caption_follows_the_steps(measured, tmp_path, change_of, verdict):
    def change(row):
        if row["quantity"] == "change after a step" and row["of"] == "e1":
            row["value"] = change_of(row["measurement"])
        return row

    assert verdict in altered(measured, tmp_path, "sharpness", change)


def noisy_quadratic(replicates: int, wrong: bool) -> list[dict[str, Any]]:
    """Rows of an exact instance of the model: SGD at stationarity on h theta^2 / 2, two points against its schedule.

    By the update rule in NumPy, with the schedule's closed form, lr rho^(n - 1) / (1 + rho^(n - 1)) n steps before the
    end; or with the first-order one, lr / 2, which is wrong at so large a rate.
    """
    rng, lr, steps, spacing = np.random.default_rng(0), 1.0, 30, 15
    curvatures = np.array([1.5, 1.2, 0.9, 0.6] * 10)  # lr h of 0.6 to 1.5
    rho = 1 - lr * curvatures
    rows: list[dict[str, Any]] = []

    def note(replicate: int, quantity: str, value: float, of: str = "") -> None:
        row = {"measurement": replicate + 1, "step": 5, "quantity": quantity, "of": of, "at": "", "value": value}
        rows.append(row)

    note(0, "lr", lr)
    note(0, "curvature", 1.5, "e1")
    note(0, "curvature", 0.6, "rest")
    for replicate in range(replicates):
        start = rng.standard_normal(40) * np.sqrt(lr * curvatures / (2 - lr * curvatures))
        noise = rng.standard_normal((steps, 40))
        constant, scheduled, path = start, start, [start]
        for t in range(steps):
            n = steps - t
            rate = lr if n > spacing else lr / 2 if wrong else lr * rho ** (n - 1) / (1 + rho ** (n - 1))
            scheduled = scheduled - rate * curvatures * (scheduled - noise[t])
            constant = constant - lr * curvatures * (constant - noise[t])
            path.append(constant)
        average = (path[-1] + path[-1 - spacing]) / 2
        for of, point in (("last", constant), ("two points", average), ("two points, schedule", scheduled)):
            note(replicate, "loss", float((curvatures * point**2).sum() / 2), of)
    return rows


@pytest.mark.parametrize(
    ("replicates", "wrong", "verdict"),
    [(10, False, CONFIRMED), (10, True, NOT_CONFIRMED), (1, False, NOT_RESOLVED), (2, True, NOT_RESOLVED)],
)
def test_the_verdict_on_averages_follows_mean_losses_of_replicates(replicates, wrong, verdict):
    rows = noisy_quadratic(replicates, wrong)
    caption, summary = draw_averaging(rows)[1], summarize_averaging(rows)
    assert f"mean loss of its schedule is {verdict} by this run" in caption
    assert f"equals on a quadratic is {verdict} by this run" in summary
    for words in ("Assumed: a quadratic loss with one Hessian for every batch", "95 % t-intervals over the replicates"):
        assert words in caption


def test_the_interval_of_the_verdict_is_that_of_a_t_test():
    """Equal up to a quarter of what averaging changes, by SciPy's t-tests of both ends, at 2.5 % each."""
    found = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        average, last = rng.normal(1, 0.1, 5), rng.normal(2, 0.4, 5)
        difference = rng.normal(rng.choice([0.0, 0.25, 0.8]), 0.1, 5)
        margin = 0.25 * np.linalg.norm(last - average) / np.sqrt(5)

        def p(bound, side, values=difference):
            return stats.ttest_1samp(values, bound, alternative=side).pvalue

        equal = max(p(margin, "less"), p(-margin, "greater")) < 0.025
        apart = min(p(margin, "greater"), p(-margin, "less")) < 0.025 / 4
        expected = CONFIRMED if equal else NOT_CONFIRMED if apart else NOT_RESOLVED
        assert Pair("EMA", average, average + difference, last).verdict(compared=4) == expected
        found.add(expected)
    assert len(found) == 3


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_averages_that_change_nothing_are_not_resolved(value):
    same = np.full(4, value)
    assert Pair("EMA", same, same, same).verdict(compared=1) == NOT_RESOLVED


def test_an_experiment_that_found_a_diverged_run_is_said():
    rows = [{"measurement": 1, "step": 2, "quantity": "loss", "of": "start", "at": "", "value": float("inf")}]
    for words in (draw_averaging(rows)[1], summarize_averaging(rows)):
        assert "training had diverged, and nothing was measured" in words
        assert "is not resolved by this run" in words


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_drawn_all_the_same(measured, tmp_path, value):
    for name in MEASUREMENTS:

        def change(row):
            if row["quantity"] in ("loss", "position", "floor", "height", "change after a step"):
                row["value"] = value
            return row

        assert "is not resolved" in altered(measured, tmp_path, name, change) or name in ("valley", "averaging")


def test_a_batch_without_a_best_rate_is_said(measured, tmp_path):
    def change(row):
        if row["quantity"] in ("best rate", "R^2"):
            row["value"] = float("inf" if row["quantity"] == "best rate" else "nan")
        return row

    assert "no batch has a best rate" in altered(measured, tmp_path, "quadratic", change)


def test_a_measurement_without_a_limit_is_left_out_of_the_shares(tmp_path):
    """Layers that are unfrozen later may bring an optimizer group at a rate of its own."""
    spectrum = [(n, f"e{i}", 20.0 - i) for n in (1, 2, 3) for i in range(1, 12)]
    rows = [
        {"measurement": n, "step": 10 * n, "quantity": "eigenvalue", "of": of, "at": "", "value": value}
        for n, of, value in spectrum
    ]
    for n, limit in ((1, 38.0), (3, 9.5)):
        row = {"measurement": n, "step": 10 * n, "quantity": "stability limit", "of": "", "at": "", "value": limit}
        rows.append(row)
    write_csv(tmp_path / "sharpness.csv", rows)
    figure, caption = measurement_figures(measurements_in(tmp_path))["sharpness"]
    assert "1.2 of the limit of stable steps" in caption  # the median of 19 / 38 and 19 / 9.5
    (top,) = [line for line in figure.axes[0].lines if line.get_label() == "eigenvalues"]
    assert list(top.get_ydata()) == [19.0] * 3
    drawn = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_color() == top.get_color()]
    assert drawn == sorted(drawn)  # e11 first, below the others


# -- the page --------------------------------------------------------------------------------------------------------


def summary_of(page: Path) -> list[str]:
    """What stands above the figures."""
    return [html.unescape(line) for line in re.findall("<li>(.*?)</li>", page.read_text().partition("<figure>")[0])]


def test_the_page_begins_with_a_line_on_each_measurement_and_what_its_signs_mean(measured, tmp_path):
    page = write_measurements(tmp_path, measurements_in(measured), title="A run")
    sharpness, valley, quadratic, averaging, signs = summary_of(page)
    rows = read_csv(measured / "sharpness.csv")
    top = {row["step"]: row["value"] for row in rows if (row["quantity"], row.get("of")) == ("eigenvalue", "e1")}
    assert list(top) == [0, 30, 60]
    assert f"the top eigenvalue is {top[0]:.3g} at step 0 and {top[60]:.3g} at step 60; " in sharpness
    shares = [value / (2 / 0.2) for value in top.values()]  # plain SGD at 0.2
    assert f"it is {sorted(shares)[1]:.2g} of the limit of stable steps in the median" in sharpness
    assert f"above it at {sum(share > 1 for share in shares)} of 3 measurements" in sharpness
    positions = [row["value"] for row in read_csv(measured / "valley.csv") if row["quantity"] == "position"]
    assert f"between the ends of {sum(0 < position < 1 for position in positions)} of 24 steps" in valley
    barriers = sum(r["value"] > 0 for r in read_csv(measured / "valley.csv") if r["quantity"] == "barrier")
    table = re.findall(r"<tr[^>]*>(.*?)</tr>", page.read_text().partition("The valley, burst by burst")[2], re.DOTALL)
    bursts = [re.findall(r"<td[^>]*><div>(.*?)</div>", row, re.DOTALL) for row in table[1:]]
    assert sum(int(burst[1]) for burst in bursts) == 24
    assert sum(int(burst[2]) for burst in bursts) == barriers
    batch = [row for row in read_csv(measured / "quadratic.csv") if row["quantity"] == "best rate"]
    assert f"its best rate is {statistics.median(row['value'] / 0.2 for row in batch):.3g} times lr" in quadratic
    losses: dict[str, list[float]] = {}
    for row in read_csv(measured / "averaging.csv"):
        if row["quantity"] == "loss":
            losses.setdefault(row["of"], []).append(row["value"])
    means = {name: statistics.fmean(losses[name]) for name in ("EMA", "SWA", "two points", "whole run", "last")}
    last = means.pop("last")
    least = min(means, key=lambda name: means[name])
    assert f"the lowest mean loss is that of {least}, {means[least]:.3g}; the last iterate has {last:.3g}." in averaging
    for words in ("η or lr is", "β the", "B the", "T = η σ² / (2B)", "γ scales", "what damped steps feel is", "Δ is"):
        assert words in signs


def test_signs_of_what_was_not_measured_are_left_out(measured, tmp_path):
    files = {"quadratic": measured / "quadratic.csv"}
    *_, signs = summary_of(write_measurements(tmp_path, files, title="A run"))
    assert signs.startswith("Signs: η or lr")
    assert "feel" not in signs


@pytest.mark.parametrize("name", ["sharpness", "valley", "quadratic"])
def test_one_point_tells_no_trend_in_summary_and_caption(measured, tmp_path, name):
    rows = read_csv(measured / f"{name}.csv")
    write_csv(tmp_path / "one.csv", [row for row in rows if row["step"] == rows[0]["step"]])
    files = {name: tmp_path / "one.csv"}
    line, _ = summary_of(write_measurements(tmp_path, files, title="A run"))
    assert line.endswith("; one point: no trend can be told.")
    caption = measurement_figures(files)[name][1]
    assert " is not resolved by this run; one point: no trend can be told." in caption
    assert "median" not in caption + line
    assert "±" not in caption + line


def test_a_second_page_takes_the_place_of_none(measured, tmp_path):
    first = write_measurements(tmp_path, {"valley": measured / "valley.csv"}, title="First")
    text, picture = first.read_text(), (tmp_path / "valley.png").read_bytes()
    shutil.copy(measured / "valley.csv", tmp_path / "valley-1.csv")
    second = write_measurements(tmp_path, {"valley": tmp_path / "valley-1.csv"}, title="Second")
    assert (first.name, second.name) == ("measurements.html", "measurements-1.html")
    assert (first.read_text(), (tmp_path / "valley.png").read_bytes()) == (text, picture)
    assert 'href="valley-1.png"' in second.read_text()


# -- imports ---------------------------------------------------------------------------------------------------------

_REPORTS = ("page", "verdicts", "style", "measurements.report", "escape.report")


@pytest.mark.parametrize("name", _REPORTS)
def test_a_report_imports_neither_torch_nor_lightning_nor_what_runs_use(name):
    lines = ["import sys", f"import lightning_modules.report.{name}", "print(*sys.modules)"]
    loaded = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True).stdout
    modules = set(loaded.split())
    assert f"lightning_modules.report.{name}" in modules
    assert not modules & {"torch", "pytorch_lightning", "matplotlib.pyplot"}
    rooms = {module.split(".")[1] for module in modules if module.startswith("lightning_modules.")}
    assert rooms <= {"report", "support"}
    if name != "escape.report":
        assert not modules & {"matplotlib", "scipy.stats"}  # seconds, which only drawing takes


def test_the_backend_of_the_user_is_left_alone(measured, tmp_path):
    lines = [
        "import matplotlib; matplotlib.use('svg')",
        "from pathlib import Path",
        "from lightning_modules.report.measurements.report import write_measurements",
        f"write_measurements(Path({str(tmp_path)!r}), {{'valley': Path({str(measured / 'valley.csv')!r})}}, title='A')",
        "import sys; print(matplotlib.get_backend(), 'matplotlib.pyplot' in sys.modules)",
    ]
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["svg", "False"]
    assert (tmp_path / "valley.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("names", [["valley", "valley"], ["slope"], ["all", "valley"]])
def test_an_unknown_measurement_is_named(names):
    with pytest.raises(ValueError, match=r"different ones of sharpness, valley, quadratic, averaging, or all, got"):
        make_measurements(names)


def test_measurements_of_a_damped_run_show_what_it_feels(tmp_path):
    import pytorch_lightning as pl

    from lightning_modules import RefreshDirections

    pl.seed_everything(0, verbose=False)
    module = Classifier()
    module.configure_optimizers = lambda: NSGD(module.parameters(), lr=0.2, k=4)
    trainer = pl.Trainer(
        max_steps=13,
        max_epochs=-1,
        callbacks=[RefreshDirections(), SharpnessMonitor(samples=32, every=6, path=tmp_path / "sharpness.csv")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SharpnessMonitor at step")
        trainer.fit(module, datamodule=Digits())
    rows = read_csv(tmp_path / "sharpness.csv")
    felt = {row["step"]: row["value"] for row in rows if row["quantity"] == "felt sharpness"}
    sharpness = {row["step"]: row["value"] for row in rows if row["quantity"] == "eigenvalue" and row["of"] == "e1"}
    assert list(felt) == [6, 12]  # there are no directions before the first step
    assert all(felt[step] < sharpness[step] for step in felt)
    assert "what damped steps feel" in measurement_figures(measurements_in(tmp_path))["sharpness"][1]
    limits = {row["step"]: row["value"] for row in rows if row["quantity"] == "stability limit"}
    line = summary_of(write_measurements(tmp_path, measurements_in(tmp_path), title="A run"))[0]
    median = statistics.median(felt[step] / limits[step] for step in felt)
    assert f"what damped steps feel is {median:.2g} of it, in the median" in line


def test_a_brief_monitor_has_a_figure_of_its_spectrum(tmp_path):
    rows = [
        {"measurement": n, "step": 10 * n, "quantity": quantity, "of": of, "at": "", "value": value}
        for n in (1, 2)
        for quantity, of, value in (("eigenvalue", "e1", 8.0), ("lr", "", 0.1), ("stability limit", "", 20.0))
    ]
    write_csv(tmp_path / "sharpness.csv", rows)
    figure, words = measurement_figures(measurements_in(tmp_path))["sharpness"]
    assert len(figure.axes) == 1
    assert "0.4 of the limit of stable steps, in the median" in words
