"""README's two pictures, and the words below them, are what the first command left."""

from __future__ import annotations

import csv
import importlib
import shutil
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
from studies import STEPS, finished

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def picture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("picture")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_pictures_are_small():
    assert (RESULTS / "first_command.svg").stat().st_size < 150_000
    assert (RESULTS / "first_command.png").stat().st_size < 200_000


def test_every_method_is_drawn_with_its_seeds_thin_and_their_median_thick(picture):
    rows = read(RESULTS / "first_command.csv")
    figure = picture.draw(*picture.read_results(RESULTS / "first_command.csv"))
    panels = [(batch, cost) for batch in ("32", "1024") for cost in ("step", "seconds")]
    for axes, (batch, cost) in zip(figure.axes, panels, strict=True):
        assert axes.get_yscale() == "log"
        lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        for method, label in (("sgd", "SGD"), ("nsgd", "NSGD"), ("random", "random directions"), ("adamw", "AdamW")):
            of = [row for row in rows if (row["batch_size"], row["method"]) == (batch, method)]
            runs = [[(float(row[cost]), float(row["loss"])) for row in of if row["seed"] == seed] for seed in "01234"]
            for seed, run in enumerate(runs):
                np.testing.assert_array_equal(lines[f"_{label}, seed {seed}"], run)
            last = [median(run[-1][i] for run in runs) for i in (0, 1)]
            np.testing.assert_allclose(lines[label][-1], last)


def test_the_caption_has_the_median_seconds_of_the_runs(picture):
    last = {(row["batch_size"], row["method"], row["seed"]): row for row in read(RESULTS / "first_command.csv")}
    seconds = [median(float(last[batch, "nsgd", seed]["seconds"]) for seed in "01234") for batch in ("32", "1024")]
    words = " ".join(picture.caption().split())
    assert "seconds of a run at 32 and 1,024: SGD " in words
    assert f", NSGD {seconds[0]:.2g} and {seconds[1]:.2g}, " in words


def test_a_finished_study_becomes_losses_and_a_drawing(picture, tmp_path):
    folder = finished(tmp_path / "studies" / "digits")
    rows, about = picture.read_studies(tmp_path / "studies")
    steps = read(folder / "runs" / "nsgd-1" / "metrics.csv")
    points = [row for row in rows if (row["method"], row["seed"]) == ("nsgd", 1)]
    assert [row["step"] for row in points] == [STEPS // 2, STEPS]  # two epochs
    assert points[1]["loss"] == pytest.approx(mean(float(row["loss"]) for row in steps[STEPS // 2 :]), rel=1e-3)
    assert points[1]["seconds"] == pytest.approx(float(steps[-1]["seconds"]), abs=1e-4)
    assert {row["batch_size"] for row in rows} == {50}
    assert about["settings"][50]["sgd"]["lr"] == 0.2
    assert "torch" in about["packages"]
    assert picture.svg(picture.draw(rows, about)) == picture.svg(picture.draw(rows, about))


def curve(*losses):
    return [({"step": 10.0 * i, "seconds": float(i)}, loss) for i, loss in enumerate(losses, 1)]


def test_a_crossing_is_where_the_drawn_line_meets_the_level(picture):
    between = picture.crossing(curve(1.0, 0.01, 0.5), 0.1)  # half of the way, on a logarithmic scale
    assert between == pytest.approx({"step": 15.0, "seconds": 1.5})
    assert picture.crossing(curve(1.0, 0.5), 0.5) == {"step": 20.0, "seconds": 2.0}
    assert picture.crossing(curve(0.4, 0.5), 0.5) == {"step": 10.0, "seconds": 1.0}
    assert picture.crossing(curve(1.0, 0.5), 0.1) == {}
    assert picture.crossing(curve(1.0, float("nan")), 0.1) == {}


def test_many_epochs_are_taken_together(picture):
    many = curve(*range(1, 122))  # 121 points, three by three
    found = picture.thinned(many)
    assert len(found) == 41
    assert found[0] == ({"step": 30.0, "seconds": 3.0}, 2.0)
    assert found[-1] == (many[-1][0], 121.0)
    assert picture.thinned(many[:60]) == many[:60]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.81, 0.49), "is at SGD's last loss after 49 % of its steps and 49 % of its seconds; NSGD ends lowest."),
        ((0.81, 0.5), "is at SGD's last loss after 50 % of its steps and 50 % of its seconds; SGD ends lowest."),
        ((0.81, 0.51), "does not reach SGD's last loss; SGD ends lowest."),
    ],
)
def test_the_words_say_what_the_medians_do(picture, losses, words):
    about = {"methods": {"sgd": {"label": "SGD", "color": "k"}, "nsgd": {"label": "NSGD", "color": "b", "damps": True}}}
    rows = [
        {"batch_size": 1024, "method": method, "seed": 0, "step": 10 * i, "seconds": i, "loss": loss}
        for method, run in (("sgd", (1.0, 0.6, 0.55, 0.5)), ("nsgd", losses))
        for i, loss in enumerate(run, 1)
    ]
    # From 0.81 at step 10 to 0.49 at 20: on a logarithmic scale 0.5 is at 19.6, of SGD's 40.
    assert picture.findings(rows, about) == f"In batches of 1,024 NSGD {words}"


def test_the_photograph_ends_below_the_first_figure(picture, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("expected the browser chromium on PATH, got none; on Debian, apt-get install chromium")
    image = pytest.importorskip("PIL.Image")
    figure = '<figure style="margin:0;height:300px"></figure>'
    page = tmp_path / "page.html"
    page.write_text(f'<body style="margin:0"><div style="height:900px;background:#00f"></div>{figure}{figure}</body>')
    picture.photograph(page, tmp_path / "page.png", browser)
    with image.open(tmp_path / "page.png") as photo:
        assert photo.size == (picture.WIDTH, 1200 + picture.MARGIN)
        assert photo.convert("RGB").getpixel((5, 5)) == (0, 0, 255)
