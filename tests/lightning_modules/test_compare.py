"""The study: statistics against SciPy, pairing, reproduction, resumption, and folders that are left alone."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch.nn import functional as F

from lightning_modules import Classifier, Digits, RefreshDirections, compare
from lightning_modules.compare import (
    GRID,
    TUNED,
    NSGDOptions,
    Study,
    run_study,
    summarise,
    total_runs,
)
from lightning_modules.rows import read_csv, write_csv
from nsgd import NSGD, damp
from nsgd.options import damping_options

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = NSGDOptions(k=2, refresh_every=3, samples=16)


def study(**options: Any) -> Study:
    data = Digits(batch_size=50, limit=300)  # 240 training images, 4 steps an epoch
    return replace(Study(data=data, methods=["sgd", "nsgd"], seeds=2, epochs=2, lr=0.2, nsgd=OPTIONS), **options)


def silent(*_: Any) -> None:
    pass


def finished(folder: Path, **options: Any) -> Path:
    run_study(study(**options), folder, silent)
    return folder


def without_seconds(folder: Path) -> dict[str, Any]:
    """Every row of every CSV file but its seconds, with the resolved config."""
    found: dict[str, Any] = {"config": (folder / "config.yaml").read_text()}
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="") as file:
            rows = [{name: v for name, v in row.items() if name != "seconds"} for row in csv.DictReader(file)]
        found[str(path.relative_to(folder))] = rows
    return found


# -- statistics ------------------------------------------------------------------------------------------------------


def rows_of(values: dict[str, list[float]], seeds: list[int] | None = None) -> list[dict[str, Any]]:
    return [
        {"method": m, "seed": s, "read_out": r, "test_accuracy": v, "val_accuracy": v / 2, "train_loss": -v}
        for r in ("last", "ema")
        for m, series in values.items()
        for s, v in zip(seeds or range(len(series)), series, strict=True)
    ]


def entry(summary: list[dict[str, Any]], method: str, measure: str = "test_accuracy") -> dict[str, Any]:
    found = [e for e in summary if (e["method"], e["measure"], e["read_out"]) == (method, measure, "last")]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("n", [2, 5, 9])
@pytest.mark.parametrize(("measure", "factor"), [("test_accuracy", 1), ("val_accuracy", 0.5), ("train_loss", -1)])
def test_means_intervals_and_paired_tests_agree_with_scipy(n, measure, factor):
    rng = np.random.default_rng(n)
    sgd, nsgd = rng.normal(size=n), rng.normal(0.5, size=n)
    found = entry(summarise(rows_of({"sgd": list(sgd), "nsgd": list(nsgd)})), "nsgd", measure)
    own = stats.ttest_1samp(factor * nsgd, 0).confidence_interval(0.95)
    paired = stats.ttest_rel(factor * nsgd, factor * sgd)
    difference = paired.confidence_interval(0.95)
    assert found["n"] == n
    assert found["mean"] == pytest.approx((own.low + own.high) / 2)
    assert found["half_width"] == pytest.approx((own.high - own.low) / 2)
    assert found["difference"] == pytest.approx((difference.low + difference.high) / 2)
    assert found["difference_half_width"] == pytest.approx((difference.high - difference.low) / 2)
    assert found["p"] == pytest.approx(paired.pvalue)


def test_differences_are_paired_by_seed_not_by_order():
    rows = rows_of({"sgd": [1.0, 2.0, 4.0], "nsgd": [1.5, 2.5, 5.0]})
    shuffled = [row for row in rows if row["method"] == "sgd"] + [row for row in rows if row["method"] == "nsgd"][::-1]
    assert entry(summarise(shuffled), "nsgd")["p"] == pytest.approx(stats.ttest_rel([1.5, 2.5, 5], [1, 2, 4]).pvalue)


def test_a_t_interval_by_hand():
    found = entry(summarise(rows_of({"sgd": [1.0, 2.0, 3.0]})), "sgd")
    assert found["mean"] == 2.0
    assert found["half_width"] == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2) of printed tables
    assert math.isnan(found["difference"])
    assert math.isnan(found["p"])


@pytest.mark.parametrize(
    ("nsgd", "difference", "p"),
    [
        ([1.0, 2.0, 3.0], 0.0, 1.0),  # no difference at all
        ([1.5, 2.5, 3.5], 0.5, math.nan),  # the same difference always: there is no t-statistic
        ([1.1, 2.1, 3.1], 0.1, math.nan),  # the same up to rounding
    ],
)
def test_differences_without_spread_have_no_test(nsgd, difference, p):
    found = entry(summarise(rows_of({"sgd": [1.0, 2.0, 3.0], "nsgd": nsgd})), "nsgd")
    assert found["difference"] == pytest.approx(difference)
    assert found["difference_half_width"] == pytest.approx(0, abs=1e-12)
    assert found["p"] == pytest.approx(p, nan_ok=True)


def test_one_seed_has_means_and_differences_but_no_intervals():
    found = entry(summarise(rows_of({"sgd": [1.0], "nsgd": [3.0]})), "nsgd")
    assert (found["mean"], found["difference"]) == (3.0, 2.0)
    assert all(math.isnan(found[name]) for name in ("half_width", "difference_half_width", "p"))


def test_without_sgd_there_are_no_differences():
    found = summarise(rows_of({"nsgd": [1.0, 2.0], "bulk-sgd": [2.0, 4.0]}))
    assert all(math.isnan(e["difference"]) and math.isnan(e["p"]) for e in found)
    assert len(found) == 2 * 2 * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_that_diverged_is_no_test_and_no_crash(bad):
    found = entry(summarise(rows_of({"sgd": [1.0, 2.0, 3.0], "nsgd": [1.0, bad, 2.0]})), "nsgd")
    assert math.isnan(found["p"])
    assert not math.isfinite(found["mean"])


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
    summary = [{n: v for n, v in e.items() if not (isinstance(v, float) and math.isnan(v))} for e in summarise(rows)]
    written = [
        {n: v for n, v in e.items() if not (isinstance(v, float) and math.isnan(v))}
        for e in read_csv(folder / "summary.csv")
    ]
    assert written == summary


def test_an_sgd_run_is_a_plain_loop_from_the_seed(tmp_path):
    """Weights, batches, losses and scores from torch alone."""
    folder = finished(tmp_path / "out", methods=["sgd"], seeds=1)
    data = Digits(batch_size=50, limit=300)
    torch.manual_seed(0)
    net = Classifier().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    losses = []
    batches = data.train_dataloader().sampler
    for epoch in range(2):
        batches.set_epoch(epoch)
        for indices in batches:
            optimizer.zero_grad()
            images, labels = data.splits["train"].pixels[indices], data.splits["train"].labels[indices]
            loss = F.cross_entropy(net(data.normalise(images)), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    metrics = read_csv(folder / "runs" / "sgd-0" / "metrics.csv")
    assert [row["loss"] for row in metrics] == losses
    last = read_csv(folder / "results.csv")[0]
    for split, images in data.splits.items():
        logits = net(data.normalise(images.pixels))
        assert last[f"{split}_loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
        assert last[f"{split}_accuracy"] == pytest.approx((logits.argmax(1) == images.labels).double().mean().item())


def test_methods_are_paired_so_that_gamma_one_is_sgd(tmp_path):
    """The same weights, batches and augmentation at the same seed, whatever refreshes draw."""
    folder = finished(
        tmp_path / "out",
        data=Digits(batch_size=50, limit=300, augment=True),
        nsgd=NSGDOptions(k=2, gamma=1.0, refresh_every=3, samples=30, source="train"),
        momentum=0.9,
        lr=0.05,
    )
    for seed in (0, 1):
        sgd, nsgd = (read_csv(folder / "runs" / f"{m}-{seed}" / "metrics.csv") for m in ("sgd", "nsgd"))
        assert [row["loss"] for row in sgd] == [row["loss"] for row in nsgd]
        assert nsgd[-1]["refreshes"] == 3
    rows = read_csv(folder / "results.csv")
    names = ("seed", "read_out", "train_loss", "val_loss", "test_loss")
    values = {m: [[row[n] for n in names] for row in rows if row["method"] == m] for m in ("sgd", "nsgd")}
    assert values["sgd"] == values["nsgd"]


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


@pytest.mark.parametrize("overhead", [0.1, 0.3])
def test_refreshes_that_come_by_themselves_cost_what_overhead_allows(tmp_path, overhead):
    options = NSGDOptions(k=2, samples=20, overhead=overhead)
    folder = finished(tmp_path / "out", seeds=1, epochs=5, nsgd=options)
    rows = read_csv(folder / "runs" / "nsgd-0" / "metrics.csv")
    assert len(rows) == 20
    for row in rows:
        spent, before = row["gradients"] - row["step"], row["step"] - 1  # a refresh comes before the step
        assert spent == pytest.approx(row["refreshes"] * 20 / 50)
        # Due at once when the budget allows it; at twice the budget where a direction may have escaped.
        assert overhead * before < spent + 1e-9
        assert spent <= 2 * overhead * before + 20 / 50 + 1e-9
    assert rows[-1]["refreshes"] >= 19 * overhead / 0.4


def test_the_resolved_config_holds_every_option_of_refreshes(tmp_path):
    folder = finished(tmp_path / "out", seeds=1, epochs=1, nsgd=NSGDOptions(k=2))
    found = yaml.safe_load((folder / "config.yaml").read_text())["nsgd"]
    expected = {"refresh_every": "auto", "overhead": 0.1, "decay": None, "samples": 32, "group_size": None}
    assert {name: found[name] for name in expected} == expected
    assert found["solver"] == "auto"
    rows = read_csv(folder / "runs" / "nsgd-0" / "metrics.csv")
    assert [row["hvps"] for row in rows] == [0] * 4
    assert rows[0]["gradients"] == pytest.approx(1 + 32 / 50)


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
    seen: list[tuple[str, int, float | None]] = []
    run_study(study(), tmp_path / "out", lambda *call: seen.append(call))
    steps = [done for _, done, loss in seen if loss is not None]
    assert steps == list(range(1, total_runs(study()) * study().steps + 1))
    assert [name for name, _, loss in seen if loss is None] == ["sgd-0", "nsgd-0", "sgd-1", "nsgd-1"]


# -- interruption and folders ----------------------------------------------------------------------------------------


def interrupted_at(run: int, step: int) -> Callable[..., None]:
    def progress(_: str, done: int, loss: float | None) -> None:
        if loss is not None and done == run * study().steps + step:
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
    assert len([call for call in seen if call[2] is not None]) == (4 - run) * study().steps


def test_an_error_in_a_run_leaves_no_result_of_it(tmp_path):
    def progress(_: str, done: int, loss: float | None) -> None:
        if done == 11:
            raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        run_study(study(), tmp_path / "out", progress)
    assert [path.parent.name for path in (tmp_path / "out").glob("runs/*/results.csv")] == ["sgd-0"]


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
        ({"methods": ["sgd", "sgd"]}, "methods"),
        ({"methods": ["adam"]}, "methods to be different ones of sgd, nsgd, bulk-sgd, dom-sgd, got"),
        ({"lr": "best"}, "lr to be a number, tuned or grid, got 'best'"),
        ({"lr": -0.1}, "lr .*got -0.1"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"momentum": -0.9}, "momentum"),
        ({"momentum": -0.9, "methods": ["sgd"]}, "momentum"),
        ({"momentum": math.nan}, "momentum"),
        ({"nsgd": replace(OPTIONS, k=0)}, "k to be a whole number of at least 1, got 0"),
        ({"nsgd": replace(OPTIONS, k=10**6)}, "k of at most 8970"),
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
        ({"nsgd": replace(OPTIONS, group_size=0)}, "group_size of at least 1, or None for the default, got 0"),
        (
            {"nsgd": replace(OPTIONS, solver="power")},
            "solver to be one of auto, gradients, lanczos, arpack, got 'power'",
        ),
        ({"nsgd": replace(OPTIONS, samples=0)}, "samples of at least 1"),
        ({"nsgd": replace(OPTIONS, source="test")}, "source"),
        ({"net": "resnet"}, "net to be one of"),
        ({"data": Digits(batch_size=5000)}, "batch_size of at most 1149"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        run_study(study(**options), tmp_path / "out", silent)
    raised_in = Path(error.traceback[-1].path)
    assert {"lightning_modules", "nsgd"} & set(raised_in.parts[-3:])  # our own words, not those of a library
    assert list(tmp_path.iterdir()) == []


# -- learning rates --------------------------------------------------------------------------------------------------


def test_the_grid_writes_its_table_and_each_method_takes_its_best(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "GRID", (1e12, 0.001, 0.3))  # the first diverges
    monkeypatch.setattr(compare, "TUNING_SEEDS", (1000, 1001))
    seen: list[Any] = []
    chosen = study(lr="grid", methods=["sgd"], seeds=1)
    run_study(chosen, tmp_path / "out", lambda *call: seen.append(call))
    rows = read_csv(tmp_path / "out" / "tuning.csv")
    assert [(row["method"], row["lr"], row["seeds"]) for row in rows] == [("sgd", lr, 2) for lr in (1e12, 0.001, 0.3)]
    for row in rows:
        losses = [
            read_csv(tmp_path / "out" / "tuning" / f"sgd-{row['lr']}-{seed}" / "results.csv")[0]["val_loss"]
            for seed in (1000, 1001)
        ]
        assert row["val_loss"] == pytest.approx(np.mean(losses), nan_ok=True)
    assert not rows[0]["val_loss"] < rows[1]["val_loss"]
    assert {row["lr"] for row in read_csv(tmp_path / "out" / "results.csv")} == {0.3}
    assert len([call for call in seen if call[2] is not None]) == total_runs(chosen) * chosen.steps == 7 * chosen.steps
    before = tree(tmp_path / "out" / "tuning")
    run_study(chosen, tmp_path / "out", silent)
    assert tree(tmp_path / "out" / "tuning") == before


def test_tuned_rates_are_the_best_of_the_committed_grid():
    rows = read_csv(BENCHMARKS / "results" / "digits-tuning.csv")
    methods = {str(row["method"]) for row in rows}
    assert methods == {"sgd", "nsgd", "bulk-sgd", "dom-sgd"}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        assert tuple(row["lr"] for row in own) == GRID  # equal budgets
        assert {row["seeds"] for row in own} == {3}
        assert TUNED["Digits", "mlp", 0.0][method] == min(own, key=lambda row: row["val_loss"])["lr"]
    assert set(TUNED["Digits", "mlp", 0.0]) == methods


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"lr": "tuned"}, {"sgd": 0.5, "nsgd": 0.5, "dom-sgd": 0.05}),
        ({"lr": "tuned", "net": "simple-cnn-root"}, {"sgd": 0.1, "nsgd": 0.1, "dom-sgd": 0.1}),
        ({"lr": 0.03}, {"sgd": 0.03, "nsgd": 0.03, "dom-sgd": 0.03}),
    ],
)
def test_each_method_runs_at_its_learning_rate(tmp_path, options, rates):
    folder = finished(tmp_path / "out", methods=list(rates), seeds=1, epochs=1, **options)
    assert {row["method"]: row["lr"] for row in read_csv(folder / "results.csv")} == rates


def test_options_have_one_default_wherever_they_are_spelled():
    expected = {name: value for name, value in damping_options().items() if name != "curvature"}
    for place in (NSGD, damp, NSGDOptions, RefreshDirections):
        found = {name: p.default for name, p in signature(place).parameters.items() if name in expected}
        assert found == {name: expected[name] for name in found}, place
    refresh = {name: p.default for name, p in signature(RefreshDirections).parameters.items()}
    study = {name: p.default for name, p in signature(NSGDOptions).parameters.items() if name in refresh}
    assert len(study) == 3
    assert study == {name: refresh[name] for name in study}


def test_measuring_changes_no_number_of_a_study(tmp_path):
    plain, measured = finished(tmp_path / "plain"), finished(tmp_path / "measured", measure=["all"])
    assert {path.stem for path in (measured / "runs" / "nsgd-0").iterdir()} >= {"sharpness", "valley", "averaging"}
    assert not (measured / "runs" / "nsgd-1" / "valley.csv").exists()  # the first seed alone
    found = without_seconds(measured)
    assert all(found[name] == value for name, value in without_seconds(plain).items() if name != "config")


def test_an_interrupted_measurement_is_begun_anew(tmp_path):
    folder = finished(tmp_path / "a", measure=["quadratic"])
    whole = (folder / "runs" / "sgd-0" / "quadratic.csv").read_text()
    (folder / "runs" / "sgd-0" / "results.csv").unlink()
    assert (finished(folder, measure=["quadratic"]) / "runs" / "sgd-0" / "quadratic.csv").read_text() == whole
    assert not (folder / "runs" / "sgd-0" / "quadratic-1.csv").exists()
