"""The folder of a study: names that never change, reading that writes nothing, and the folder of 0.1.0."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from lightning_modules.support.study_folder import RunFolder, StudyFolder, run_name

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
