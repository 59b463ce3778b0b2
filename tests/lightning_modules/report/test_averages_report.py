"""Averages beside the runs under their schedules, on the page: numbers worked out from results.csv alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from studies import finished, study

from lightning_modules.report.study.averages import AVERAGES, averages_tables, stand_ins
from lightning_modules.report.study.figures import study_figures
from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.report import write_report
from lightning_modules.support.files import read_csv

SCHEDULES = [
    {"like": "sgd", "schedule": {"average": "swa-0.5"}, "label": "as SWA"},
    {"like": "sgd", "schedule": {"average": "two-point-2"}, "label": "as two points"},
]
NAMES = ["ema-0.2", "ema-0.6", "swa-0.5", "two-point-2", "two-point-1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"methods": ["sgd", *SCHEDULES], "seeds": 3, "averages": NAMES, "endpoint": "train_loss"}
    return finished(tmp_path_factory.mktemp("study"), **options)


def losses(folder: Path, method: str, read_out: str) -> np.ndarray[Any, Any]:
    rows = [r for r in read_csv(folder / "results.csv") if (r["method"], r["read_out"]) == (method, read_out)]
    return np.array([r["train_loss"] for r in sorted(rows, key=lambda row: row["seed"])])


def interval(logs: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % t-interval."""
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    return float(np.exp(logs.mean())), float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def test_each_average_stands_beside_the_runs_under_its_schedule(folder):
    table = averages_tables(read_folder(folder))[0]
    assert table["title"].startswith("Training loss: averages of a run")
    assert [row[:2] for row in table["rows"]] == [
        ["SGD", "last weights"],
        ["", "EMA 0.2"],
        ["", "EMA 0.6"],
        ["", "SWA of the last 50 %"],
        ["", "two points 2 apart"],
        ["", "two points 1 apart"],
    ]
    for row, name, other in zip(table["rows"][1:], NAMES, [None, None, "as-swa", "as-two-points", None], strict=True):
        own, last = losses(folder, "sgd", name), losses(folder, "sgd", "last")
        assert row[2] == "{:.4f} ({:.4f} to {:.4f})".format(*interval(np.log(own)))
        assert row[3] == "{:.2f} times ({:.2f} to {:.2f})".format(*interval(np.log(own / last)))
        if other is None:
            assert row[4:] == ["", ""]
            continue
        real = losses(folder, other, "last")
        assert row[4] == "{:.4f} ({:.4f} to {:.4f})".format(*interval(np.log(real)))
        assert row[5] == "{:.2f} times ({:.2f} to {:.2f})".format(*interval(np.log(real / own)))


def test_a_figure_draws_averages_and_runs_by_their_settings(folder):
    figure, words = study_figures(read_folder(folder))[AVERAGES]
    assert [axes.get_xlabel().split(":")[0] for axes in figure.axes] == ["EMA", "SWA", "two points"]
    assert words.startswith("Training loss of averages")
    assert len({axes.get_ylim() for axes in figure.axes}) == 1  # so that kinds can be compared
    drawn = [{line.get_label(): line for line in axes.get_lines()} for axes in figure.axes]
    assert drawn[0]["averages of SGD"].get_xdata() == pytest.approx([1.25, 2.5])  # 1 / 0.8, 1 / 0.4
    means = [np.exp(np.log(losses(folder, "sgd", name)).mean()) for name in NAMES]
    assert drawn[0]["averages of SGD"].get_ydata() == pytest.approx(means[:2])
    assert drawn[1]["averages of SGD"].get_xdata() == pytest.approx([50.0])
    assert drawn[2]["averages of SGD"].get_xdata() == pytest.approx([1.0, 2.0])  # in order
    real = np.exp(np.log(losses(folder, "as-two-points", "last")).mean())
    assert drawn[2]["SGD under their schedules"].get_xdata() == pytest.approx([2.0])
    assert drawn[2]["SGD under their schedules"].get_ydata() == pytest.approx([real])
    level = np.exp(np.log(losses(folder, "sgd", "last")).mean())
    assert all(lines["last weights of SGD"].get_ydata() == pytest.approx([level] * 2) for lines in drawn)


def test_the_page_has_them_and_that_of_a_study_without_has_not(folder, tmp_path):
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Averages and schedules" in page
    assert "SWA of the last 50 %" in page
    assert (folder / f"{AVERAGES}.png").exists()
    plain = finished(tmp_path, methods=["sgd"], seeds=1)
    assert "Averages and schedules" not in (write_report(plain)).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changed",
    [
        {"methods": ["sgd-momentum", *SCHEDULES]},
        {"methods": ["sgd", *({**entry, "clip": 1.0} for entry in SCHEDULES)]},
        {"methods": ["sgd", *({**entry, "schedule": {**entry["schedule"], "name": "linear"}} for entry in SCHEDULES)]},
    ],
)
def test_runs_with_more_than_their_schedule_changed_stand_for_no_average(changed):
    described = replace(study(), **changed).described_methods()
    assert not any("equals" in said for said in described.values())


def test_runs_at_another_rate_are_beside_no_average(tmp_path):
    other = {**SCHEDULES[0], "settings": {"lr": 0.3}}
    found = finished(tmp_path, methods=["sgd", other], seeds=1, lr=None, averages=["swa-0.5"])
    files = read_folder(found)
    assert stand_ins(files) == {}
    assert averages_tables(files)[0]["rows"][1][4:] == ["", ""]
