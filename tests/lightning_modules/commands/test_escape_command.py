"""The `nsgd escape` command: its numbers against the exact chain and quadrature, its words against its numbers."""

from __future__ import annotations

import html
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

from lightning_modules.commands import escape
from lightning_modules.commands.main import main
from lightning_modules.report.escape.figures import escape_figures
from lightning_modules.report.escape.files import read_folder
from lightning_modules.report.escape.findings import findings, overall, verdict
from lightning_modules.report.escape.report import write_escape
from lightning_modules.study.escape import EscapeStudy, run_escape
from lightning_modules.support.files import Rows, read_csv, write_csv
from nsgd.trajectory.escape import excess_loss, laplace_mass, passage_time
from nsgd.trajectory.escape.potentials import DoubleWell

WELL = DoubleWell(barrier=1.0, skew=0.3)
SHARP, FLAT = WELL.minima
SMALL = EscapeStudy(
    lr=[0.02, 0.01], batch_sizes=[40.0, 50.0], gammas=[1.0, 0.5], walkers=4000, steps=1500
)  # barriers of 4 and 5 temperatures
TINY = replace(SMALL, lr=[0.02], batch_sizes=[20.0, 30.0], gammas=[0.5], walkers=20, steps=50)
ARGS = [
    *("--lr", "[0.02]", "--batch_sizes", "[20,30]", "--gammas", "[0.5]", "--walkers", "20", "--steps", "50"),
]


def silent(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("escape") / "out"
    run_escape(SMALL, folder, silent)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as Python itself does for a script
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def of(folder: Path, quantity: str) -> Rows:
    return [row for row in read_csv(folder / "escape.csv") if row["quantity"] == quantity]


def stationary(lr: float, heat: float, points: int = 1201) -> tuple[float, float]:
    """Share right of the saddle, and mean loss, of the exact chain of SGD on a grid."""
    grid = np.linspace(-2.6, 4.2, points)
    means, spread = grid - lr * WELL.gradient(torch.from_numpy(grid)).numpy(), math.sqrt(2 * lr * heat)
    kernel = np.exp(-0.5 * ((grid[None] - means[:, None]) / spread) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    equations = np.vstack((kernel.T - np.eye(points), np.ones(points)))
    shares = np.linalg.lstsq(equations, np.append(np.zeros(points), 1), rcond=None)[0]
    return float(shares[grid > 0].sum()), float(shares @ WELL(grid))


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_the_slope_of_log_time_is_twice_the_barrier_over_the_noise(finished):
    rows = of(finished, "escape")
    assert [(row["lr"], row["batch_size"]) for row in rows] == [(0.02, 40), (0.02, 50), (0.01, 20), (0.01, 25)]
    x = np.array([row["batch_size"] / row["lr"] for row in rows])
    y = np.log([row["measured"] * row["lr"] for row in rows])
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    relative = np.array([row["standard_error"] / row["measured"] for row in rows])
    error = math.sqrt(centred**2 @ relative**2) / (centred @ centred)
    # The prefactor's own dependence on the temperature takes 4 % off between 4 and 5 of them, the rates change little.
    assert abs(slope - 2 * 1.0 / 1000) < 3 * error + 0.05 * 2 / 1000
    assert error < 0.06 * 2 / 1000


def test_escape_times_are_those_of_the_quadrature_but_for_the_rate(finished):
    for row in of(finished, "escape"):
        heat = row["lr"] * 1000 / (2 * row["batch_size"])
        assert row["temperature"] == pytest.approx(heat)
        time = passage_time(WELL, start=SHARP, end=FLAT, far=-4.0, temperature=heat)
        assert row["exact"] == pytest.approx(time / row["lr"], rel=1e-6)
        assert row["leading"] < row["exact"]
        # Of first order in lr: 5 % at 0.02, by the exact chain in tests/nsgd/trajectory/test_escape.py.
        assert abs(row["measured"] - row["exact"]) < 3 * row["standard_error"] + 2.5 * row["lr"] * row["exact"]
        assert row["arrived"] + row["censored"] == row["walkers"] == 4000
        assert row["standard_error"] == pytest.approx(row["measured"] / math.sqrt(row["arrived"]), rel=0.15)


def test_damping_the_way_out_cools_it_and_damping_across_hardly_matters(finished):
    rows = {(row["damped"], row["gamma"]): row for row in of(finished, "damped escape")}
    assert set(rows) == {("way out", 1), ("way out", 0.5), ("sharpest", 1), ("sharpest", 0.5)}
    assert {(row["lr"], row["batch_size"], row["temperature"]) for row in rows.values()} == {(0.01, 10, 0.5)}
    for gamma in (1, 0.5):
        time = passage_time(WELL, start=SHARP, end=FLAT, far=-4.0, temperature=0.5 * gamma)
        assert rows["way out", gamma]["exact"] == pytest.approx(time / (0.01 * gamma), rel=1e-6)
    for row in rows.values():
        assert abs(row["measured"] - row["exact"]) < 3 * row["standard_error"] + 0.03 * row["exact"]
    out, across = (rows[n, 0.5]["measured"] / rows[n, 1]["measured"] for n in ("way out", "sharpest"))
    assert out > 10  # where lr smaller by half would take twice as many steps at one temperature
    assert 1 < across < 1.3


def test_shares_and_losses_are_those_of_the_exact_chain(finished):
    for size in (40, 50):
        share, loss = stationary(0.02, 10 / size)
        for quantity, wanted in (("share", share), ("loss", loss)):
            (row,) = (r for r in of(finished, quantity) if r["batch_size"] == size and r["origin"] == "both")
            assert abs(row["measured"] - wanted) < 3 * row["standard_error"]
            assert row["standard_error"] < 0.05 * wanted
            assert row["exact"] == pytest.approx(wanted, rel=0.02)  # the quadrature is of small rates
    sharp, flat = (
        next(r["measured"] for r in of(finished, "share") if r["batch_size"] == 50 and r["origin"] == origin)
        for origin in ("sharp", "flat")
    )
    assert sharp < flat - 0.1  # neither is stationary, and together they are
    curvatures = torch.tensor([[WELL.curvature(SHARP)], [WELL.curvature(FLAT)]], dtype=torch.float64)
    mass = laplace_mass(depths=torch.zeros(2), curvatures=curvatures, temperature=0.25)
    for row in of(finished, "share"):
        assert row["leading"] == pytest.approx(float(mass[1]), rel=1e-5)
    prices = [excess_loss(c, lr=0.02, noise=1000, batch_size=40) for c in curvatures]
    assert of(finished, "loss")[0]["leading"] == pytest.approx(float(mass @ torch.tensor(prices).double()), rel=1e-5)


def test_one_seed_gives_the_same_bytes_and_another_does_not_and_global_random_state_is_left(tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_escape(replace(TINY, seed=seed), tmp_path / name, silent)
    a, b, c = ((tmp_path / name / "escape.csv").read_bytes() for name in "abc")
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)


# -- potentials ------------------------------------------------------------------------------------------------------


def test_the_channel_alone_is_predicted_in_two_dimensions(tmp_path):
    run_escape(replace(TINY, potential="channel", gammas=[1.0, 0.5]), tmp_path / "out", silent)
    described = yaml.safe_load((tmp_path / "out" / "landscape.yaml").read_text())
    assert described["damped"].keys() == {"way out", "sharpest"}
    assert described["curvatures"]["saddle"] == pytest.approx([-4, 40])
    for row in of(tmp_path / "out", "escape"):
        h, across = WELL.curvature(SHARP), described["curvatures"]["start"][1]
        kramers = 2 * math.pi / 4 * math.sqrt(4 * 40 / (h * across)) * math.exp(1 / row["temperature"]) / row["lr"]
        assert row["leading"] == pytest.approx(kramers, rel=1e-4)
        assert math.isfinite(row["exact"])


MIRRORED = """
def mirrored(points):
    x = -points[:, 0]
    u = x - 0.3 * ((1 + x * x) ** 0.5 - 1)
    return 5 + (u**2 - 1) ** 2

def tilted(points):  # minima near (-1, 1) and (1, -1), on a slope and turned; the first is deeper
    x, y = (points[:, 0] - points[:, 1]) / 2, (points[:, 0] + points[:, 1]) / 2
    return (x**2 - 1) ** 2 + 0.2 * x + 10 * (y - 0.1 * x**2) ** 2

def slide(points):
    return (points[:, 0] ** 2 - 1) ** 2 / (1 + points[:, 0] ** 4)

def of_arrays(points):
    return points.detach()[:, 0] ** 2

def wrong(points):
    return points**2

number = 3
"""


def test_a_potential_of_ones_own_is_treated_as_the_built_in_one(here):
    """The double well mirrored and lifted: walkers go left, and every prediction is the same."""
    (here / "wells_a.py").write_text(MIRRORED)
    study = replace(TINY, potential="wells_a:mirrored", start=[1.2], goal=[-0.9])
    run_escape(study, here / "own", silent)
    run_escape(TINY, here / "built-in", silent)
    described = [yaml.safe_load((here / name / "landscape.yaml").read_text()) for name in ("own", "built-in")]
    assert described[0]["barrier"] == pytest.approx(described[1]["barrier"])
    assert described[0]["points"]["start"] == pytest.approx([-x for x in described[1]["points"]["start"]], rel=1e-5)
    assert described[0]["names"] == described[1]["names"] == {"start": "sharp", "goal": "flat"}
    own, built_in = (read_csv(here / name / "escape.csv") for name in ("own", "built-in"))
    for quantity in ("escape", "share", "loss"):
        pairs = zip(*([r for r in rows if r["quantity"] == quantity] for rows in (own, built_in)), strict=True)
        for a, b in pairs:
            assert a["exact"] == pytest.approx(b["exact"], rel=1e-6)
            assert a["leading"] == pytest.approx(b["leading"], rel=1e-6)
    assert {row.get("damped") for row in own} == {None, "way out"}
    write_escape(here / "own")


def test_a_potential_of_ones_own_in_two_dimensions(here):
    (here / "wells_b.py").write_text(MIRRORED)
    study = replace(
        TINY,
        potential="wells_b:tilted",
        start=[1.1, -0.8],
        goal=[-0.8, 1.1],
        batch_sizes=[40.0],
        walkers=500,
        steps=600,
    )
    run_escape(study, here / "out", silent)
    described = yaml.safe_load((here / "out" / "landscape.yaml").read_text())
    low, middle, high = np.sort(np.roots([4, 0, -4, 0.2]))  # along the valley's bottom f is that of x alone
    for name, x in (("start", high), ("saddle", middle), ("goal", low)):
        assert described["points"][name] == pytest.approx([0.1 * x**2 + x, 0.1 * x**2 - x], rel=1e-5)
    heights = [(x**2 - 1) ** 2 + 0.2 * x for x in (middle, high)]
    assert described["barrier"] == pytest.approx(heights[0] - heights[1], rel=1e-5)
    first, *_ = of(here / "out", "escape")
    assert math.isnan(first["exact"])
    # To leading order: 17 % too short at these 3.2 temperatures, 5 % at 8, by 4,000 walkers.
    assert abs(first["measured"] / first["leading"] - 1.17) < 3 * first["standard_error"] / first["leading"]
    shares = [r for r in of(here / "out", "share") if r["origin"] == "both"]
    assert all(abs(r["measured"] - r["leading"]) < 3 * r["standard_error"] + 0.05 for r in shares)
    _, damped, _, _ = findings(read_folder(here / "out"))
    assert damped.startswith("NSGD, not resolved")
    assert damped.count("no formula predicts it") == 2
    write_escape(here / "out")


# -- the folder ------------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    run_escape(TINY, tmp_path / "a", silent)
    called: list[str] = []

    def stop(name: str, done: int, total: int, said: str) -> None:
        called.append(name)
        if name.startswith("run 4 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_escape(TINY, tmp_path / "b", stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "runs").iterdir()}
    assert len(kept) == 3
    assert not (tmp_path / "b" / "escape.csv").exists()
    run_escape(TINY, tmp_path / "b", silent)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (tmp_path / "a" / "escape.csv").read_bytes() == (tmp_path / "b" / "escape.csv").read_bytes()


@pytest.mark.parametrize(
    ("follows", "said"),
    [
        ("constant", "noise whose variance is the same everywhere; another noise decides otherwise"),
        ("loss", "noise whose variance grows with the loss, but for 0.3 of it everywhere"),
        ("curvature", "noise whose variance is the curvature's, but for 0.3 of it everywhere"),
    ],
)
def test_what_the_noise_follows_is_in_predictions_and_captions(tmp_path, follows, said):
    study = replace(TINY, noise_follows=follows, noise_floor=0.3)
    run_escape(study, tmp_path, silent)
    landscape = yaml.safe_load((tmp_path / "landscape.yaml").read_text())
    assert ("effective_barrier" in landscape) == (follows != "constant")
    assert [row["exact"] > 0 for row in of(tmp_path, "escape")] == [True, True]
    page = html.unescape(write_escape(tmp_path).read_text())
    assert page.count(f"Assumed: {said}") == 3  # what was run, and two captions
    assert ("ΔU" in page) == (follows != "constant")


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.5, math.nan])
def test_a_floor_of_the_noise_that_nobody_can_start_from_is_refused(tmp_path, floor):
    with pytest.raises(ValueError, match="expected noise_floor above 0 and at most 1, got"):
        run_escape(replace(TINY, noise_follows="loss", noise_floor=floor), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_momentum_is_in_numbers_predictions_and_captions(tmp_path):
    study = replace(SMALL, batch_sizes=[80.0, 100.0], gamma_batch_size=20.0, walkers=1000, momentum=0.5)
    run_escape(study, tmp_path, silent)
    for row in of(tmp_path, "escape"):
        assert row["temperature"] == row["lr"] * 1000 / (2 * row["batch_size"] * 0.5)
        assert row["measured"] == pytest.approx(row["exact"], rel=0.15)
    for quantity in ("share", "loss"):
        for row in of(tmp_path, quantity):
            if row["origin"] == "both":
                assert abs(row["measured"] - row["exact"]) < 3 * row["standard_error"] + 0.03 * row["exact"]
    page = html.unescape(write_escape(tmp_path).read_text())
    assert "double-well, momentum 0.5, 1,000 walkers" in page
    assert "T = ησ²/(2B(1 − β)), with momentum β = 0.5" in page
    files = read_folder(tmp_path)
    (slope,) = re.findall(r"is ([\d.]+) ± [\d.]+ times 2\(1 − β\)Δf/σ²", findings(files)[0])
    times = {(row["lr"], row["batch_size"] / row["lr"]): row["measured"] for row in files.of("escape")}
    grown = [math.log(times[lr, 5000.0] / times[lr, 4000.0]) / 1000 for lr in (0.02, 0.01)]
    assert float(slope) == pytest.approx(sum(grown) / 2 / (2 * 0.5 * 1.0 / 1000), abs=1e-3)
    (axes, _) = escape_figures(tmp_path)["escape-time"][0].axes
    predicted = [line for line in axes.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    for lr, line in zip((0.02, 0.01), predicted, strict=True):  # another one at each rate
        rows = [row for row in files.of("escape") if row["lr"] == lr]
        np.testing.assert_allclose(line.get_ydata(), [2 * lr * row["exact"] for row in rows])


def test_a_study_of_before_there_was_momentum_or_a_choice_of_noise_is_the_same_study(tmp_path):
    run_escape(TINY, tmp_path, silent)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    old = {name: value for name, value in config.items() if not name.startswith("noise_") and name != "momentum"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    run_escape(TINY, tmp_path, silent)
    assert "Assumed: noise whose variance is the same everywhere" in write_escape(tmp_path).read_text()
    with pytest.raises(ValueError, match="noise_follows was constant, now loss"):
        run_escape(replace(TINY, noise_follows="loss"), tmp_path, silent)


def test_progress_goes_from_nothing_to_all(tmp_path):
    seen: list[tuple[int, int]] = []
    run_escape(TINY, tmp_path / "out", lambda name, done, total, said: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert {total for _, total in seen} == {done[-1]} == {6 * 50}  # 2 escapes, 2 stays, 2 damped ones


# -- the command -----------------------------------------------------------------------------------------------------


def code_of(*args: str) -> int:
    try:
        return main(list(args))
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_the_command_leaves_its_folder_and_repeats_its_config(capsys, here):
    assert code_of("escape", *ARGS) == 0
    out = capsys.readouterr().out
    for said in ("Escape from a minimum", "Kramers", "Escape times, not resolved", "run 6 of 6", "escape.html"):
        assert said in out
    folder = here / "nsgd-escape"
    assert {path.name for path in folder.iterdir()} == {
        *("escape.csv", "potential.csv", "config.yaml", "landscape.yaml", "environment.yaml", "runs", "escape.html"),
        *(f"{name}.{kind}" for name in ("potential", "escape-time", "flat-minimum") for kind in ("png", "pdf")),
    }
    assert code_of("escape", "--config", "nsgd-escape/config.yaml", "--out", "again") == 0
    assert (folder / "escape.csv").read_bytes() == (here / "again" / "escape.csv").read_bytes()


def test_help_shows_the_options(capsys):
    assert code_of("escape", "--help") == 0
    out = capsys.readouterr().out
    for option in ("--out", "--potential", "--batch_sizes", "--gammas", "--walkers", "--seed", "module:name"):
        assert option in out


OWN = ["--potential", "wells_c:mirrored"]
ENDS = ["--start", "[1.2]", "--goal", "[-0.9]"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--walkers", "1"], "walkers of at least 2, got 1"),
        (["--walkers", "few"], "walkers"),
        (["--steps", "0"], "steps of at least 1"),
        (["--seed", "-1"], "seed of at least 0"),
        (["--noise", "0"], "noise above 0"),
        (["--lr", "[]"], "lr to be different numbers above 0, got []"),
        (["--lr", "[0.02,0.02]"], "lr to be different numbers"),
        (["--lr", "[0.2]"], "below 2 / curvature"),
        (["--lr", "[0.3]", "--momentum", "0.5"], "below 2 (1 + momentum) / curvature"),
        (
            ["--momentum", "0.5", "--noise_follows", "loss"],
            "no prediction is known; leave out one of the two",
        ),
        (["--momentum", "1"], "expected momentum of at least 0 and below 1, got 1"),
        (["--momentum", "-0.1"], "expected momentum of at least 0 and below 1, got -0.1"),
        (["--gammas", "[0]"], "gammas to be different numbers above 0"),
        (["--batch_sizes", "[5000]"], "a barrier of at most 100 temperatures, got 500"),
        (["--barrier", "-1"], "expected barrier to be a finite number above 0"),
        (["--walls", "0"], "expected walls to be a finite number above 0"),
        (["--start", "[1]"], "--start only with a potential of your own"),
        (["--nonsense", "1"], "nonsense"),
        (["--potential", "triple-well"], "double-well, channel, or module:name of your own, got 'triple-well'"),
        (["--potential", "no_such_module:f", *ENDS], "a module that can be imported"),
        (["--potential", "wells_c:nothing", *ENDS], "a function of wells_c"),
        (["--potential", "wells_c:number", *ENDS], "a function of wells_c"),
        (OWN, "--start and --goal with a potential of your own"),
        ([*OWN, "--start", "[1.2]", "--goal", "[1,2]"], "points of one dimension"),
        ([*OWN, "--start", "[1.2]", "--goal", "[0.7]"], "two minima, got one"),
        ([*OWN, *ENDS, "--saddle", "[0,0]"], "--saddle to have 1 coordinates"),
        ([*OWN, *ENDS, "--saddle", "[0.9]"], "a saddle with one negative curvature near [0.9]"),
        (["--potential", "wells_c:of_arrays", *ENDS], "that autograd can follow"),
        (["--potential", "wells_c:wrong", *ENDS], "got shape (2, 1) for 2 points"),
        (["--potential", "wells_c:slide", *ENDS], "a potential that rises 40 temperatures"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(capsys, here, args, said):
    (here / "wells_c.py").write_text(MIRRORED)
    assert code_of("escape", *ARGS, *args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("nsgd: ")
    assert said in captured.err
    assert not (here / "nsgd-escape").exists()


def test_a_folder_of_something_else_is_refused_and_left_alone(capsys, here):
    run_escape(TINY, here / "a", silent)
    before = {path: path.read_bytes() for path in (here / "a").rglob("*") if path.is_file()}
    assert code_of("escape", *ARGS, "--out", "a", "--walkers", "30") == 2
    assert "a holds another study: walkers was 20, now 30; choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (here / "a").rglob("*") if path.is_file()} == before
    (here / "b").mkdir()
    (here / "b" / "notes.txt").write_text("mine")
    assert code_of("escape", *ARGS, "--out", "b") == 2
    assert "b holds files but no study" in capsys.readouterr().err
    assert [path.name for path in (here / "b").iterdir()] == ["notes.txt"]
    assert code_of("escape", *ARGS, "--out", "b/notes.txt") == 2
    assert "is, or is inside, a file" in capsys.readouterr().err


def test_a_potential_that_has_changed_is_another_study(capsys, here):
    (here / "wells_d.py").write_text(MIRRORED)
    args = ["--potential", "wells_d:mirrored", *ENDS, "--out", "a"]
    run_escape(replace(TINY, potential="wells_d:mirrored", start=[1.2], goal=[-0.9]), here / "a", silent)
    (here / "wells_d.py").write_text(MIRRORED.replace("5 + (u**2", "5 + 1.1 * (u**2"))
    sys.modules.pop("wells_d")
    assert code_of("escape", *ARGS, *args) == 2
    assert "holds another study: barrier was 1.0, now 1.1" in capsys.readouterr().err


def test_walkers_that_diverge_are_said_so(capsys, here):
    """A potential that is ever steeper outside: stable at its minima, and not beyond."""
    (here / "wells_e.py").write_text("def f(p):\n    x = p[:, 0]\n    return (x**2 - 1) ** 2 + 0.3 * x**8\n")
    args = ["--potential", "wells_e:f", "--start", "[-0.8]", "--goal", "[0.8]", "--gamma_batch_size", "0.2"]
    assert code_of("escape", *ARGS, *args) == 2
    assert "SGD diverged at lr 0.02" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(capsys, here, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(escape, "run_escape", interrupted)
    assert code_of("escape", *ARGS) == 130
    assert "the same command keeps the finished runs and goes on" in capsys.readouterr().err


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_the_page_stands_alone_and_holds_the_pictures(folder):
    source = write_escape(folder).read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|\bsrc=|url\((?!#)", source)
    assert source.count("<figure>") == 3  # that of the potential, too
    said = findings(read_folder(folder))
    for name, words in zip(("escape-time", "flat-minimum"), (said[:2], said[2:]), strict=True):
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert len({tuple(pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3)}) > 10
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert " ".join(words) in html.unescape(source)
    assert source.count("<table") == 3
    shutil.rmtree(folder / "runs")
    assert write_escape(folder).read_text(encoding="utf-8") == source  # from the same files, again


def altered(folder: Path, quantity: str, **change: Any) -> tuple[str, str, str, str]:
    """The findings after every row of a quantity is changed: a number multiplies, a function is called."""
    rows = read_csv(folder / "escape.csv")
    for row in (row for row in rows if row["quantity"] == quantity):
        for name, value in change.items():
            row[name] = value(row) if callable(value) else row[name] * value
    write_csv(folder / "escape.csv", rows)
    return findings(read_folder(folder))


def test_the_findings_of_this_run_are_confirmed_by_its_numbers(folder):
    exact = {"measured": lambda row: row["exact"], "standard_error": lambda row: 0.001 * row["exact"]}
    for quantity in ("escape", "damped escape", "share", "loss"):
        times, damped, share, loss = altered(folder, quantity, **exact)
    assert times.startswith("Escape times, confirmed: ")
    assert "the times are within 0.0% of it" in times
    rows = of(folder, "escape")
    assert f"{sum(r['censored'] for r in rows):,} of 16,000 walkers had not arrived after 1,500 steps" in times
    assert damped.startswith("NSGD, confirmed: with γ = 0.5 along the way out (curvature 11.5)")
    way_out = {r["gamma"]: r["exact"] for r in of(folder, "damped escape") if r["damped"] == "way out"}
    assert f"{way_out[0.5] / way_out[1]:.3g} times the steps of γ = 1" in damped
    assert share.startswith("Flat minimum, confirmed: at batch sizes 40 to 50")
    assert "surely above half at 2 of 2" in share
    assert loss.startswith("Price of a large η/B, confirmed: the mean loss above the minimum rises from")


@pytest.mark.parametrize(
    ("quantity", "index", "wrong"),
    [
        # Twice the slope: the times squared.
        ("escape", 0, {"measured": lambda row: row["measured"] ** 2 * row["lr"], "standard_error": 0.01}),
        ("damped escape", 1, {"measured": 1.3, "standard_error": 0.1}),
        ("share", 2, {"measured": 0.7, "standard_error": 0.1}),
        ("loss", 3, {"measured": 1.3, "standard_error": 0.1}),
    ],
)
def test_numbers_that_differ_are_not_confirmed_and_coarse_ones_are_not_resolved(folder, quantity, index, wrong):
    coarse = altered(folder, quantity, standard_error=50)
    assert ", not resolved: " in coarse[index]
    altered(folder, quantity, standard_error=1 / 50)
    said = altered(folder, quantity, **wrong)
    assert ", not confirmed: " in said[index]


def test_times_that_nobody_arrived_for_are_not_resolved(folder):
    nobody = {"arrived": 0, "measured": math.inf, "standard_error": math.inf, "censored": lambda row: row["walkers"]}
    times, *_ = altered(folder, "escape", **{n: (v if callable(v) else lambda _, v=v: v) for n, v in nobody.items()})
    assert times.startswith("Escape times, not resolved: fewer than two values of B/η")
    assert "16,000 of 16,000 walkers had not arrived" in times
    assert "unknown" in write_escape(folder).read_text(encoding="utf-8")


def test_the_picture_of_the_potential_is_the_potential(folder):
    rows = read_csv(folder / "potential.csv")
    x = torch.tensor([row["distance"] for row in rows], dtype=torch.float64)[:, None]  # the saddle is at 0
    loss = WELL(x) - WELL(torch.tensor([[SHARP]], dtype=torch.float64))
    assert [row["loss"] for row in rows] == pytest.approx(loss.flatten().tolist(), abs=1e-9)
    assert x.min() < SHARP < 0 < FLAT < x.max()
    source = html.unescape(write_escape(folder).read_text(encoding="utf-8"))
    assert source.index("<h2>Potential</h2>") < source.index("<h2>Escape time</h2>") < source.index("<table")
    assert "T = ησ²/(2B); Δf = 1 is the barrier, which is 4 to 5 temperatures high here." in source
    (folder / "potential.csv").unlink()  # as in folders from before it was kept
    assert write_escape(folder).read_text(encoding="utf-8").count("<figure>") == 2


def test_the_page_says_first_what_is_confirmed(folder):
    exact = {"measured": lambda row: row["exact"], "standard_error": lambda row: 0.001 * row["exact"]}
    for quantity in ("escape", "damped escape", "share"):
        altered(folder, quantity, **exact)
    altered(folder, "loss", standard_error=50)
    assert overall(read_folder(folder)) == (
        "Confirmed: escape times, NSGD, flat minimum. Not resolved: price of a large η/B."
    )


def test_one_batch_size_says_nothing_of_how_a_number_changes(folder):
    rows = [row for row in read_csv(folder / "escape.csv") if row["batch_size"] in (10, 40)]
    write_csv(folder / "escape.csv", rows)
    times, _, share, loss = findings(read_folder(folder))
    assert times.startswith("Escape times, not resolved: fewer than two values of B/η")
    assert share.startswith("Flat minimum, not resolved: there is one batch size alone")
    assert loss.startswith("Price of a large η/B, not resolved: there is one batch size alone")
    write_escape(folder)


def test_a_price_that_falls_and_a_minimum_that_is_left_are_said_as_such(folder):
    *_, loss = altered(folder, "loss", measured=lambda row: 1 / row["measured"])
    assert "the mean loss above the minimum does not rise" in loss
    *_, share, _ = altered(folder, "share", measured=0.5)
    assert "surely above half at 0 of 2" in share


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ([(1.05, 0.02, 1.0)], "confirmed"),
        ([(1.05, 0.03, 1.0)], "not resolved"),
        ([(1.2, 0.04, 1.0)], "not confirmed"),
        ([(1.2, 0.06, 1.0)], "not resolved"),
        ([(1.0, 0.01, 1.0), (1.2, 0.04, 1.0)], "not confirmed"),
        ([(1.0, 0.01, 1.0), (1.0, 0.2, 1.0)], "not resolved"),
        ([(1.0, 0.01, 1.0), (math.nan, math.nan, 1.0)], "not resolved"),
        ([(math.inf, math.inf, 1.0)], "not resolved"),
        ([], "not resolved"),
    ],
)
def test_verdicts(checks, said):
    assert verdict(checks) == said
