"""Paths side by side, on the page of a study: numbers worked out from the files of the measurements alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from studies import finished

from lightning_modules.report.study.figures import study_figures
from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.paths import PATHS, WORDS, paths_tables
from lightning_modules.report.study.report import write_report

SMALL = {"like": "sgd", "batch_size": 20, "label": "small batches"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"methods": ["sgd", SMALL], "lr": 0.05, "seeds": 1, "epochs": 6, "measure": ["sharpness", "valley"]} | {
        "measure_samples": 20
    }
    return finished(tmp_path_factory.mktemp("study"), **options)


def rows_of(folder: Path, method: str, name: str) -> list[dict[str, str]]:
    with (folder / "runs" / f"{method}-0" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_burst_has_a_row_of_its_barriers_height_and_distance(folder):
    (table,) = paths_tables(read_folder(folder))
    expected: list[list[Any]] = []
    for method, label, batches in (("sgd", "SGD", 4), ("small-batches", "small batches", 12)):
        rows = rows_of(folder, method, "valley")
        for i, number in enumerate(sorted({int(row["measurement"]) for row in rows})):
            burst = [row for row in rows if int(row["measurement"]) == number]
            of = {
                name: [float(row["value"]) for row in burst if row["quantity"] == name]
                for name in ("height", "barrier", "floor barrier", "cosine", "distance")
            }
            first = min(int(row["step"]) for row in burst)
            cosines = [value for value in of["cosine"] if value == value]
            expected.append(
                [
                    *(label if i == 0 else "", f"{first // batches + 1}", f"{first}", f"{len(of['height'])}"),
                    *(f"{sum(v > 0 for v in of['barrier'])}", f"{sum(v > 0 for v in of['floor barrier'])}"),
                    f"{sum(of['height']) / len(of['height']):.3g}",
                    *(f"{sum(cosines) / len(cosines):.3g}", f"{of['distance'][-1]:.3g}"),
                ]
            )
    assert table["rows"] == expected
    assert len(table["header"]) == len(expected[0])
    assert len(expected) >= 2


def test_the_figure_has_the_sharpness_of_every_method_and_its_share_of_the_limit(folder):
    figure, _ = study_figures(read_folder(folder))[PATHS]
    for method, label in (("sgd", "SGD"), ("small-batches", "small batches")):
        rows = rows_of(folder, method, "sharpness")
        top = {int(r["step"]): float(r["value"]) for r in rows if (r["quantity"], r["of"]) == ("eigenvalue", "e1")}
        for axes, divided in zip(figure.axes, (1.0, 2 / 0.05), strict=True):  # no momentum
            (line,) = [line for line in axes.get_lines() if line.get_label() == label]
            drawn = dict(zip(*line.get_data(), strict=True))
            assert drawn == pytest.approx({step: value / divided for step, value in top.items()})


@pytest.mark.draws
def test_the_page_has_them_and_that_of_one_path_has_not(folder, tmp_path):
    page = write_report(folder).read_text()
    assert WORDS[:40] in page
    assert "barriers along the floor" in page
    assert "(small batches: batches, epochs or noise of their own, and gradients of such batches)" in page
    assert "(20 of them; few make it larger)" in page
    one = finished(tmp_path, methods=["sgd"], seeds=1, epochs=1, lr=0.05, measure=["valley", "sharpness"])
    assert PATHS not in study_figures(read_folder(one))
    assert paths_tables(read_folder(one)) == []
    assert WORDS[:40] not in write_report(one).read_text()
