"""What a study concludes: intervals and tests against SciPy, corrections, targets and ranges by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from studies import ACCURACY, MEASURES

from lightning_modules.study.statistics import holm, summarise, times_to_target
from lightning_modules.support.score import Score


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return summarise(rows, list(dict.fromkeys(row["method"] for row in rows)), MEASURES)


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
    found = entry(summary_of(rows_of({"sgd": list(sgd), "nsgd": list(nsgd)})), "nsgd", measure)
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
    assert entry(summary_of(shuffled), "nsgd")["p"] == pytest.approx(stats.ttest_rel([1.5, 2.5, 5], [1, 2, 4]).pvalue)


def test_a_t_interval_by_hand():
    found = entry(summary_of(rows_of({"sgd": [1.0, 2.0, 3.0]})), "sgd")
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
    found = entry(summary_of(rows_of({"sgd": [1.0, 2.0, 3.0], "nsgd": nsgd})), "nsgd")
    assert found["difference"] == pytest.approx(difference)
    assert found["difference_half_width"] == pytest.approx(0, abs=1e-12)
    assert found["p"] == pytest.approx(p, nan_ok=True)


def test_one_seed_has_means_and_differences_but_no_intervals():
    found = entry(summary_of(rows_of({"sgd": [1.0], "nsgd": [3.0]})), "nsgd")
    assert (found["mean"], found["difference"]) == (3.0, 2.0)
    assert all(math.isnan(found[name]) for name in ("half_width", "difference_half_width", "p"))


def test_the_others_are_compared_with_the_first_method():
    found = summary_of(rows_of({"nsgd": [1.0, 2.0], "bulk-sgd": [2.0, 4.0]}))
    assert entry(found, "bulk-sgd")["difference"] == 1.5
    assert math.isnan(entry(found, "nsgd")["difference"])
    assert len(found) == 2 * 2 * 3


def test_a_seed_whose_run_died_drops_out_of_the_pairs():
    rows = rows_of({"sgd": [1.0, 2.0, 4.0], "nsgd": [1.5, 9.0, 5.0]})
    left = [row for row in rows if (row["method"], row["seed"]) != ("nsgd", 1)]
    found = entry(summary_of(left), "nsgd")
    assert (found["n"], found["pairs"]) == (2, 2)
    assert found["difference"] == pytest.approx(0.75)
    gone = [row for row in rows if row["method"] == "sgd"]
    assert [e["method"] for e in summarise(gone, ["sgd", "nsgd"], MEASURES) if e["read_out"] == "last"] == ["sgd"] * 3
    nobody = entry(summarise([row for row in rows if row["method"] == "nsgd"], ["sgd", "nsgd"], MEASURES), "nsgd")
    assert nobody["pairs"] == 0
    assert math.isnan(nobody["p"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_that_diverged_is_no_test_and_no_crash(bad):
    found = entry(summary_of(rows_of({"sgd": [1.0, 2.0, 3.0], "nsgd": [1.0, bad, 2.0]})), "nsgd")
    assert math.isnan(found["p"])
    assert not math.isfinite(found["mean"])


def test_holm_by_hand():
    """Holm (1979): the smallest of m times m, the next times m - 1, never below one before it, at most 1."""
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(values, level):
    order = sorted(range(len(values)), key=lambda i: values[i])
    rejected = set()
    for rank, i in enumerate(order):
        if (len(values) - rank) * values[i] > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected


def test_every_comparison_of_a_table_is_corrected_together():
    rng = np.random.default_rng(0)
    found = summary_of(rows_of({m: list(rng.normal(i, 1, 6)) for i, m in enumerate(("sgd", "nsgd", "adamw"))}))
    own = [e for e in found if (e["read_out"], e["measure"]) == ("last", "test_accuracy")]
    assert [e["p_holm"] for e in own] == pytest.approx(holm([e["p"] for e in own]), nan_ok=True)
    assert own[1]["p_holm"] >= own[1]["p"]


def steps_of(*accuracies: float | None) -> list[dict[str, Any]]:
    rows = [{"step": i + 1, "gradients": 1.5 * (i + 1), "seconds": 0.1 * (i + 1)} for i in range(len(accuracies))]
    return [{**r, **({} if a is None else {"val_accuracy": a})} for r, a in zip(rows, accuracies, strict=True)]


def test_a_target_is_reached_at_the_first_validation_that_has_it_and_a_dead_run_misses():
    metrics = {"sgd": {0: steps_of(None, 0.4, None, 0.5), 1: steps_of(None, 0.3)}, "nsgd": {0: steps_of(0.6, 0.2)}}
    rows = times_to_target(metrics, range(2), 0.5, ACCURACY)
    assert [(r["method"], r["seed"], r["reached"], r["step"]) for r in rows] == [
        ("sgd", 0, 1, 4),
        ("sgd", 1, 0, math.inf),
        ("nsgd", 0, 1, 1),
        ("nsgd", 1, 0, math.inf),
    ]
    assert rows[0]["gradients"] == 6.0
    as_logged = {"sgd": {0: steps_of(float(np.float32(900 / 2000)))}}  # a little below 0.45
    assert times_to_target(as_logged, range(1), 0.45, ACCURACY)[0]["reached"] == 1
    assert rows[1]["seconds"] == math.inf


@pytest.mark.parametrize(("steps", "p"), [([1, 1, 1], math.nan), ([0, 0, 0], 1.0), ([1, 2, 1], 0.0572)])
def test_float32_accuracies_are_no_closer_than_their_rounding(steps, p):
    """One image of 360 more for each seed: differences of equal counts differ in the eighth digit."""
    base = [349, 350, 352]
    values = {"sgd": base, "nsgd": [b + step for b, step in zip(base, steps, strict=True)]}
    rows = rows_of({m: [float(np.float32(count / 360)) for count in counts] for m, counts in values.items()})
    found = entry(summary_of(rows), "nsgd")
    assert found["p"] == pytest.approx(p, abs=1e-4, nan_ok=True)
    assert found["difference"] == pytest.approx(np.mean(steps) / 360, abs=1e-6)


@pytest.mark.parametrize(("mode", "reached"), [("min", [3, 2]), ("max", [1, 1])])
def test_a_target_is_met_from_the_side_of_the_better(mode, reached):
    losses = {"sgd": {0: [0.9, 0.7, 0.5]}, "nsgd": {0: [0.8, 0.5, math.nan]}}
    metrics = {
        m: {seed: [{"step": i, "gradients": i, "seconds": i, "val_x": v} for i, v in enumerate(run, 1)]}
        for m, runs in losses.items()
        for seed, run in runs.items()
    }
    found = times_to_target(metrics, range(1), 0.5, Score("val_x", mode))
    assert [row["step"] for row in found] == reached
