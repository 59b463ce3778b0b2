"""How settings are chosen: trials with one seed, the best three again with two more, and the mean of the three."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from studies import finished, silent, study, without_seconds

from lightning_modules.study.compare import run_one, run_study
from lightning_modules.study.methods import RECIPES
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.study.tuning import best_trials, chosen_settings, trial_settings
from lightning_modules.support.files import read_csv
from lightning_modules.support.study_folder import StudyFolder

ONCE: dict[str, Any] = {"seeds": 1, "lr": None}
ONE = {"methods": ["sgd"], **ONCE}
MODEL = "lightning_modules.Classifier"


def rows_of(losses: dict[int, list[float]], method: str = "sgd") -> list[dict[str, Any]]:
    """Rows of trials by their losses with each seed; the accuracy is 1 less the loss."""
    return [
        {"method": method, "trial": trial, "seed": 1000 + i, "val_loss": loss, "val_accuracy": 1 - loss}
        for trial, own in losses.items()
        for i, loss in enumerate(own)
    ]


# -- the choice ------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "chosen", "accuracy"),
    [
        ({0: [0.1, 0.9, 0.8], 1: [0.2, 0.2, 0.2], 2: [0.3, 0.3, 0.3]}, 1, 0.8),  # the winner with one seed loses
        ({0: [0.1, 0.2, 0.3], 1: [0.15, 0.3, 0.3], 2: [0.3, 0.3, 0.3]}, 0, 0.8),
        ({0: [0.1, NAN, 0.1], 1: [0.2, 0.9, 0.9], 2: [0.3, INF, 0.3]}, 1, 1 - 2 / 3),  # what diverged never wins
        ({0: [0.1, NAN, NAN], 1: [0.4, INF, 0.4], 2: [0.5, 0.1, NAN]}, 2, 0.7),  # all did: fewest, then their mean
        ({0: [0.1, 0.1], 1: [0.2, 0.2, 0.2], 2: [0.3, 0.3, 0.3]}, 1, 0.8),  # one that died has no row
    ],
)
def test_the_mean_over_three_seeds_decides(losses, chosen, accuracy):
    tuned = study(**ONE, tune=4)
    trials = rows_of({**losses, 3: [0.99]})
    assert best_trials(tuned, "sgd", trials) == [0, 1, 2]
    settings, target = chosen_settings(tuned, trials, {"sgd": [0, 1, 2]})
    assert settings == {"sgd": trial_settings(tuned, "sgd")[chosen]}
    assert target == pytest.approx(accuracy, rel=1e-12)


def test_the_three_best_with_the_first_seed_run_again_and_what_diverged_last():
    tuned = study(**ONE, tune=5)
    trials = [*rows_of({0: [NAN], 1: [0.4], 2: [0.1], 3: [0.3], 4: [0.2]}), *rows_of({0: [0.0]}, "nsgd")]
    assert best_trials(tuned, "sgd", trials) == [2, 4, 3]
    assert best_trials(tuned, "sgd", rows_of({0: [NAN], 1: [0.4], 2: [INF]}))[0] == 1
    with pytest.raises(ValueError, match=r"every trial of sgd diverged; give search\.sgd a range of smaller rates"):
        best_trials(tuned, "sgd", rows_of({0: [NAN], 1: [INF]}))


def test_more_steps_take_the_settings_of_the_trials_and_the_target_is_the_first_methods():
    tuned = study(methods=["sgd", "nsgd", "sgd-more"], lr=None, tune=2)
    trials = rows_of({0: [0.1, 0.9, 0.9], 1: [0.2, 0.2, 0.2]}) + rows_of({0: [0.3] * 3, 1: [0.4] * 3}, "nsgd")
    settings, target = chosen_settings(tuned, trials, {"sgd": [0, 1], "nsgd": [0, 1]})
    assert settings["sgd-more"] == settings["sgd"] == trial_settings(tuned, "sgd")[1]
    assert settings["nsgd"] == trial_settings(tuned, "nsgd")[0]
    assert target == pytest.approx(0.8, rel=1e-12)


# -- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tune", "repeats"), [(0, 0), (1, 0), (2, 4), (3, 6), (12, 6)])
def test_repeats_are_known_in_number_before_any_run(tune, repeats):
    methods = ["sgd", "own", "nsgd", "sgd-more"]
    plan = plan_runs(study(methods=methods, model={"class_path": MODEL}, lr=None, tune=tune, sweep="lr"))
    assert [run.number for run in plan] == list(range(len(plan)))
    assert len({run.name for run in plan}) == len(plan)
    again = [run for run in plan if run.stage == "again"]
    for method in ("sgd", "nsgd"):
        own = [run for run in again if run.method == method]
        assert [run.name for run in own] == [f"tuning-again/{method}-{i}" for i in range(repeats)]
        assert [run.seed for run in own] == [1001, 1002] * (repeats // 2)
        trials = tuple(run.number for run in plan if run.stage == "tune" and run.method == method)
        assert all(run.needs == trials for run in own)  # all of its method, and only them
    assert len(again) == 2 * repeats
    tuning = {run.number for run in plan if run.tunes}
    assert all(tuning <= set(run.needs) for run in plan if not run.tunes)


def test_a_study_runs_its_best_trials_again_and_takes_the_mean(tmp_path):
    tuned = study(methods=["sgd", "nsgd"], tune=4, epochs=1, **ONCE)
    said: list[str] = []
    run_study(tuned, tmp_path, silent, say=said.append)
    assert said[0].startswith("22 runs to make, 1 at a time")  # 8 trials, 12 repeats and 2 that count
    rows = read_csv(tmp_path / "tuning.csv")
    settled = yaml.safe_load((tmp_path / "settled.yaml").read_text())
    for method in ("sgd", "nsgd"):
        own = [row for row in rows if row["method"] == method]
        first = {row["trial"]: row["val_loss"] for row in own if row["seed"] == 1000}
        assert list(first) == [0, 1, 2, 3]
        losses = {n: [r["val_loss"] for r in own if r["trial"] == n] for n in sorted(first, key=first.__getitem__)[:3]}
        assert sorted((r["trial"], r["seed"]) for r in own if r["seed"] != 1000) == sorted(
            (n, seed) for n in losses for seed in (1001, 1002)
        )
        best = min(losses, key=lambda n: np.mean(losses[n]))
        assert settled["settings"][method] == trial_settings(tuned, method)[best]
        for row in own:  # each run at its trial's rate, with its seed
            assert row["lr"] == trial_settings(tuned, method)[row["trial"]]["lr"]
        for path in (tmp_path / "tuning-again").glob(f"{method}-*"):
            run, result = yaml.safe_load((path / "run.yaml").read_text()), read_csv(path / "results.csv")[0]
            (row,) = [r for r in own if (r["lr"], r["seed"]) == (run["lr"], run["seed"])]
            assert row["val_loss"] == result["val_loss"]
        if method == "sgd":
            assert settled["target"] == pytest.approx(np.mean([r["val_accuracy"] for r in own if r["trial"] == best]))


def test_a_repeat_by_its_number_needs_the_trials_of_its_method_alone(tmp_path):
    tuned = study(methods=["sgd", "nsgd"], tune=2, epochs=1, **ONCE)
    plan = plan_runs(tuned)
    repeat = next(run for run in plan if run.name == "tuning-again/nsgd-0")
    for run in plan[:4]:
        if run.method == "nsgd":
            with pytest.raises(ValueError, match=r"tuning-again/nsgd-0, needs runs .* first; start those"):
                run_one(tuned, tmp_path / "one", repeat.number, silent)
            run_one(tuned, tmp_path / "one", run.number, silent)
    assert run_one(tuned, tmp_path / "one", repeat.number, silent) == "tuning-again/nsgd-0"
    first = min(range(2), key=lambda n: read_csv(tmp_path / "one" / f"tuning/nsgd-{n}" / "results.csv")[0]["val_loss"])
    assert StudyFolder(tmp_path / "one").finalists("nsgd")[0] == first
    run_study(tuned, tmp_path / "one", silent)
    whole = finished(tmp_path / "whole", methods=["sgd", "nsgd"], tune=2, epochs=1, **ONCE)
    assert without_seconds(tmp_path / "one") == without_seconds(whole)


# -- runs that die, and studies that are killed ----------------------------------------------------------------------


def dying(*names: str) -> Any:
    """Progress that raises in the first step of every run of these."""

    def progress(name: str, done: int, total: int, stands: str | None) -> None:
        if stands is not None and name.endswith(names):
            raise RuntimeError("as planned")

    return progress


def test_a_repeat_that_dies_counts_as_one_that_diverged(tmp_path):
    tuned = study(**ONE, tune=2)
    assert run_study(tuned, tmp_path, dying("tuning-again/sgd-0"), say=silent) == ["tuning-again/sgd-0"]
    second = StudyFolder(tmp_path).finalists("sgd")[1]
    settled = yaml.safe_load((tmp_path / "settled.yaml").read_text())["settings"]["sgd"]
    assert settled == trial_settings(tuned, "sgd")[second]
    assert len(read_csv(tmp_path / "tuning.csv")) == 2 + 3
    run_study(tuned, tmp_path, silent)  # it comes too late to be chosen
    assert len(read_csv(tmp_path / "tuning.csv")) == 2 + 3


def test_where_fewer_trials_survive_than_run_again_the_rest_is_left_out(tmp_path):
    said: list[str] = []
    died = run_study(study(**ONE, tune=2), tmp_path, dying("tuning/sgd-0"), say=said.append)
    assert died == ["tuning/sgd-0"]
    assert not any("tuning-again" in line for line in said)  # what was never there to repeat did not die
    again = [number for number, run in enumerate(plan_runs(study(**ONE, tune=2))) if run.name == "tuning-again/sgd-2"]
    with pytest.raises(ValueError, match="repeats trial number 2 of sgd, the best first, and only 1 did not die"):
        run_one(study(**ONE, tune=2), tmp_path, again[0], silent)
    assert [(row["trial"], row["seed"]) for row in read_csv(tmp_path / "tuning.csv")] == [
        (1, s) for s in range(1000, 1003)
    ]


def test_a_trial_that_died_is_not_tried_again_once_others_run_again(tmp_path):
    """It could change which are the best, and so what the repeats that there are already are of."""
    tuned, folder = study(**ONE, tune=4), StudyFolder(tmp_path)

    def progress(name: str, done: int, total: int, stands: str | None) -> None:
        dying("tuning/sgd-1")(name, done, total, stands)
        if name.endswith("tuning-again/sgd-3"):
            raise SystemExit

    with pytest.raises(SystemExit):
        run_study(tuned, tmp_path, progress)
    kept = folder.finalists("sgd")
    assert set(kept) == {0, 2, 3}
    assert run_study(tuned, tmp_path, silent) == ["tuning/sgd-1"]
    assert folder.finalists("sgd") == kept
    assert {row["trial"] for row in read_csv(tmp_path / "tuning.csv")} == {0, 2, 3}


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from studies import silent, study
from lightning_modules.study.compare import run_study
run_study(study(**eval(sys.argv[3])), Path(sys.argv[1]), silent)
"""


@pytest.mark.slow
def test_a_study_killed_amid_the_repeats_ends_as_if_it_had_not_been(tmp_path):
    options: dict[str, Any] = {**ONE, "tune": 2, "epochs": 5}
    whole, folder = finished(tmp_path / "whole", **options), tmp_path / "killed"
    here = str(Path(__file__).parents[1])
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), here, repr(options)])
    deadline = time.monotonic() + 120
    while not (folder / "tuning-again" / "sgd-1").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = len(list(folder.glob("tuning-again/*/results.csv")))
    assert 1 <= made < 4
    assert not (folder / "settled.yaml").exists()
    run_study(study(**options), folder, silent)
    assert without_seconds(folder) == without_seconds(whole)


# -- folders of older versions ---------------------------------------------------------------------------------------


def old(folder: Path, **options: Any) -> Path:
    """A tuned study as it was before the best trials ran again: one seed, its winner settled."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("lightning_modules.study.runs.plan", "lightning_modules.study.tuning"):
            patch.setattr(f"{module}.repeats", lambda study: [])
        finished(folder, **options)
    for path in (folder / "finalists").iterdir():
        path.unlink()
    (folder / "finalists").rmdir()
    return folder


def search_twice_as_far(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = RECIPES["sgd"].search["lr"]
    monkeypatch.setitem(RECIPES, "sgd", replace(RECIPES["sgd"], search={"lr": (low, 2 * high)}))


@pytest.mark.parametrize("by_number", [False, True])
def test_an_old_study_that_is_half_done_goes_on_with_what_it_settled(tmp_path, by_number, monkeypatch):
    options: dict[str, Any] = {"methods": ["sgd"], "seeds": 2, "lr": None, "tune": 3}
    folder = old(tmp_path, **options)
    settled = (folder / "settled.yaml").read_bytes()
    results = (folder / "results.csv").read_bytes()
    before = [row["lr"] for row in read_csv(folder / "tuning.csv")]
    (folder / "runs" / "sgd-1" / "results.csv").unlink()
    search_twice_as_far(monkeypatch)
    tuned = study(**options)
    if by_number:
        number = next(run.number for run in plan_runs(tuned) if run.name == "runs/sgd-1")
        run_one(tuned, folder, number, silent)
    said: list[str] = []
    assert run_study(tuned, folder, silent, say=said.append) == []
    assert [words[:13] for words in said] == ([] if by_number else ["1 run to make"])
    assert (folder / "settled.yaml").read_bytes() == settled
    assert (folder / "results.csv").read_bytes() == results
    assert not (folder / "tuning-again").exists()
    assert not (folder / "finalists").exists()
    rates = [row["lr"] for row in read_csv(folder / "tuning.csv")]
    assert rates == before != [settings["lr"] for settings in trial_settings(tuned, "sgd")]


def test_trials_of_other_ranges_are_not_gone_on_with(tmp_path, monkeypatch):
    """The settings of a study of another version would be chosen from what it did not try."""
    tuned = study(**ONE, tune=2)
    run_one(tuned, tmp_path, 0, silent)
    before = without_seconds(tmp_path)
    search_twice_as_far(monkeypatch)
    was, now = (trial_settings(s, "sgd")[0]["lr"] for s in (tuned, study(**ONE, tune=2)))
    words = (
        rf"tuning/sgd-0 was begun by another version of nsgd, with lr {was} where this one tries {now}; finish the "
        "study with that version, or choose another folder with --out"
    )
    for go_on in (lambda s: run_study(s, tmp_path, silent), lambda s: run_one(s, tmp_path, 1, silent)):
        with pytest.raises(ValueError, match=words):
            go_on(study(**ONE, tune=2))
    assert without_seconds(tmp_path) == before
