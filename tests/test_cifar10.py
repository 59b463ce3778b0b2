"""The plans of benchmarks/cifar10.py: what they make, what they cost, and that they go on where they were ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.model_selection import train_test_split

from lightning_modules.commands import compare
from lightning_modules.study.options import Study
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.subject import Subject
from lightning_modules.support.files import read_csv, write_csv
from lightning_modules.support.read_outs import averages

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLANS = sorted(path.stem for path in (BENCHMARKS / "configs" / "cifar10").glob("*.yaml"))


@pytest.fixture
def cifar10(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cifar10

    return cifar10


def called(cifar10: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *words])
    cifar10.main()


@pytest.mark.parametrize("plan", PLANS)
def test_every_study_of_a_plan_is_one_that_can_be_made(cifar10, plan, tmp_path, monkeypatch):
    """On digits in place of CIFAR-10, with its own network where that takes digits."""
    made: list[Any] = []
    monkeypatch.setattr(compare, "run_study", lambda study, *_, **__: made.append(study) or [])
    monkeypatch.setattr(compare, "write_report", lambda out: out)
    monkeypatch.setattr(compare, "print_table", lambda *_: None)
    studies = cifar10.read_plan(plan)
    for name, options in studies.items():
        assert options["milliseconds"] > 0
        config = cifar10.study_config(options, "somewhere", smoke=True)
        config |= {key: options[key] for key in ("tune", "seeds", "epochs") if key in options}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert compare.run_compare_command([str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name)]) == 0
        check_study(Subject(made[-1]))
    assert len(made) == len(studies) > 0


def test_data_and_options_of_a_study_stand_over_those_that_all_share(cifar10):
    options = cifar10.read_plan("batch-scaled")["resnet-32-plain-128"]
    assert options["data"]["init_args"] == {
        "augment": False,
        "val_fraction": 0.1,
        "limit": 7000,
        "side": 8,
        "batch_size": 128,
    }
    assert (options["epochs"], options["seeds"], options["endpoint"]) == (3, 3, "test_accuracy")
    config = cifar10.study_config(options, "somewhere", smoke=False)
    assert config["data"]["init_args"]["path"] == "somewhere"
    assert "milliseconds" not in config


def test_a_smoke_run_of_a_plan_of_averages_has_steps_enough_for_them(cifar10):
    options = cifar10.read_plan("averages-scaled")["sgd"]
    config = cifar10.study_config(options, "somewhere", smoke=True)
    assert [name for name in options["averages"] if name not in config["averages"]] == [
        *("two-point-8", "two-point-32", "two-point-128")
    ]
    assert [method["label"] for method in options["methods"] if method not in config["methods"]] == [
        *("SGD as two points 32 apart", "SGD as two points 128 apart")
    ]


@pytest.mark.parametrize("plan", ["averages", "averages-scaled"])
def test_every_schedule_of_a_plan_of_averages_stands_beside_an_average_that_is_read_out(cifar10, plan):
    for options in cifar10.read_plan(plan).values():
        about = {name: options[name] for name in ("methods", "lr", "averages")}
        study = Study(data=None, **about)
        base, *others = study.recipes
        described = study.described_methods()
        assert others
        for method in others:
            assert described[method]["equals"]["method"] == base
            assert described[method]["equals"]["read_out"] in options["averages"]
            assert study.given(method) == study.given(base)
        steps = cifar10.steps_of(options)
        for one in averages(options["averages"]):
            one.check(steps)
            assert one.kind != "ema" or one.value <= (1 + steps) / (10 + steps)  # not all within the decay's warm-up


def test_steps_are_those_of_whole_batches_of_the_training_split(cifar10):
    for limit, share, batch in ((7000, 0.1, 1024), (None, 0.2, 128), (1001, 0.3, 10)):
        train, _ = train_test_split(np.arange(limit or 50_000), test_size=share, random_state=0)
        data = {"limit": limit, "val_fraction": share, "batch_size": batch}
        options = {"data": {"class_path": "HuggingFace", "init_args": data}, "epochs": 3}
        assert cifar10.steps_of(options) == 3 * (len(train) // batch)


def test_a_dry_run_prints_minutes_and_makes_nothing(cifar10, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    called(cifar10, monkeypatch, "--plan", "batch", "--dry")
    *_, last = capsys.readouterr().out.splitlines()
    # A study of tuned methods: 8 trials, 6 repeats and the seeds of each of 11; by samples 4.3 of SGD's, SAM 2.
    iterations = (9 + 4.3 + 2) * (8 + 6 + 10) * 516 * 13
    for seeds, steps, milliseconds in ((5, 4212, 8), (5, 240, 45), (5, 516, 10), (5, 4212, 6), (5, 240, 32)):
        times = 2 if milliseconds in (10, 6, 32) else 1  # of the ResNet with BatchNorm and of the transformer
        iterations += times * (9 + 4.3 + 2) * (8 + 6 + seeds) * steps * milliseconds
    assert last.split()[-2:] == [f"{iterations / 60_000:.0f}", f"{0.6 * iterations / 60_000:.0f}"]
    called(cifar10, monkeypatch, "--plan", "batch", "--dry", "--study", "vit-128")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["study", "vit-128", "vit-128"]
    assert not list(tmp_path.iterdir())


def without_seconds(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.iterdir() if path.name != "environment.yaml"):
        timed = path.name == "curves.csv"
        found[path.name] = [{**row, "seconds": 0} for row in read_csv(path)] if timed else path.read_bytes()
    return found


@pytest.mark.slow
def test_a_plan_that_is_ended_goes_on_to_the_same_files(cifar10, monkeypatch, tmp_path, capfd):
    def smoke(name: str, *more: str) -> Path:
        runs, out = tmp_path / name, tmp_path / f"{name}-kept"
        called(cifar10, monkeypatch, "--smoke", "--runs", str(runs), "--out", str(out), *more)
        return out / "batch" / "resnet-32-plain-1024"

    whole = smoke("whole")
    assert "all is made" in capfd.readouterr().out
    kept = tmp_path / "ended-kept" / "batch" / "resnet-32-plain-1024"

    class Impatient(subprocess.Popen[bytes]):
        """Time is up as soon as a run has ended."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            while not list((tmp_path / "ended").rglob("tuning/*/results.csv")):
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", Impatient)
        smoke("ended", "--minutes", "10")
    assert "stopped" in capfd.readouterr().out
    assert read_csv(kept / "partial.csv")
    assert not (kept / "results.csv").exists()
    smoke("ended")
    assert not (kept / "partial.csv").exists()
    assert without_seconds(kept) == without_seconds(whole)
    assert {"config.yaml", "environment.yaml", "results.csv", "summary.csv", "tuning.csv", "curves.csv"} <= {
        path.name for path in whole.iterdir()
    }
    curves = read_csv(whole / "curves.csv")
    assert len(curves) == 11 * 2  # methods, epochs
    assert all(row["val_accuracy"] >= 0 and row["loss"] > 0 for row in curves)


def test_what_is_kept_names_the_data_and_not_where_they_lay(cifar10, tmp_path):
    folder = tmp_path / "runs" / "study"
    folder.mkdir(parents=True)
    config = {"data": {"class_path": "HuggingFace", "init_args": {"path": "/home/me/cifar"}}, "epochs": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    cifar10.keep(tmp_path / "runs", tmp_path / "out")
    kept = yaml.safe_load((tmp_path / "out" / "study" / "config.yaml").read_text())
    assert kept["data"]["init_args"]["path"] == cifar10.HUB


def test_seconds_a_step_are_medians_over_runs_without_the_first_epoch(cifar10, tmp_path):
    """Of 3 epochs of 3 steps by hand: the first slow, in the last a step with more to do; and of a method that died."""
    methods = {"sgd": [[9, 9, 9, 1, 1, 1, 1, 1, 4], [9, 9, 9, 2, 2, 2, 2, 2, 8]], "nsgd": [[9, 9, 9, 3, 3, 3, 3, 3, 9]]}
    for method, runs in methods.items():
        for seed, steps in enumerate(runs):
            run = tmp_path / "runs" / f"{method}-{seed}"
            ends = [sum(steps[: i + 1]) for i in range(9)]
            rows = [{"step": i + 1, "epoch": i // 3, "loss": 1.0, "seconds": end} for i, end in enumerate(ends)]
            write_csv(run / "metrics.csv", rows)
            (run / "run.yaml").write_text(yaml.safe_dump({"method": method, "seed": seed}))
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump({"sgd": {}, "adamw": {}, "nsgd": {}}, sort_keys=False))
    of_sgd = {"method": "sgd", "runs": 2, "median": 1.5, "mean": 2.25, "median_over_base": 1.0, "mean_over_base": 1.0}
    of_nsgd = {"method": "nsgd", "runs": 1, "median": 3, "mean": 4, "median_over_base": 2.0, "mean_over_base": 16 / 9}
    assert cifar10.seconds_a_step(tmp_path) == [of_sgd, of_nsgd]


def test_paths_are_the_sharpness_and_the_bursts_of_first_runs(cifar10, tmp_path):
    """Worked out by hand from rows as the measurements write them; a run that is not finished has none."""
    for name in ("sgd-0", "sgd-1", "nsgd-0"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.yaml").write_text(yaml.safe_dump({"method": name[:-2], "seed": int(name[-1])}))
        sharp = [
            (10, "evaluation samples", None, 64.0),
            (10, "stability limit", None, 20.0),
            (10, "eigenvalue", "e1", 8.0),
            (10, "eigenvalue", "e2", 3.0),
        ]
        write_csv(
            run / "sharpness.csv",
            [{"measurement": 1, "step": s, "quantity": q, "of": of, "at": None, "value": v} for s, q, of, v in sharp],
        )
        walk = [
            *((5, "height", 0.5), (5, "barrier", 0.0), (5, "cosine", float("nan")), (5, "distance", 1.0)),
            *(
                (6, "height", 0.3),
                (6, "barrier", 0.1),
                (6, "cosine", 0.2),
                (6, "distance", 2.0),
                (6, "floor barrier", 0.4),
            ),
        ]
        write_csv(
            run / "valley.csv",
            [{"measurement": 1, "step": s, "quantity": q, "of": None, "at": None, "value": v} for s, q, v in walk],
        )
        if name != "nsgd-0":
            write_csv(run / "results.csv", [{"method": name[:-2], "seed": 0, "read_out": "last", "train_loss": 1.0}])
    assert list(cifar10.paths(tmp_path)) == [
        {"method": "sgd", "step": 10, "lambda_1": 8.0, "limit": 20.0, "samples": 64.0},
        {
            **{"method": "sgd", "step": 5, "steps": 2, "crossed": 1, "along": 1},
            **{"height": pytest.approx(0.4), "cosine": pytest.approx(0.2), "distance": 2.0},
        },
    ]


def test_variants_cost_what_their_batches_and_epochs_do(cifar10, capsys):
    """Of 900 images: 2 epochs of 9 batches of 100; 4 epochs of 3 of 300, each thrice as long; 5 of all, nine times."""
    methods = [
        "sgd",
        {"like": "sgd", "batch_size": 300, "epochs": 4, "label": "large"},
        {"like": "sgd", "batch_size": "all", "epochs": 5, "label": "all"},
        {"like": "sgd", "batch_size": 10, "label": "small"},
    ]
    data = {"class_path": "HuggingFace", "init_args": {"limit": 1000, "val_fraction": 0.1, "batch_size": 100}}
    options = {"data": data, "methods": methods, "seeds": 1, "epochs": 2, "milliseconds": 6000}
    cifar10.print_costs("toy", {"toy": options})
    minutes = (18 + 4 * 3 * 3 + 5 * 9 + 180) * 6000 / 60_000
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == [f"{minutes:.0f}", f"{0.6 * minutes:.0f}"]


def test_the_plan_of_seconds_is_made_alone(cifar10, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(cifar10, monkeypatch, "--plan", "seconds", "--smoke", "--jobs", "2")
    assert "expected --jobs 1 with the plan seconds, each run of which is timed alone, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--jobs", "0"], ["--plan", "nothing"], ["--study", "vit"]])
def test_bad_options_end_with_a_sentence(cifar10, monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as ended:
        called(cifar10, monkeypatch, *words)
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err or words[0] == "--plan"


def test_sigterm_ends_the_study_that_is_under_way_and_keeps_what_is_finished(cifar10, monkeypatch, tmp_path, capsys):
    ended = []

    class Study:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Study:
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self, timeout: float | None = None) -> int:
            if not ended:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            return 128 + signal.SIGTERM

        def terminate(self) -> None:
            ended.append(True)

    monkeypatch.setattr(subprocess, "Popen", Study)
    with pytest.raises(SystemExit) as end:
        called(cifar10, monkeypatch, "--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    assert (end.value.code, ended) == (143, [True])
    assert "batch: stopped" in capsys.readouterr().out
