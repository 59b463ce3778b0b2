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

from lightning_modules.study.statistics import holm, seeds_to_show, summarise, times_to_target
from lightning_modules.support.paired import paired_change
from lightning_modules.support.score import Score


def summary_of(rows: list[dict[str, Any]], methods: list[str] | None = None) -> list[dict[str, Any]]:
    seeds = sorted({row["seed"] for row in rows})
    return summarise(rows, methods or list(dict.fromkeys(row["method"] for row in rows)), MEASURES, seeds)


def rows_of(values: dict[str, list[float]], seeds: list[int] | None = None, sign: int = -1) -> list[dict[str, Any]]:
    return [
        {"method": m, "seed": s, "read_out": r, "test_accuracy": v, "val_accuracy": v / 2, "train_loss": sign * v}
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
    assert (found["low"], found["high"]) == pytest.approx((own.low, own.high))
    assert found["effect"] == "difference"  # of the negative losses too
    assert found["change"] == pytest.approx((difference.low + difference.high) / 2)
    assert (found["change_low"], found["change_high"]) == pytest.approx((difference.low, difference.high))
    assert found["p"] == pytest.approx(paired.pvalue)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_losses_are_compared_on_their_logarithm(scale):
    """Five of five seeds better by a factor of about 28, from one that spreads: a difference, not p = 0.21."""
    sgd, nsgd = [0.1, 3.0, 0.2, 0.5, 0.05], [0.004, 0.09, 0.008, 0.02, 0.0016]
    rows = rows_of({"sgd": [scale * v for v in sgd], "nsgd": [scale * v for v in nsgd]}, sign=1)
    found = entry(summary_of(rows), "nsgd", "train_loss")
    own = stats.ttest_1samp(np.log(nsgd), 0).confidence_interval(0.95)
    paired = stats.ttest_rel(np.log(nsgd), np.log(sgd))
    difference = paired.confidence_interval(0.95)
    assert found["effect"] == "ratio"
    assert found["mean"] == pytest.approx(scale * stats.gmean(nsgd))
    assert (found["low"], found["high"]) == pytest.approx((scale * np.exp(own.low), scale * np.exp(own.high)))
    assert found["change"] == pytest.approx(stats.gmean(nsgd) / stats.gmean(sgd))
    assert (found["change_low"], found["change_high"]) == pytest.approx(tuple(np.exp(difference)))
    assert found["p"] == pytest.approx(paired.pvalue)
    assert found["p"] < 1e-5 < 0.05 < stats.ttest_rel(nsgd, sgd).pvalue
    assert entry(summary_of(rows), "nsgd")["effect"] == "difference"  # of the accuracies


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_one_loss_that_is_not_above_zero_makes_differences_of_the_whole_table(bad):
    rows = rows_of({"sgd": [1.0, 2.0, 4.0], "nsgd": [0.5, 1.0, 2.0], "adamw": [1.0, 1.0, 1.0]}, sign=1)
    rows = [
        {**row, "train_loss": bad} if (row["method"], row["seed"], row["read_out"]) == ("adamw", 1, "ema") else row
        for row in rows
    ]
    found = [e for e in summary_of(rows) if e["measure"] == "train_loss"]
    assert {e["effect"] for e in found} == {"difference"}
    assert found[1]["change"] == pytest.approx(-7 / 6)


def test_the_effect_goes_by_the_name_and_not_by_the_results():
    columns = ["val_loss", "test_loss", "train_loss"]
    assert [m.effect for m in Score("val_loss", "min").measures(columns)] == ["ratio"] * 3
    for monitor, mode in (("val_error", "min"), ("val_accuracy", "max"), ("val_loss", "max"), ("val_wer", "min")):
        assert Score(monitor, mode).validation.effect == "difference"
    for monitor in ("val_perplexity", "valid/mse", "eval_nll_epoch"):
        assert Score(monitor, "min").validation.effect == "ratio"


def test_differences_are_paired_by_seed_not_by_order():
    rows = rows_of({"sgd": [1.0, 2.0, 4.0], "nsgd": [1.5, 2.5, 5.0]})
    shuffled = [row for row in rows if row["method"] == "sgd"] + [row for row in rows if row["method"] == "nsgd"][::-1]
    assert entry(summary_of(shuffled), "nsgd")["p"] == pytest.approx(stats.ttest_rel([1.5, 2.5, 5], [1, 2, 4]).pvalue)


def test_a_t_interval_by_hand():
    found = entry(summary_of(rows_of({"sgd": [1.0, 2.0, 3.0]})), "sgd")
    assert found["mean"] == 2.0
    assert found["high"] - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2) of printed tables
    assert math.isnan(found["change"])
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
    assert (found["change"], found["change_low"], found["change_high"]) == pytest.approx((difference,) * 3, abs=1e-12)
    assert found["p"] == pytest.approx(p, nan_ok=True)


def test_one_seed_has_means_and_differences_but_no_intervals():
    found = entry(summary_of(rows_of({"sgd": [1.0], "nsgd": [3.0]})), "nsgd")
    assert (found["mean"], found["change"]) == (3.0, 2.0)
    assert all(math.isinf(found[name]) for name in ("low", "high", "change_low", "change_high"))
    assert math.isnan(found["p"])


def test_the_others_are_compared_with_the_first_method():
    found = summary_of(rows_of({"nsgd": [1.0, 2.0], "bulk-sgd": [2.0, 4.0]}))
    assert entry(found, "bulk-sgd")["change"] == 1.5
    assert math.isnan(entry(found, "nsgd")["change"])
    assert len(found) == 2 * 2 * 3


def test_a_seed_whose_run_died_drops_out_of_the_pairs():
    rows = rows_of({"sgd": [1.0, 2.0, 4.0], "nsgd": [1.5, 9.0, 5.0]})
    left = [row for row in rows if (row["method"], row["seed"]) != ("nsgd", 1)]
    found = entry(summary_of(left), "nsgd")
    assert (found["n"], found["failed"], found["pairs"]) == (2, 1, 2)
    assert found["change"] == pytest.approx(0.75)
    gone = [row for row in rows if row["method"] == "sgd"]
    nobody = entry(summary_of(gone, ["sgd", "nsgd"]), "nsgd")
    assert (nobody["n"], nobody["failed"], nobody["pairs"]) == (0, 3, 0)
    first = entry(summary_of([row for row in rows if row["method"] == "nsgd"], ["sgd", "nsgd"]), "nsgd")
    assert (first["n"], first["pairs"]) == (3, 0)
    assert all(math.isnan(found["p"]) for found in (nobody, first))


@pytest.mark.parametrize(
    ("last", "start"), [(math.nan, 2.3), (math.inf, 2.3), (2.3, 2.3), (40.0, 2.3), (math.nan, math.nan)]
)
def test_a_run_that_ended_no_better_than_it_began_is_counted_and_not_averaged(last, start):
    """77 ± 47 % with one seed of five at chance: the mean is that of the four."""
    rows = rows_of({"sgd": [0.9, 0.91, 0.92, 0.93, 0.94], "nsgd": [0.95, 0.1, 0.97, 0.96, 0.99]}, sign=1)
    rows = [{**row, "train_loss": 0.01, "start_loss": 2.3} for row in rows]
    for row in rows:
        if (row["method"], row["seed"]) == ("nsgd", 1):
            row |= {"train_loss": last if row["read_out"] == "last" else 0.5, "start_loss": start}
    for found in (e for e in summary_of(rows) if e["method"] == "nsgd"):
        assert (found["n"], found["failed"], found["pairs"]) == (4, 1, 4)  # the average of such a run counts no more
    found = entry(summary_of(rows), "nsgd")
    assert found["mean"] == pytest.approx(np.mean([0.95, 0.97, 0.96, 0.99]))
    wanted = stats.ttest_rel([0.95, 0.97, 0.96, 0.99], [0.9, 0.92, 0.93, 0.94]).pvalue
    assert found["p"] == pytest.approx(wanted)


def test_one_pair_is_no_test():
    rows = rows_of({"sgd": [1.0, 2.0, 3.0], "nsgd": [1.5, math.nan, math.nan]})
    found = entry(summary_of(rows), "nsgd")
    assert (found["pairs"], found["change"]) == (1, 0.5)
    assert all(math.isnan(found[name]) for name in ("p", "p_holm", "seeds_to_show"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_in_a_run_that_trained_is_no_test_and_no_crash(bad):
    rows = rows_of({"sgd": [1.0, 2.0, 3.0], "nsgd": [1.0, bad, 2.0]})
    found = entry(summary_of([{**row, "train_loss": 1.0} for row in rows]), "nsgd")
    assert math.isnan(found["p"])
    assert not math.isfinite(found["mean"])


# -- how many seeds --------------------------------------------------------------------------------------------------


def change_of_size(size: float) -> Any:
    """Two pairs whose mean is so many standard deviations of theirs."""
    return paired_change({0: size - math.sqrt(0.5), 1: size + math.sqrt(0.5)}, {0: 0.0, 1: 0.0}, "difference")


@pytest.mark.parametrize(("size", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (-0.5, 34)])
def test_as_many_seeds_show_a_difference_as_the_tables_of_the_paired_t_test_say(size, seeds):
    """G*Power's, for a two-sided test at 5 % with power 0.8."""
    assert seeds_to_show(change_of_size(size), 1) == seeds


@pytest.mark.parametrize(("size", "compared"), [(1.2, 1), (0.9, 2), (2.5, 4)])
def test_so_many_seeds_find_the_difference_in_four_of_five_simulated_studies_and_one_less_do_not(size, compared):
    seeds = round(seeds_to_show(change_of_size(size), compared))
    rng = np.random.default_rng(0)
    found = [
        np.mean(stats.ttest_1samp(rng.normal(size, 1, (40_000, n)), 0, axis=1).pvalue < 0.05 / compared)
        for n in (seeds - 1, seeds)
    ]
    assert found[0] < 0.805  # the standard error is 0.002
    assert found[1] > 0.795


def test_no_difference_takes_no_number_of_seeds_and_a_huge_one_two():
    assert seeds_to_show(change_of_size(0.05), 1) == math.inf  # some 3,140, by the normal distribution
    assert seeds_to_show(change_of_size(1e6), 1) == 2
    nothing = paired_change({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, "difference")
    assert seeds_to_show(nothing, 1) == math.inf


def test_what_is_not_significant_takes_more_seeds_than_there_were():
    """Even where Holm's correction alone is why."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        runs = {m: list(rng.normal(0.4 * i, 1, 5)) for i, m in enumerate(("sgd", "nsgd", "adamw", "sam"))}
        found = [e for e in summary_of(rows_of(runs)) if e["measure"] == "test_accuracy" and e["pairs"]]
        assert all(e["seeds_to_show"] > 5 for e in found if e["p_holm"] >= 0.05)


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
    assert found["change"] == pytest.approx(np.mean(steps) / 360, abs=1e-6)


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
