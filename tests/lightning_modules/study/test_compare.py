"""The study: statistics against SciPy, pairing, reproduction, resumption, and folders that are left alone."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from studies import MEASURES, OPTIONS, STEPS, finished, plain_start, plain_steps, silent, study, without_seconds
from torch.nn import functional as F

import lightning_modules
import nsgd
from lightning_modules import Digits, RefreshDirections
from lightning_modules.study.compare import run_one, run_study
from lightning_modules.study.methods import RECIPES, NSGDOptions, Schedule
from lightning_modules.study.options import Study
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.spectrum import Spectrum
from lightning_modules.study.statistics import summarise
from lightning_modules.study.tuning import sweep_rates, trial_settings
from lightning_modules.support.files import read_csv, write_csv
from nsgd import NSGD, damp
from nsgd.options import DampingOptions

STUDIES = Path(lightning_modules.__file__).parent / "study" / "named"


# -- files -----------------------------------------------------------------------------------------------------------


def test_rows_survive_a_file(tmp_path):
    rows = [{"method": "nsgd", "x": 0.1 + 0.2, "n": 3}, {"method": "sgd", "extra": math.inf}]
    write_csv(tmp_path / "deeper" / "a.csv", rows)
    assert read_csv(tmp_path / "deeper" / "a.csv") == rows
    assert [p.name for p in (tmp_path / "deeper").iterdir()] == ["a.csv"]


# -- the study's numbers ---------------------------------------------------------------------------------------------


def test_results_hold_a_row_for_each_method_seed_and_read_out(tmp_path):
    folder = finished(tmp_path / "out")
    rows = read_csv(folder / "results.csv")
    keys = {(row["method"], row["seed"], row["read_out"]) for row in rows}
    outs = ("last", "ema", "swa", "two-point")
    assert keys == {(m, s, r) for m in ("sgd", "nsgd") for s in (0, 1) for r in outs}
    assert len(rows) == len(keys)
    steps = read_csv(folder / "runs" / "nsgd-1" / "metrics.csv")
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["epoch"] for row in steps] == [0] * 4 + [1] * 4
    assert [i for i, row in enumerate(steps) if "val_accuracy" in row] == [3, 7]
    assert [i for i, row in enumerate(steps) if "weight_1" in row] == [0, 3, 6]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(steps))
    summary = [
        {n: v for n, v in e.items() if not (isinstance(v, float) and math.isnan(v))}
        for e in summarise(rows, ["sgd", "nsgd"], MEASURES, [0, 1])
    ]
    written = [
        {n: v for n, v in e.items() if not (isinstance(v, float) and math.isnan(v))}
        for e in read_csv(folder / "summary.csv")
    ]
    assert written == summary


def plain_losses(seed: int, lr: float) -> list[float]:
    net, data = plain_start(seed)
    return list(plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=lr)))


def test_an_sgd_run_is_a_plain_loop_from_the_seed(tmp_path):
    folder = finished(tmp_path / "out", methods=["sgd"], seeds=1)
    net, data = plain_start()
    losses = list(plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=0.2)))
    metrics = read_csv(folder / "runs" / "sgd-0" / "metrics.csv")
    assert [row["loss"] for row in metrics] == losses
    last = read_csv(folder / "results.csv")[0]
    for split, images in data.splits.items():
        logits = net(data.normalise(images.pixels))
        assert last[f"{split}_loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
        if split != "train":
            right = (logits.argmax(1) == images.labels).double().mean()
            assert last[f"{split}_accuracy"] == pytest.approx(right.item())


def test_methods_are_paired_so_that_gamma_one_is_sgd(tmp_path):
    """The same weights, batches and augmentation at the same seed, whatever refreshes draw."""
    folder = finished(
        tmp_path / "out",
        data=Digits(batch_size=50, limit=300, augment=True),
        nsgd=NSGDOptions(k=2, gamma=1.0, refresh_every=3, samples=30, source="train", solver="gradients"),
        methods=["sgd-momentum", "nsgd-momentum"],
        lr=0.05,
    )
    for seed in (0, 1):
        sgd, nsgd = (read_csv(folder / "runs" / f"{m}-momentum-{seed}" / "metrics.csv") for m in ("sgd", "nsgd"))
        assert [row["loss"] for row in sgd] == [row["loss"] for row in nsgd]
        assert nsgd[-1]["refreshes"] == 3
    rows = read_csv(folder / "results.csv")
    names = ("seed", "read_out", "train_loss", "val_loss", "test_loss")
    sgd, nsgd = ([[row[n] for n in names] for row in rows if row["method"] == f"{m}-momentum"] for m in ("sgd", "nsgd"))
    assert sgd == nsgd


def test_methods_set_gamma_and_bulk_scale_by_name(tmp_path):
    """bulk-sgd is nsgd with gamma 0; dom-sgd with gamma 1 and bulk_scale 0."""
    named = finished(tmp_path / "named", methods=["bulk-sgd", "dom-sgd"], seeds=1)
    for method, gamma, bulk_scale in (("bulk-sgd", 0.0, 1.0), ("dom-sgd", 1.0, 0.0)):
        options = replace(OPTIONS, gamma=gamma, bulk_scale=bulk_scale)
        spelt = finished(tmp_path / method, methods=["nsgd"], seeds=1, nsgd=options)
        a, b = (read_csv(f / "runs" / f"{m}-0" / "metrics.csv") for f, m in ((named, method), (spelt, "nsgd")))
        assert [row["loss"] for row in a] == [row["loss"] for row in b]


@pytest.mark.parametrize(
    ("options", "product", "fraction"),
    [
        ({"samples": 16}, 0, 16 / 50),
        ({"samples": None}, 0, 1.0),
        ({"samples": 80, "source": "train"}, 0, 80 / 50),
        ({"samples": 16, "solver": "lanczos"}, 2, 16 / 50),
        ({"samples": None, "solver": "arpack"}, 2, 1.0),
        ({"samples": 30, "source": "train", "solver": "lanczos"}, 2, 30 / 50),  # no more than a batch: one graph
        ({"samples": 80, "source": "train", "solver": "lanczos"}, 3, 80 / 50),
    ],
)
@pytest.mark.usefixtures("averaging_is_free")
def test_gradients_are_steps_plus_the_cost_of_refreshes(tmp_path, options, product, fraction):
    folder = finished(tmp_path / "out", seeds=1, nsgd=replace(OPTIONS, **options))
    for row in read_csv(folder / "runs" / "nsgd-0" / "metrics.csv"):
        cost = (row["refreshes"] + product * row["hvps"]) * fraction
        assert row["gradients"] == pytest.approx(row["step"] + cost)
        assert row["refreshes"] == 1 + (row["step"] - 1) // 3
        least, most = (0, 0) if product == 0 else (2, 6 if options["solver"] == "lanczos" else 100)  # k to 2k + 2 each
        assert least * row["refreshes"] <= row["hvps"] <= most * row["refreshes"]
    assert [row["gradients"] for row in read_csv(folder / "runs" / "sgd-0" / "metrics.csv")] == list(range(1, 9))
    last = {row["method"]: row for row in read_csv(folder / "results.csv")}
    assert last["nsgd"]["gradients"] == pytest.approx(8 + (3 + product * last["nsgd"]["hvps"]) * fraction)


def test_the_resolved_config_holds_every_option_of_refreshes(tmp_path):
    folder = finished(tmp_path / "out", seeds=1, epochs=1, nsgd=NSGDOptions(k=2, solver="gradients"))
    found = yaml.safe_load((folder / "config.yaml").read_text())["nsgd"]
    expected = {"refresh_every": "auto", "overhead": 0.1, "decay": None, "samples": 32, "group_size": None}
    assert {name: found[name] for name in expected} == expected
    assert found["solver"] == "gradients"
    rows = read_csv(folder / "runs" / "nsgd-0" / "metrics.csv")
    assert [row["hvps"] for row in rows] == [0] * 4
    assert rows[0]["gradients"] > 1 + 32 / 50


@pytest.mark.parametrize(
    "changed",
    [
        {"refresh_every": "auto"},
        {"refresh_every": "auto", "overhead": 5.0},
        {"decay": 0.5},
        {"group_size": 4},
        {"solver": "lanczos"},
        {"samples": 20},
        {"source": "train"},
    ],
    ids=str,
)
def test_every_option_of_refreshes_reaches_the_run_and_the_folder(tmp_path, changed):
    options = replace(OPTIONS, gamma=0.0)
    folders = [
        finished(tmp_path / n, methods=["nsgd"], seeds=1, nsgd=o)
        for n, o in (("a", options), ("b", replace(options, **changed)))
    ]
    a, b = ([row["loss"] for row in read_csv(f / "runs" / "nsgd-0" / "metrics.csv")] for f in folders)
    assert a != b
    name, value = list(changed.items())[-1]
    assert yaml.safe_load((folders[1] / "config.yaml").read_text())["nsgd"][name] == value
    with pytest.raises(ValueError, match=rf"nsgd\.{name} was"):
        run_study(study(methods=["nsgd"], seeds=1, nsgd=options), folders[1], silent)


@pytest.mark.parametrize("source", ["batch", "train"])
@pytest.mark.parametrize("sizes", [{"samples": 8, "group_size": 8}, {"samples": 1}, {"samples": 4, "group_size": 9}])
def test_gradients_of_a_single_group_are_refused_before_anything_is_written(tmp_path, sizes, source):
    options = replace(OPTIONS, solver="gradients", source=source, **sizes)
    with pytest.raises(ValueError, match="group"):
        run_study(study(seeds=1, nsgd=options), tmp_path / "out", silent)
    assert list(tmp_path.iterdir()) == []


def test_the_same_study_gives_the_same_numbers_and_another_seed_others(tmp_path):
    first = finished(tmp_path / "a")
    torch.manual_seed(123)  # what was drawn before does not matter
    assert without_seconds(finished(tmp_path / "b")) == without_seconds(first)
    by_seed = {row["seed"]: row["train_loss"] for row in read_csv(first / "results.csv")}
    assert by_seed[0] != by_seed[1]


def test_a_study_that_diverges_is_recorded_as_it_is(tmp_path):
    folder = finished(tmp_path / "out", lr=1e6, methods=["sgd"])
    assert not all(
        math.isfinite(row["train_loss"]) and row["train_loss"] < 1e3 for row in read_csv(folder / "results.csv")
    )


def test_progress_counts_every_step_of_every_run(tmp_path):
    seen: list[tuple[str, int, int, str | None]] = []
    run_study(study(), tmp_path / "out", lambda *call: seen.append(call))
    total = 4 * STEPS
    assert [done for _, done, _, said in seen if said is not None] == list(range(1, total + 1))
    assert {of for _, _, of, _ in seen} == {total}
    ends = [name for name, _, _, said in seen if said is None]
    assert [name.split(": ")[1] for name in ends] == ["runs/sgd-0", "runs/nsgd-0", "runs/sgd-1", "runs/nsgd-1"]


def of_the_process() -> list[Any]:
    """What a study sets, read where torch, Python, NumPy, the environment and logging keep it."""
    name, keys, *rest = np.random.get_state()
    state = [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]
    loggers = [
        logging.getLogger(n) for n in ("", "pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "torch")
    ]
    seeds = [os.environ.get(variable) for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")]
    return [torch.get_num_threads(), state, seeds, [logger.level for logger in loggers]]


@pytest.mark.parametrize("seed", [None, "7"])
def test_threads_seed_and_levels_are_as_found(tmp_path, monkeypatch, seed):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    if seed is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    before = of_the_process()
    within: list[Any] = []

    def progress(*_: Any) -> None:
        within.append(of_the_process())

    run_study(study(methods=["sgd"], seeds=1, epochs=1, threads=2), tmp_path / "a", progress)
    assert of_the_process() == before
    assert within[0][0] == 2  # the study's own threads, while it runs
    assert all(found != kept for found, kept in zip(within[0][1:3], before[1:3], strict=True))
    run_one(study(methods=["sgd"], seeds=1, epochs=1, threads=2), tmp_path / "b", 0, silent)
    assert of_the_process() == before
    with pytest.raises(ZeroDivisionError):  # from outside of any run
        run_study(study(methods=["sgd"], threads=2), tmp_path / "c", silent, say=lambda words: 1 / 0)
    assert of_the_process() == before
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_study(study(threads=2), tmp_path / "d", interrupted_at(0, 3))
    assert of_the_process() == before


# -- interruption and folders ----------------------------------------------------------------------------------------


def interrupted_at(run: int, step: int) -> Callable[..., None]:
    def progress(_: str, done: int, total: int, said: str | None) -> None:
        if said is not None and done == run * STEPS + step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("run", "step"), [(0, 3), (2, 1), (3, 8)])
def test_an_interrupted_study_keeps_finished_runs_and_ends_as_if_it_had_not_been(tmp_path, run, step):
    whole, folder = finished(tmp_path / "whole"), tmp_path / "out"
    # Lightning turns an interruption into an exit, by SystemExit or KeyboardInterrupt itself.
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_study(study(), folder, interrupted_at(run, step))
    assert not (folder / "results.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.csv")}
    assert len([path for path in kept if path.name == "results.csv"]) == run
    seen: list[Any] = []
    run_study(study(), folder, lambda *call: seen.append(call))
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert without_seconds(folder) == without_seconds(whole)
    assert len([call for call in seen if call[3] is not None]) == (4 - run) * STEPS


def broken(run: str, times: int) -> Callable[..., None]:
    """Progress that raises in the first step of a run, so many times."""
    left = [times]

    def progress(name: str, done: int, total: int, said: str | None) -> None:
        if name.endswith(run) and said is not None and left[0]:
            left[0] -= 1
            raise RuntimeError("as planned")

    return progress


def test_a_run_that_dies_once_is_said_and_tried_again(tmp_path):
    said: list[str] = []
    assert run_study(study(), tmp_path / "out", broken("runs/nsgd-0", 1), say=said.append) == []
    assert "runs/nsgd-0 died, it is tried once more: RuntimeError: as planned" in said
    assert without_seconds(tmp_path / "out") == without_seconds(finished(tmp_path / "whole"))


def test_a_run_that_dies_twice_is_left_out_and_misses_the_target_until_it_is_made(tmp_path):
    folder = tmp_path / "out"
    assert run_study(study(target=0.05), folder, broken("runs/nsgd-0", 2)) == ["runs/nsgd-0"]
    assert "as planned" in (folder / "runs" / "nsgd-0" / "failed.txt").read_text()
    assert not (folder / "runs" / "nsgd-0" / "results.csv").exists()
    assert {(row["method"], row["seed"]) for row in read_csv(folder / "results.csv")} == {
        ("sgd", 0),
        ("sgd", 1),
        ("nsgd", 1),
    }
    reached = {(row["method"], row["seed"]): row["reached"] for row in read_csv(folder / "target.csv")}
    assert reached == {("sgd", 0): 1, ("sgd", 1): 1, ("nsgd", 0): 0, ("nsgd", 1): 1}
    assert read_csv(folder / "deaths.csv") == [{"run": "runs/nsgd-0", "method": "nsgd", "seed": 0}]
    summary = {(e["method"], e["measure"]): e for e in read_csv(folder / "summary.csv") if e["read_out"] == "last"}
    assert (summary["nsgd", "train_loss"]["n"], summary["nsgd", "train_loss"]["pairs"]) == (1, 1)
    assert run_study(study(target=0.05), folder, silent) == []
    assert without_seconds(folder) == without_seconds(finished(tmp_path / "whole", target=0.05))


def test_a_study_of_which_nothing_survives_says_so(tmp_path):
    def progress(*call: Any) -> None:
        if call[3] is not None:
            raise RuntimeError("as planned")

    with pytest.raises(ValueError, match=r"no run of the study survived; see .*failed\.txt"):
        run_study(study(), tmp_path / "out", progress)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")]
    }


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epochs": 3}, "epochs was 2, now 3"),
        ({"threads": 2}, "threads was 1, now 2"),
        ({"methods": ["sgd"]}, "methods was"),
        ({"nsgd": replace(OPTIONS, gamma=0.5)}, "nsgd.gamma was 0.1, now 0.5"),
        ({"nsgd": replace(OPTIONS, refresh_every="auto")}, "nsgd.refresh_every was 3, now auto"),
        ({"nsgd": replace(OPTIONS, group_size=2)}, "nsgd.group_size was None, now 2"),
        ({"data": Digits(batch_size=40, limit=300)}, "data.init_args.batch_size was 50, now 40"),
    ],
)
def test_another_studys_folder_is_refused_and_left_alone(tmp_path, changed, named):
    folder = finished(tmp_path / "out", methods=["sgd", "nsgd"], seeds=1)
    before = tree(folder)
    with pytest.raises(ValueError, match=f"holds another study: {named}.*choose another folder with --out"):
        run_study(study(seeds=1, **changed), folder, silent)
    assert tree(folder) == before


@pytest.mark.parametrize("content", ["", "[1, 2]\n", "seed_everything: 0\nmodel:\n  net: mlp\n", "a: [\n", "text"])
def test_a_config_of_something_else_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="folder with --out") as error:
        run_study(study(), tmp_path, silent)
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_a_foreign_folder_or_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for name in ("folder", "file", "file/below"):
        with pytest.raises(ValueError, match="--out"):
            run_study(study(), tmp_path / name, silent)
    assert tree(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path):
    finished(tmp_path, seeds=1, methods=["sgd"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["threads"] == 1
    assert yaml.safe_load((tmp_path / "environment.yaml").read_text())["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds of at least 1, got 0"),
        ({"epochs": 0}, "epochs of at least 1, got 0"),
        ({"threads": 0}, "threads of at least 1, got 0"),
        ({"methods": []}, "methods"),
        ({"methods": ["sgd", "sgd"]}, "methods to be different"),
        ({"methods": ["adam"]}, "methods to be among sgd, sgd-momentum, nsgd, .*, got"),
        ({"methods": ["sgd", "sgd-more"]}, "sgd-more takes .* expected them among the methods, got no nsgd"),
        ({"tune": -1}, "tune of at least 0, got -1"),
        ({"tune": 2}, "expected no lr with tune, whose trials look for it, got 0.2"),
        ({"search": {"sgd": {"momentum": [0.9, 2.0]}}}, "search.sgd.momentum below 1"),
        ({"sweep": "momentum"}, "sweep to be lr or null, got 'momentum'"),
        ({"sweep": "lr", "sweep_points": 1}, "sweep_points of at least 2, got 1"),
        ({"target": 95.0}, "target to be an accuracy between 0 and 1, got 95"),
        ({"settings": {"adam": {"lr": 0.1}}}, "settings of a method among sgd, .*, got 'adam'"),
        ({"settings": {"sgd-more": {"lr": 0.1}}}, "settings of a method among sgd, .*, got 'sgd-more'"),
        ({"settings": {"sgd": {"gamma": 0.1}}}, "settings of sgd to be among lr, momentum, weight_decay, got 'gamma'"),
        ({"settings": {"bulk-sgd": {"gamma": 0.1}}}, "settings of bulk-sgd to be among lr, .*, got 'gamma'"),
        ({"search": {"sgd": {"lr": [1.0, 0.1]}}}, "search.sgd.lr to be a lower and a higher number above 0"),
        ({"search": {"sgd": {"lr": [0.0, 0.1]}}}, "search.sgd.lr to be a lower and a higher number above 0"),
        ({"search": {"sgd": {"lr": [0.1]}}}, "search.sgd.lr to be a lower and a higher number above 0"),
        ({"sizes": {"depth": 3}}, "depth"),
        ({"lr": -0.1}, "lr .*got -0.1"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"settings": {"nsgd": {"momentum": -0.9}}}, "settings.nsgd.momentum >= 0 and below 1, got -0.9"),
        ({"settings": {"adamw": {"lr": math.inf}}}, "settings.adamw.lr >= 0 and finite, got inf"),
        ({"settings": {"nsgd": {"k": 0}}}, "k to be a whole number of at least 1, got 0"),
        ({"nsgd": replace(OPTIONS, k=0)}, "k to be a whole number of at least 1, got 0"),
        ({"nsgd": replace(OPTIONS, gamma=-1.0)}, "gamma"),
        ({"nsgd": replace(OPTIONS, refresh_every=0)}, "refresh_every"),
        (
            {"nsgd": replace(OPTIONS, refresh_every="often")},
            "refresh_every to be 'auto' or a whole number .*got 'often'",
        ),
        ({"nsgd": replace(OPTIONS, overhead=0.0)}, "overhead to be a number above 0"),
        ({"nsgd": replace(OPTIONS, overhead=math.inf)}, "overhead to be a number above 0"),
        ({"nsgd": replace(OPTIONS, decay=1.0)}, "decay to be a number >= 0 and below 1, got 1.0"),
        ({"nsgd": replace(OPTIONS, decay=math.nan)}, "decay to be a number >= 0 and below 1, got nan"),
        (
            {"nsgd": replace(OPTIONS, group_size=0)},
            "group_size to be None for the default, or a whole number of at least 1, got 0",
        ),
        (
            {"nsgd": replace(OPTIONS, solver="power")},
            "solver to be one of auto, differences, gradients, lanczos, arpack, random, got 'power'",
        ),
        ({"nsgd": replace(OPTIONS, samples=0)}, "samples to be None for the default, or a whole number of at least 1"),
        ({"nsgd": replace(OPTIONS, source="test")}, "source"),
        ({"net": "resnet"}, "net to be one of"),
        ({"data": Digits(batch_size=5000)}, "batch_size of at most 1149"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        run_study(study(**options), tmp_path / "out", silent)
    raised_in = Path(error.traceback[-1].path)
    packages = (Path(package.__file__).parent for package in (lightning_modules, nsgd))
    assert any(raised_in.is_relative_to(package) for package in packages)  # our own words, not those of a library
    assert list(tmp_path.iterdir()) == []


# -- settings, trials and sweeps -------------------------------------------------------------------------------------


def best_by_mean(rows: list[dict[str, Any]], method: str) -> int:
    """The trial with the least mean loss, of those that ran with three seeds."""
    losses = {n: [r["val_loss"] for r in rows if (r["method"], r["trial"]) == (method, n)] for n in range(3)}
    return min(losses, key=lambda n: float(np.mean(losses[n])))


def test_trials_are_as_many_for_each_method_and_the_best_by_validation_runs_on_all_seeds(tmp_path):
    chosen = study(tune=3, lr=None, search={"nsgd": {"lr": [0.01, 1.0], "gamma": [0.05, 1.0]}})
    run_study(chosen, tmp_path, silent)
    rows = read_csv(tmp_path / "tuning.csv")
    first = [(row["method"], row["trial"]) for row in rows if row["seed"] == 1000]
    assert first == [(m, t) for t in range(3) for m in ("sgd", "nsgd")]
    settled = yaml.safe_load((tmp_path / "settled.yaml").read_text())
    for method in ("sgd", "nsgd"):
        assert settled["settings"][method] == trial_settings(chosen, method)[best_by_mean(rows, method)]
        own = yaml.safe_load((tmp_path / "runs" / f"{method}-1" / "run.yaml").read_text())
        assert own.pop("rows") == {"metrics": 8, "results": 4}
        assert own == {"number": own["number"], "method": method, "seed": 1, "steps": 8, **settled["settings"][method]}
    best = best_by_mean(rows, "sgd")
    own = [row["val_accuracy"] for row in rows if (row["method"], row["trial"]) == ("sgd", best)]
    assert settled["target"] == pytest.approx(np.mean(own), rel=1e-12)  # one rounding or two
    columns = read_csv(tmp_path / "tuning" / "sgd-0" / "results.csv")[0]
    assert not any(name.startswith("test") for name in columns)  # the test images are seen by the study alone
    assert {row["seed"] for row in read_csv(tmp_path / "results.csv")} == {0, 1}


def test_trials_sweeps_and_chosen_settings_reach_the_training(tmp_path):
    chosen = study(tune=2, lr=None, methods=["sgd"], seeds=1, sweep="lr", sweep_points=2)
    run_study(chosen, tmp_path / "a", silent)
    best = yaml.safe_load((tmp_path / "a" / "settled.yaml").read_text())["settings"]["sgd"]["lr"]
    given = finished(tmp_path / "b", methods=["sgd"], seeds=1, lr=best)
    a, b = ([r["loss"] for r in read_csv(f / "runs" / "sgd-0" / "metrics.csv")] for f in (tmp_path / "a", given))
    assert a == b
    for stage, seed in (("tuning", 1000), ("sweep", 2000)):
        for i in (0, 1):
            folder = tmp_path / "a" / stage / f"sgd-{i}"
            lr = yaml.safe_load((folder / "run.yaml").read_text())["lr"]
            assert [row["loss"] for row in read_csv(folder / "metrics.csv")] == plain_losses(seed, lr)


def test_a_trial_that_died_is_not_chosen_and_what_was_settled_stays(tmp_path):
    chosen = study(tune=2, lr=None, methods=["sgd"], seeds=1)
    whole = finished(tmp_path / "whole", tune=2, lr=None, methods=["sgd"], seeds=1)
    settled = yaml.safe_load((whole / "settled.yaml").read_text())["settings"]["sgd"]
    dead = trial_settings(chosen, "sgd").index(settled)
    folder, names = tmp_path / "out", [f"tuning/sgd-{dead}"]  # and no repeat of the second best, which there is not
    assert run_study(chosen, folder, broken(f"tuning/sgd-{dead}", 2)) == names
    settled = (folder / "settled.yaml").read_bytes()
    assert yaml.safe_load(settled)["settings"]["sgd"] == trial_settings(chosen, "sgd")[1 - dead]
    (folder / "runs" / "sgd-0" / "results.csv").unlink()
    assert run_study(chosen, folder, silent) == names  # now it could not be chosen any more
    assert {row["trial"] for row in read_csv(folder / "tuning.csv")} == {1 - dead}
    assert (folder / "settled.yaml").read_bytes() == settled  # the runs that count were made with it


def test_a_method_whose_trials_all_died_ends_the_study_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"every trial of sgd died; see tuning/sgd-0/failed\.txt"):
        run_study(study(tune=1, lr=None, methods=["sgd"]), tmp_path, broken("tuning/sgd-0", 2))


@pytest.mark.parametrize("method", ["sgd", "adamw"])
def test_trials_lie_in_the_ranges_evenly_in_their_logarithm(method):
    chosen = study(methods=[method], tune=64)
    rates = np.array([settings["lr"] for settings in trial_settings(chosen, method)])
    low, high = chosen.ranges(method)["lr"]
    assert low <= rates.min() < 1.2 * low
    assert high / 1.2 < rates.max() <= high
    places = np.log(rates / low) / np.log(high / low)
    assert stats.kstest(places, "uniform").statistic < 0.05


def test_each_rate_of_a_sweep_runs_with_every_seed_of_it(tmp_path):
    chosen = study(methods=["sgd"], seeds=1, epochs=1, sweep="lr", sweep_points=2, sweep_seeds=2)
    run_study(chosen, tmp_path, silent)
    low, high = sweep_rates(chosen, "sgd")
    rows = read_csv(tmp_path / "sweep.csv")
    assert [(row["lr"], row["seed"]) for row in rows] == [(low, 2000), (high, 2000), (low, 2001), (high, 2001)]
    assert len({row["train_loss"] for row in rows}) == 4


def test_a_sweep_makes_a_run_at_each_rate_with_the_other_settings_as_chosen(tmp_path):
    chosen = study(methods=["sgd"], seeds=1, sweep="lr", sweep_points=3, settings={"sgd": {"momentum": 0.5}})
    run_study(chosen, tmp_path, silent)
    rows = read_csv(tmp_path / "sweep.csv")
    assert [row["lr"] for row in rows] == sweep_rates(chosen, "sgd") == pytest.approx([0.01, 0.2, 4.0])
    for i, row in enumerate(rows):
        run = yaml.safe_load((tmp_path / "sweep" / f"sgd-{i}" / "run.yaml").read_text())
        assert (run["lr"], run["momentum"], run["seed"]) == (row["lr"], 0.5, 2000)
        assert row["start_loss"] == read_csv(tmp_path / "sweep" / f"sgd-{i}" / "metrics.csv")[0]["loss"]
    assert "test_accuracy" not in rows[0]


@pytest.mark.usefixtures("averaging_is_free")
def test_sgd_given_nsgds_gradients_takes_them_as_steps(tmp_path):
    folder = finished(tmp_path, methods=["sgd", "nsgd", "sgd-more"], seeds=1, epochs=4)
    rows = {row["method"]: row for row in read_csv(folder / "results.csv") if row["read_out"] == "last"}
    assert rows["nsgd"]["step"] == rows["sgd"]["step"] == 16 < rows["nsgd"]["gradients"]
    assert rows["sgd-more"]["step"] == rows["sgd-more"]["gradients"] == round(rows["nsgd"]["gradients"])
    more, sgd = (read_csv(folder / "runs" / f"{m}-0" / "metrics.csv") for m in ("sgd-more", "sgd"))
    assert [row["loss"] for row in more[:16]] == [row["loss"] for row in sgd]
    assert [row["step"] for row in more if "val_accuracy" in row] == [4, 8, 12, 16, len(more)]


class Noisy(Digits):
    """A user's own data, with an option of its own and none of its base's."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(batch_size=50, limit=300)
        self.noise = noise
        self.save_hyperparameters()


def test_data_of_ones_own_resolve_to_the_options_that_they_take():
    found = replace(study(), data=Noisy(0.5)).resolved()["data"]
    assert found == {"class_path": f"{__name__}.Noisy", "init_args": {"noise": 0.5}}


def test_every_method_runs_and_sam_counts_two_gradients_a_step(tmp_path):
    settings = {m: {"lr": 0.01} for m in ("adamw", "damped-adamw")}
    methods = [m for m in RECIPES if m != "damped-own"]  # our classifier's own optimizer is damped already
    folder = finished(tmp_path, methods=methods, seeds=1, lr=None, settings=settings)
    rows = {row["method"]: row for row in read_csv(folder / "results.csv") if row["read_out"] == "last"}
    assert set(rows) == set(methods)
    assert all(math.isfinite(row["train_loss"]) for row in rows.values())
    assert len({row["train_loss"] for row in rows.values()}) == len(methods)
    assert rows["sam"]["gradients"] == 2 * rows["sam"]["step"]
    assert rows["random"]["gradients"] == rows["random"]["step"] < rows["nsgd"]["gradients"]
    assert {m for m, row in rows.items() if row["refreshes"]} == {
        "nsgd",
        "nsgd-momentum",
        "nsgd-hessian",
        "bulk-sgd",
        "dom-sgd",
        "random",
        "damped-adamw",
        "own",
    }


def test_by_default_directions_come_from_training_and_cost_no_gradient(tmp_path):
    folder = finished(tmp_path, methods=["sgd", "nsgd", "nsgd-hessian"], seeds=1, nsgd=NSGDOptions(k=2))
    rows = {row["method"]: row for row in read_csv(folder / "results.csv") if row["read_out"] == "last"}
    assert rows["nsgd"]["gradients"] == rows["nsgd"]["step"]
    assert rows["nsgd"]["refreshes"] > 1
    assert rows["nsgd"]["hvps"] == 0 < rows["nsgd-hessian"]["hvps"]
    assert len({row["train_loss"] for row in rows.values()}) == 3


def test_a_run_by_its_number_is_the_studys_own(tmp_path):
    tuned = study(tune=1, lr=None)
    whole = finished(tmp_path / "whole", tune=1, lr=None)
    plan = plan_runs(tuned)
    with pytest.raises(ValueError, match=r"run 2, runs/sgd-0, needs runs 0, 1 of .* first"):
        run_one(tuned, tmp_path / "one", 2, silent)
    for number in range(len(plan)):
        run_one(tuned, tmp_path / "one", number, silent)
    seen: list[Any] = []
    run_study(tuned, tmp_path / "one", lambda *call: seen.append(call))
    assert seen == []
    assert without_seconds(tmp_path / "one") == without_seconds(whole)
    with pytest.raises(ValueError, match=r"--run to be from 0 to 5, .* got 6"):
        run_one(tuned, tmp_path / "other", 6, silent)
    assert not (tmp_path / "other").exists()


def test_every_run_comes_after_those_that_it_needs():
    plan = plan_runs(study(methods=["sgd-more", "sgd", "nsgd"], tune=2, sweep="lr"))
    assert [run.number for run in plan] == list(range(len(plan)))
    assert all(need < run.number for run in plan for need in run.needs)
    assert len({run.name for run in plan}) == len(plan) == 2 * 2 + 2 * 4 + 2 * 3 + 2 * 9


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"lr": None}, {"sgd": 0.1, "nsgd": 0.1, "adamw": 0.001}),
        ({"lr": 0.03}, {"sgd": 0.03, "nsgd": 0.03, "dom-sgd": 0.03}),
        ({"lr": None, "settings": {"nsgd": {"lr": 0.5}}}, {"sgd": 0.1, "nsgd": 0.5}),
        ({"lr": 0.03, "settings": {"nsgd": {"lr": 0.5}}}, {"sgd": 0.03, "nsgd": 0.03}),
    ],
)
def test_each_method_runs_at_its_learning_rate(tmp_path, options, rates):
    folder = finished(tmp_path / "out", methods=list(rates), seeds=1, epochs=1, **options)
    assert {row["method"]: row["lr"] for row in read_csv(folder / "results.csv")} == rates


@pytest.mark.parametrize("name", ["digits", "digits-32", "digits-1024"])
def test_the_settings_of_digits_are_the_best_of_the_committed_trials(name):
    rows = read_csv(Path(__file__).parents[3] / "benchmarks" / "results" / f"{name}-tuning.csv")
    preset = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    search = preset.get("search", {})
    trials = {method: [row for row in rows if row["method"] == method] for method in preset["settings"]}
    for method, own in trials.items():
        losses: dict[float, list[float]] = {}  # with each seed, by rate
        for row in own:
            losses.setdefault(row["lr"], []).append(row["val_loss"])
        assert list(losses) == [
            s["lr"] for s in trial_settings(Study(tune=12, methods=[method], search=search), method)
        ]  # equal budgets
        best = sorted(losses, key=lambda lr: (math.isnan(losses[lr][0]), losses[lr][0]))[:3]
        assert all(len(found) == (3 if lr in best else 1) for lr, found in losses.items())
        stable = [lr for lr in best if all(map(math.isfinite, losses[lr]))]  # NSGD's winner at 1,024 is not among them
        assert preset["settings"][method] == {"lr": min(stable, key=lambda lr: sum(losses[lr]))}
        assert min(losses) < preset["settings"][method]["lr"] < max(losses)  # no best value at an edge
    assert set(preset["methods"]) <= set(trials)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_can_run(path):
    """With digits for its data, whose images are small, and so a small network."""
    options = yaml.safe_load(path.read_text())
    nsgd = NSGDOptions(**{**options.pop("nsgd", {}), "k": 2, "samples": 32})
    nested = {"schedule": Schedule.of, "spectrum": lambda given: Spectrum(**given)}
    own = {name: nested[name](value) if name in nested else value for name, value in options.items()}
    own |= {"data": Digits(), "net": "mlp", "sizes": None, "nsgd": nsgd}
    check_study(Subject(Study(**own)))


def test_options_have_one_default_wherever_they_are_spelled():
    expected = asdict(DampingOptions())
    for place in (NSGD, damp, NSGDOptions, RefreshDirections):
        found = {name: p.default for name, p in signature(place).parameters.items() if name in expected}
        assert found == {name: expected[name] for name in found}, place
    # What a study leaves alone: its own seed, and what checkpoints and memory take.
    assert set(expected) - set(NSGDOptions().damping()) == {"seed", "save_basis", "basis_dtype"}
    p = torch.nn.Parameter(torch.zeros(30))
    assert NSGD([p], **NSGDOptions(step_decay=0.9).damping()).options.step_decay == 0.9
    refresh = {name: p.default for name, p in signature(RefreshDirections).parameters.items()}
    study = {name: p.default for name, p in signature(NSGDOptions).parameters.items() if name in refresh}
    assert len(study) == 3
    assert study == {name: refresh[name] for name in study}


def test_measuring_changes_no_number_of_a_study(tmp_path):
    plain, measured = finished(tmp_path / "plain"), finished(tmp_path / "measured", measure=["all"])
    assert {path.stem for path in (measured / "runs" / "nsgd-0").iterdir()} >= {"sharpness", "valley", "averaging"}
    assert not (measured / "runs" / "nsgd-1" / "valley.csv").exists()  # the first seed alone
    found = without_seconds(measured)
    assert all(found[name] == value for name, value in without_seconds(plain).items() if name != "config.yaml")


def test_an_interrupted_measurement_is_begun_anew(tmp_path):
    folder = finished(tmp_path / "a", measure=["quadratic"])
    whole = (folder / "runs" / "sgd-0" / "quadratic.csv").read_text()
    (folder / "runs" / "sgd-0" / "results.csv").unlink()
    assert (finished(folder, measure=["quadratic"]) / "runs" / "sgd-0" / "quadratic.csv").read_text() == whole
    assert not (folder / "runs" / "sgd-0" / "quadratic-1.csv").exists()
