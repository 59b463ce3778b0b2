"""The folder of a study: names that never change, reading that writes nothing, and the folder of 0.1.0."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from lightning_modules.support.run_folder import RunFolder
from lightning_modules.support.study_folder import StudyFolder, run_name

DIGITS = Path(__file__).parents[3] / "benchmarks" / "results" / "digits"


def test_files_have_the_names_that_old_folders_have():
    folder = StudyFolder(Path("out"))
    documents, tables = ("config", "settled", "environment"), ("results", "summary", "times", "target", "target-times")
    for suffix, names in (("yaml", documents), ("csv", tables)):
        for name in names:
            assert folder.file(name) == Path("out", f"{name}.{suffix}")
            assert (DIGITS / folder.file(name).name).is_file()
    assert folder.file("report") == Path("out/report.html")
    names = [run_name(stage, "sgd", 3) for stage in ("study", "tune", "again", "sweep")]
    assert names == ["runs/sgd-3", "tuning/sgd-3", "tuning-again/sgd-3", "sweep/sgd-3"]
    assert folder.run(names[0]).path == Path("out/runs/sgd-3")


def test_the_folder_of_the_first_version_is_read():
    folder = StudyFolder(DIGITS)
    assert folder.settled
    assert folder.document("config") == yaml.safe_load((DIGITS / "config.yaml").read_text())
    with (DIGITS / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["train_loss"]) for row in folder.table("results")] == [
        (row["method"], float(row["train_loss"])) for row in rows
    ]
    assert folder.document("methods") == {}  # which it does not have
    assert folder.run("runs/sgd-0").steps() == []  # nor these


def test_what_reads_writes_nothing(tmp_path):
    folder = StudyFolder(tmp_path / "out")
    assert folder.document("config") == {}
    assert folder.table("results") == []
    assert not folder.settled
    assert folder.refresh_every("nsgd") is None
    assert folder.finalists("nsgd") == []
    run = folder.run("runs/sgd-0")
    assert (run.settings(), run.steps(), run.results(), run.finished, run.died) == ({}, [], [], False, False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_settled_stays(tmp_path):
    folder = StudyFolder(tmp_path)
    for lr in (0.1, 0.2):
        folder.settle({"sgd": {"lr": lr}}, None)
        folder.keep_refresh_every("nsgd", round(10 * lr))
        folder.keep_finalists("nsgd", [round(10 * lr), 7])
    assert folder.document("settled") == {"settings": {"sgd": {"lr": 0.1}}, "target": None}
    assert folder.refresh_every("nsgd") == 1
    assert folder.finalists("nsgd") == [1, 7]


@pytest.mark.parametrize(("text", "finished"), [("", False), ("method,seed\n", False), ("method,seed\nsgd,0\n", True)])
def test_a_run_is_finished_where_it_has_results(tmp_path, text, finished):
    (tmp_path / "results.csv").write_text(text)
    assert RunFolder(tmp_path).finished is finished


def test_a_run_begins_without_what_an_interrupted_one_left(tmp_path):
    run = StudyFolder(tmp_path).run("runs/sgd-0")
    run.fail("no memory")
    (run.path / "valley.csv").write_text("step\n1\n")
    assert run.died
    run.begin({"lr": 0.1}, measurements=["valley", "sharpness"])
    assert {path.name for path in run.path.iterdir()} == {"run.yaml"}
    assert run.settings() == {"lr": 0.1}
    run.end([{"step": 1, "loss": 2.0}], [{"read_out": "last", "train_loss": 1.5}])
    assert run.finished
    assert (run.steps(), run.results()) == ([{"step": 1, "loss": 2.0}], [{"read_out": "last", "train_loss": 1.5}])


def test_a_table_without_rows_is_no_file(tmp_path):
    folder = StudyFolder(tmp_path)
    folder.write_table("deaths", [{"run": "runs/sgd-0"}])
    assert folder.table("deaths") == [{"run": "runs/sgd-0"}]
    folder.write_table("deaths", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["results", "metrics"])
def test_a_run_whose_rows_are_missing_is_named_and_not_finished(tmp_path, name):
    run = StudyFolder(tmp_path).run("runs/sgd-0")
    run.begin({"lr": 0.1})
    rows = [{"step": i, "loss": 0.5} for i in range(3)]
    run.end(rows, rows)
    assert run.settings() == {"lr": 0.1}
    assert run.finished
    path = run.path / f"{name}.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(
        ValueError, match=rf"^expected 3 rows in {path}, got 1, .*; .* or remove {run.path}, and the same"
    ):
        run.finished if name == "results" else run.steps()


@pytest.mark.parametrize("text", ["settings:\n  sgd:\n    lr: 0.1\n", "settings:\n  sgd:\n    lr: 0.", ""])
def test_settings_that_are_cut_are_named(tmp_path, text):
    (tmp_path / "settled.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"^expected {tmp_path / 'settled.yaml'} to hold .*, as of a file|that is cut"):
        StudyFolder(tmp_path).document("settled")


def test_the_next_start_removes_what_a_killed_one_was_writing(tmp_path):
    left = tmp_path / f"config.yaml.{'0123456789abcdef' * 2}.partial"
    left.write_text("epochs:")
    StudyFolder(tmp_path).claim({"config": {"epochs": 1}}, packages=["nsgd"])
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "environment.yaml"}


def test_a_file_where_a_runs_folder_should_be_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sgd-0").write_text("x")
    with pytest.raises(
        ValueError, match=r"runs/sgd-0 cannot be made \(File exists\); choose another folder with --out"
    ):
        StudyFolder(tmp_path).run("runs/sgd-0").begin({})
