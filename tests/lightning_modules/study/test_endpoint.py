"""What a study is judged by is fixed in its file, and what a page needs of its runs and methods is in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from studies import finished, silent, study

from lightning_modules.commands.main import main
from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.report import write_report
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import RECIPES
from lightning_modules.study.options import Study
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.subject import Subject
from lightning_modules.support.files import read_csv

SHORT = ["--seeds", "1", "--epochs", "1", "--data", "Digits", "--data.limit", "300", "--data.batch_size", "50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("study") / "out", methods=["sgd", "bulk-sgd"])


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((folder / "config.yaml").read_text())
    return found


def test_every_row_of_the_results_has_the_loss_of_its_first_batch(folder):
    rows = read_csv(folder / "results.csv")
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        first = read_csv(folder / "runs" / f"{row['method']}-{row['seed']}" / "metrics.csv")[0]
        assert row["start_loss"] == first["loss"]
    assert {row["failed"] for row in read_csv(folder / "summary.csv")} == {0}


def test_a_study_whose_rate_is_too_large_is_counted_as_failed(tmp_path):
    folder = finished(tmp_path / "out", lr=1e6)
    failed = read_folder(folder).failed
    assert failed == {"sgd": {0, 1}, "nsgd": {0, 1}}
    assert {(row["n"], row["failed"]) for row in read_csv(folder / "summary.csv")} == {(0, 2)}
    assert "Every run of SGD failed, so there is nothing to compare with." in write_report(folder).read_text()


def test_the_endpoint_is_written_by_its_column(folder):
    assert config_of(folder)["endpoint"] == "test_accuracy"


@pytest.mark.parametrize(("given", "column"), [([], "test_accuracy"), (["--endpoint", "train_loss"], "train_loss")])
def test_the_file_of_a_study_is_a_study_with_its_endpoint(tmp_path, monkeypatch, given, column):
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert main(["compare", *SHORT, *given, "--run", "0", "--out", str(tmp_path / "a")]) == 0
    assert main(["compare", str(tmp_path / "a" / "config.yaml"), "--run", "0", "--out", str(tmp_path / "b")]) == 0
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")
    assert config_of(tmp_path / "a")["endpoint"] == column


def test_a_folder_of_before_goes_on_and_only_with_the_endpoint_that_it_had(folder, tmp_path):
    old = Path(shutil.copytree(folder, tmp_path / "out"))
    options = {"methods": ["sgd", "bulk-sgd"]}
    config = {name: value for name, value in config_of(old).items() if name != "endpoint"}
    (old / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    methods = yaml.safe_load((old / "methods.yaml").read_text())
    without = {m: {name: v for name, v in said.items() if name != "damping"} for m, said in methods.items()}
    (old / "methods.yaml").write_text(yaml.safe_dump(without, sort_keys=False))
    (old / "runs" / "sgd-1" / "results.csv").unlink()
    run_study(study(**options), old, silent)
    assert (old / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    assert read_folder(old).directions("bulk-sgd")["gamma"] == 0
    with pytest.raises(ValueError, match="endpoint was test_accuracy, now train_loss"):
        run_study(study(**options, endpoint="train_loss"), old, silent)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("train_los", "got 'train_los'; did you mean train_loss"),
        ("val_loss", "expected endpoint to be score, train_loss, val_accuracy, test_accuracy, got 'val_loss'"),
    ],
)
def test_an_endpoint_that_a_study_does_not_have_is_refused(endpoint, said):
    with pytest.raises(ValueError, match=said):
        check_study(Subject(study(endpoint=endpoint)))


def test_without_a_test_the_endpoint_is_the_score_in_validation(monkeypatch):
    monkeypatch.setattr(Subject, "is_tested", False)
    assert Subject(study()).resolved()["endpoint"] == "val_accuracy"
    with pytest.raises(ValueError, match="got 'test_accuracy', but there is no test"):
        check_study(Subject(study(endpoint="test_accuracy")))


def test_a_study_writes_what_its_methods_set_of_the_rule():
    described = Study(methods=[*RECIPES]).described_methods()
    assert described["bulk-sgd"]["damping"] == {"gamma": 0.0, "bulk_scale": 1.0}
    assert described["nsgd-hessian"]["damping"]["solver"] == "lanczos"
    assert described["nsgd"]["damping"] == {}
    assert described["sgd"]["damping"] is None
