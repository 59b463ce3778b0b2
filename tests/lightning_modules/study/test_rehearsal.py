"""How often a study refreshes: measured once for each method, before the runs, and the same in every one of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import OPTIONS, finished, silent, study, without_seconds

from lightning_modules.study import rehearsal
from lightning_modules.study.compare import run_one, run_study
from lightning_modules.study.methods import NSGDOptions
from lightning_modules.study.rehearsal import prices
from lightning_modules.support.files import read_csv, write_yaml_once

AUTO = replace(OPTIONS, refresh_every="auto", overhead=0.5)


def interval(folder: Path, method: str) -> Any:
    path = folder / "rehearsals" / f"{method}.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else None


def refreshed(folder: Path, run: str) -> list[int]:
    """The steps before which a run refreshed, from 0 on."""
    rows = read_csv(folder / "runs" / run / "metrics.csv")
    counts = [0, *(row["refreshes"] for row in rows)]
    return [i for i in range(len(rows)) if counts[i + 1] > counts[i]]


@pytest.fixture
def timed(monkeypatch):
    """Rehearsals in which a refresh takes twice as long as two steps; says which there were."""
    methods = []

    def found(rows):
        methods.append(len(rows))
        return 2.0, 1.0

    monkeypatch.setattr(rehearsal, "prices", found)
    return methods


def refuse(rows: Any) -> Any:
    raise AssertionError("measured anew")


# -- what is measured -----------------------------------------------------------------------------------------


def test_the_price_is_what_steps_with_a_refresh_take_more():
    seconds = [9.0, 9.1, 9.2, 9.7, 9.8, 9.9, 15.0, 15.1, 65.1, 65.6]  # the first step, and two pauses, do not count
    refreshes = [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    rows = [{"seconds": s, "refreshes": n} for s, n in zip(seconds, refreshes, strict=True)]
    assert prices(rows) == pytest.approx((0.4, 0.1))


def test_where_every_refresh_failed_none_is_priced():
    assert prices([{"seconds": float(i), "refreshes": 0} for i in range(5)]) == (0.0, 1.0)


# -- studies --------------------------------------------------------------------------------------------------


def test_every_run_of_a_method_takes_the_number_that_its_rehearsal_found(tmp_path, timed):
    folder = finished(tmp_path / "out", methods=["sgd", "nsgd", "nsgd-hessian", "random"], epochs=3, nsgd=AUTO)
    assert timed == [16, 16]  # of the two that look at the loss a second time
    for method in ("nsgd", "nsgd-hessian"):
        assert interval(folder, method) == {"refresh_every": 4}  # 2 / 1 / 0.5
        for seed in (0, 1):
            assert refreshed(folder, f"{method}-{seed}") == [0, 4, 8]
            own = yaml.safe_load((folder / "runs" / f"{method}-{seed}" / "run.yaml").read_text())
            assert own["refresh_every"] == 4
    for method in ("sgd", "random"):
        assert interval(folder, method) is None
        assert "refresh_every" not in yaml.safe_load((folder / "runs" / f"{method}-0" / "run.yaml").read_text())
    assert yaml.safe_load((folder / "config.yaml").read_text())["nsgd"]["refresh_every"] == "auto"


def test_a_number_that_is_given_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "prices", refuse)
    folder = finished(tmp_path / "out", seeds=1)
    assert refreshed(folder, "nsgd-0") == [0, 3, 6]
    assert not (folder / "rehearsals").exists()


def test_directions_of_training_gradients_need_none(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "prices", refuse)
    folder = finished(tmp_path / "out", seeds=1, nsgd=NSGDOptions(k=2))
    assert not (folder / "rehearsals").exists()


def test_a_folder_keeps_its_number(tmp_path, timed, monkeypatch):
    chosen = study(methods=["nsgd"], seeds=2, nsgd=AUTO)
    run_one(chosen, tmp_path / "out", 1, silent)  # one run of a study measures as well
    assert (timed, interval(tmp_path / "out", "nsgd")) == ([16], {"refresh_every": 4})
    monkeypatch.setattr(rehearsal, "prices", refuse)
    run_study(chosen, tmp_path / "out", silent)
    assert refreshed(tmp_path / "out", "nsgd-0") == refreshed(tmp_path / "out", "nsgd-1") == [0, 4]
    before = without_seconds(tmp_path / "out")
    run_study(chosen, tmp_path / "out", silent)
    assert without_seconds(tmp_path / "out") == before


def test_trials_take_it_too(tmp_path, timed):
    folder = finished(tmp_path / "out", methods=["nsgd"], seeds=1, tune=2, lr=None, nsgd=AUTO)
    assert timed == [16]
    for trial in (0, 1):
        own = yaml.safe_load((folder / "tuning" / f"nsgd-{trial}" / "run.yaml").read_text())
        assert own["refresh_every"] == 4


def test_config_and_rehearsals_make_the_same_study_in_another_folder(tmp_path, timed, monkeypatch):
    chosen = study(methods=["sgd", "nsgd"], seeds=1, nsgd=AUTO)
    run_study(chosen, tmp_path / "one", silent)
    monkeypatch.setattr(rehearsal, "prices", lambda rows: (50.0, 1.0))  # another machine
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "config.yaml", tmp_path / "two")
    shutil.copytree(tmp_path / "one" / "rehearsals", tmp_path / "two" / "rehearsals")
    run_study(chosen, tmp_path / "two", silent)
    assert without_seconds(tmp_path / "one") == without_seconds(tmp_path / "two")
    run_study(chosen, tmp_path / "three", silent)
    assert interval(tmp_path / "three", "nsgd") == {"refresh_every": 100}


@pytest.mark.slow
def test_runs_in_processes_of_their_own_take_the_number_of_the_main_one(tmp_path, timed):
    chosen = study(methods=["nsgd"], seeds=2, nsgd=AUTO)
    assert run_study(chosen, tmp_path / "out", silent, jobs=2) == []
    assert timed == [16]
    assert refreshed(tmp_path / "out", "nsgd-0") == refreshed(tmp_path / "out", "nsgd-1") == [0, 4]
    alone = finished(tmp_path / "alone", methods=["nsgd"], seeds=2, nsgd=AUTO)
    assert without_seconds(tmp_path / "out") == without_seconds(alone)


def test_the_clock_of_this_machine_finds_some_number(tmp_path):
    folder = finished(tmp_path / "out", methods=["nsgd"], seeds=1, nsgd=AUTO)
    found = interval(folder, "nsgd")["refresh_every"]
    assert isinstance(found, int)
    assert found >= 1
    assert refreshed(folder, "nsgd-0") == list(range(0, 8, found))


def test_a_rehearsal_that_dies_leaves_the_other_methods_alone(tmp_path, monkeypatch):
    def dies(rows):
        raise ZeroDivisionError("as planned")

    monkeypatch.setattr(rehearsal, "prices", dies)
    said = []
    died = run_study(study(seeds=1, nsgd=AUTO), tmp_path / "out", silent, say=said.append)
    assert died == ["runs/nsgd-0"]
    assert "no time is predicted, for a first step ended with ZeroDivisionError: as planned" in said[0]
    assert {row["method"] for row in read_csv(tmp_path / "out" / "results.csv")} == {"sgd"}
    assert not (tmp_path / "out" / "rehearsals").exists()


# -- the file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_of_several_processes_the_first_one_s_file_stays(tmp_path, monkeypatch, links):
    if not links:

        def no_link(self, target):
            raise PermissionError("no links here")

        monkeypatch.setattr(Path, "hardlink_to", no_link)
    path = tmp_path / "deeper" / "a.yaml"
    for n in (1, 2):
        write_yaml_once(path, {"n": n})
    assert yaml.safe_load(path.read_text()) == {"n": 1 if links else 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.yaml"]
