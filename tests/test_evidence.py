"""benchmarks/evidence.py: what it draws of studies of plans, and that it names what is not as the files say."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import sys
from pathlib import Path
from statistics import geometric_mean, mean, median

import numpy as np
import pytest
import yaml
from scipy import stats
from studies import MEASURES, finished

from lightning_modules.study.statistics import summarise
from lightning_modules.support.files import read_csv, write_csv

ROOT = Path(__file__).parent.parent
CLAIM = "claim/resnet-32-plain-1024"
METHODS = {"sgd": "SGD", "nsgd": "NSGD", "adamw": "AdamW"}
SEEDS = range(3)


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("evidence")


@pytest.fixture
def plans(evidence):
    return importlib.import_module("common.plans")


@pytest.fixture
def house(evidence, tmp_path, monkeypatch):
    """The documents and results, to be changed; of the plans one, since to draw all takes long."""
    picks = importlib.import_module("common.picks")
    tasks = "|".join(re.escape(task) for name, task in picks._STUDIES.items() if name != CLAIM)
    others = {
        "README.md": re.compile(rf"^\| ({tasks})( \(trials\))?: (?!seconds).*\n", re.MULTILINE),
        "benchmarks/README.md": re.compile(rf"<!-- (cifar10/(?!{CLAIM}).*?): .*?<!-- /\1 -->\n*", re.DOTALL),
    }
    for document in evidence.TABLES:
        text = (ROOT / document).read_text(encoding="utf-8")
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text(
            others[document].sub("", text) if document in others else text, encoding="utf-8"
        )
    results = shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for path in (results / "cifar10").iterdir():
        if path.name != CLAIM.partition("/")[0]:
            shutil.rmtree(path)
    for name, value in {"ROOT": tmp_path, "RESULTS": results, "PLANS": results / "cifar10"}.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(picks, "RESULTS", results)
    monkeypatch.setattr(evidence, "PICTURE", results / "first_command.svg")
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished study of three methods and three seeds, as benchmarks/cifar10.py keeps it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        folder = tmp_path_factory.mktemp("made")
        study = {"methods": list(METHODS), "seeds": len(SEEDS), "lr": None, "tune": 3, "endpoint": "test_accuracy"}
        finished(folder / "runs" / "toy", **study)
        importlib.import_module("cifar10").keep(folder / "runs", folder / "plans" / "toy-plan")
        return folder / "plans" / "toy-plan" / "toy"


@pytest.fixture
def kept(plans, made, tmp_path):
    return plans.Kept(shutil.copytree(made, tmp_path / "toy-plan" / "toy"))


def table_of(text):
    """Cells of the first table by their row's name and their column's."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def replaced(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_everything_is_what_the_files_say(evidence):
    assert evidence.check() == []


def test_what_is_not_as_the_files_say_is_named(evidence, house):
    assert evidence.check() == []
    replaced(house / "nsgd" / "README.md", "CNN, batch 128 | 1.00", "CNN, batch 128 | 0.99")
    replaced(house / "benchmarks" / "results" / "first_command.svg", "<path", "<path ")
    trials = house / "benchmarks" / "results" / "cifar10" / CLAIM / "partial.csv"
    rows = read_csv(trials)
    best = min((row for row in rows if row["method"] == "adamw"), key=lambda row: row["val_loss"])
    best |= {"val_accuracy": 0.6, "val_loss": 1.0}
    write_csv(trials, rows)
    assert evidence.check() == [
        "README.md: the table picks",
        "nsgd/README.md: the table cost",
        f"benchmarks/README.md: the table cifar10/{CLAIM}",
        "benchmarks/results/first_command.svg",
        f"benchmarks/results/cifar10/{CLAIM}/curves.svg",
    ]
    evidence.redraw()
    assert evidence.check() == []
    assert "| 50.3 | 64.4 | 60.0 | 78.1 | Muon |" in (house / "README.md").read_text(encoding="utf-8")


def test_a_study_that_is_new_is_missed_and_gets_its_place_and_its_figure(evidence, house, made):
    to = house / "benchmarks" / "results" / "cifar10" / "toy-plan" / "toy"
    shutil.copytree(made, to)
    drawing = "results/cifar10/toy-plan/toy/curves.svg"
    assert evidence.check() == ["benchmarks/README.md: the table cifar10/toy-plan/toy", f"benchmarks/{drawing}"]
    before = (house / "benchmarks" / "README.md").read_text(encoding="utf-8")
    evidence.redraw()
    after = (house / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert evidence.check() == []
    start, end = before.split(f"<!-- /cifar10/{CLAIM} -->\n")
    assert after.startswith(start)
    assert after.endswith(f"<!-- /cifar10/toy-plan/toy -->\n{end}")
    assert f"]({drawing})\n\n<!-- /cifar10/toy-plan/toy -->" in after
    shutil.rmtree(to)
    with pytest.raises(ValueError, match=r"expected files for the table cifar10/toy-plan/toy in benchmarks/README.md"):
        evidence.check()


def test_the_command_ends_with_names_or_with_a_sentence(evidence, house, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--check"])
    monkeypatch.setattr(evidence, "figures", dict)  # which take a second each
    evidence.main()
    replaced(house / "README.md", "| 78.1 | Muon |", "| 78.2 | Muon |")
    with pytest.raises(SystemExit, match=r"^README.md: the table picks\nnot what the files say; run python"):
        evidence.main()
    replaced(house / "README.md", "<!-- /picks -->", "")
    with pytest.raises(SystemExit, match=r"^expected one place for the table picks in README.md, got 0$"):
        evidence.main()


def test_the_table_of_a_finished_study_has_the_statistics_of_its_runs(kept):
    """Against SciPy and the standard library, from results.csv."""
    entries = importlib.import_module("common.plan_entries")
    last = [row for row in read_csv(kept.folder / "results.csv") if row["read_out"] == "last"]
    settled = yaml.safe_load((kept.folder / "settled.yaml").read_text())["settings"]
    values = {
        (method, name): [next(r[name] for r in last if (r["method"], r["seed"]) == (method, seed)) for seed in SEEDS]
        for method in METHODS
        for name in ("test_accuracy", "train_loss", "step", "gradients")
    }
    base = values["sgd", "test_accuracy"]
    p = {m: float(stats.ttest_rel(values[m, "test_accuracy"], base).pvalue) for m in ("nsgd", "adamw")}
    smaller, larger = sorted(p, key=p.__getitem__)
    holm = {smaller: min(1, 2 * p[smaller]), larger: max(min(1, 2 * p[smaller]), p[larger])}

    def half(numbers):
        return stats.t.ppf(0.975, len(numbers) - 1) * stats.sem(numbers)

    table = table_of(entries.study_table(kept))
    assert list(table) == list(METHODS.values())
    for method, label in METHODS.items():
        row, accuracy, loss = table[label], values[method, "test_accuracy"], values[method, "train_loss"]
        assert float(row["tuned rate"].rstrip("*")) == pytest.approx(settled[method]["lr"], rel=0.05)
        tried = [trial["lr"] for trial in read_csv(kept.folder / "tuning.csv") if trial["method"] == method]
        assert row["tuned rate"].endswith("*") == (settled[method]["lr"] in (min(tried), max(tried)))
        assert row["n"] == "3"
        assert row["test accuracy, %"] == f"{100 * mean(accuracy):.1f} ± {100 * half(accuracy):.1f}"
        assert row["training loss"].split(" (")[0] == f"{geometric_mean(loss):.4f}"
        assert float(row["steps"]) == median(values[method, "step"])
        assert float(row["gradients"]) == pytest.approx(median(values[method, "gradients"]), rel=1e-2)
        if method == "sgd":
            assert row["minus SGD"] == ""
            continue
        gains = [own - other for own, other in zip(accuracy, base, strict=True)]
        what = "significant" if holm[method] < 0.05 else "no significant difference"
        assert row["minus SGD"] == (
            f"{100 * mean(gains):+.1f} ± {100 * half(gains):.1f}, {what} (p = {holm[method]:.2g})"
        )


def test_a_study_that_is_judged_by_its_training_loss_has_the_accuracy_beside_it(kept):
    entries = importlib.import_module("common.plan_entries")
    last = [row for row in read_csv(kept.folder / "results.csv") if row["read_out"] == "last"]
    config = yaml.safe_load((kept.folder / "config.yaml").read_text()) | {"endpoint": "train_loss"}
    (kept.folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = entries.study_table(kept)
    table = table_of(words)
    assert list(table["NSGD"])[3:6] == ["training loss", "over SGD", "test accuracy, %"]
    ratios = [
        next(row["train_loss"] for row in last if (row["method"], row["seed"]) == ("nsgd", seed))
        / next(row["train_loss"] for row in last if (row["method"], row["seed"]) == ("sgd", seed))
        for seed in SEEDS
    ]
    assert table["NSGD"]["over SGD"].startswith(f"{geometric_mean(ratios):.2f} times (")
    assert "Endpoint, fixed before the runs: training loss" in words


def test_an_entry_says_what_was_compared_who_won_where_it_ran_and_how_it_is_made(kept):
    entries = importlib.import_module("common.plan_entries")
    last = [row for row in read_csv(kept.folder / "results.csv") if row["read_out"] == "last"]
    means = {method: mean(row["test_accuracy"] for row in last if row["method"] == method) for method in METHODS}
    best = max(means, key=means.__getitem__)
    entry = entries.study_entry(kept, "curves.svg")
    words = " ".join(entry.split())
    won = f"Highest of all: {METHODS[best]}, {100 * means[best]:.1f} %."
    for part in (
        "**Toy-plan, toy.** SGD, NSGD, AdamW on Digits: mlp, 2 epochs, 3 seeds, 300 images, batches of 50.",
        won,
        "Endpoint, fixed before the runs: test accuracy",
        "Means over 3 paired seeds with their 95 % interval",
        f"On a CPU ({yaml.safe_load((kept.folder / 'environment.yaml').read_text())['processor']}).",
        "From `benchmarks/results/cifar10/toy-plan/`, made by `python benchmarks/cifar10.py --plan toy-plan`.",
    ):
        assert part in words
    (alt,) = re.findall(r"^!\[(.*)\]\(curves.svg\)$", entry, flags=re.M)
    assert alt.endswith(won)
    assert "Published" not in words


def test_sizes_of_a_network_of_ones_own_are_said(kept):
    replaced(kept.folder / "config.yaml", "sizes: null", "sizes: {hidden: [8, 16]}")
    entry = importlib.import_module("common.plan_entries").study_entry(kept, "curves.svg")
    assert "Digits: mlp, 2 epochs, 3 seeds, hidden [8, 16], 300 images" in " ".join(entry.split())


def test_the_figure_of_a_finished_study_has_every_seed_thin_their_median_thick_and_the_ends(kept):
    figures = importlib.import_module("common.plan_figures")
    losses, ends = figures.study_figure(kept).axes
    rows, results = read_csv(kept.folder / "curves.csv"), read_csv(kept.folder / "results.csv")
    lines = {line.get_label(): line for line in losses.get_lines()}
    for method, label in METHODS.items():
        runs = [[r["loss"] for r in rows if (r["method"], r["seed"]) == (method, seed)] for seed in SEEDS]
        for seed, run in enumerate(runs):
            np.testing.assert_array_equal(lines[f"_{label}, seed {seed}"].get_xydata(), list(enumerate(run, 1)))
            assert lines[f"_{label}, seed {seed}"].get_linewidth() < lines[label].get_linewidth() / 2
        np.testing.assert_allclose(lines[label].get_ydata(), [median(at) for at in zip(*runs, strict=True)])
        (points,) = [line for line in ends.get_lines() if line.get_label() == f"_{method} last"]
        own = [r["test_accuracy"] for r in results if (r["method"], r["read_out"]) == (method, "last")]
        np.testing.assert_allclose(points.get_xdata(), sorted(100 * value for value in own))


def test_seeds_and_methods_that_failed_are_said(kept):
    entries, figures = (importlib.import_module(f"common.plan_{name}") for name in ("entries", "figures"))
    for name in ("results", "curves"):
        rows = [row for row in read_csv(kept.folder / f"{name}.csv") if row["method"] != "adamw"]
        for row in rows:
            if (row["method"], row["seed"]) == ("nsgd", 1):
                row["train_loss" if name == "results" else "loss"] = math.nan
        write_csv(kept.folder / f"{name}.csv", rows)
    summary = summarise(read_csv(kept.folder / "results.csv"), list(METHODS), MEASURES, SEEDS)
    write_csv(kept.folder / "summary.csv", summary)
    table = table_of(entries.study_entry(kept, "curves.svg"))
    assert table["NSGD"]["n"] == "2 of 3"
    assert [table["AdamW"][name] for name in ("n", "test accuracy, %", "steps")] == [
        "0 of 3",
        "failed",
        "–",
    ]
    evidence = importlib.import_module("common.documents")
    assert evidence.svg(figures.study_figure(kept))


def test_a_study_that_is_not_finished_shows_its_trials_and_judges_nothing(plans):
    entries, figures = (importlib.import_module(f"common.plan_{name}") for name in ("entries", "figures"))
    claim = plans.Kept(ROOT / "benchmarks" / "results" / "cifar10" / CLAIM)
    if claim.finished:
        pytest.skip("it is finished")
    found = {}
    for row in read_csv(claim.folder / "partial.csv"):
        found.setdefault(row["method"], []).append(row)
    table = table_of(entries.study_table(claim))
    for method, rows in found.items():
        best = min((row for row in rows if math.isfinite(row["val_loss"])), key=lambda row: row["val_loss"])
        lost = sum(not row["train_loss"] <= math.log(10) for row in rows)
        cells = [f"{best['lr']:.2g}", f"{lost} of {len(rows)}", f"{best['train_loss']:.2f}"]
        shown = list(table[claim.files.label(method)].values())[1:]
        assert shown == [*cells, f"{100 * best['val_accuracy']:.1f}"]
    (axes,) = figures.study_figure(claim).axes
    assert axes.get_ylim()[1] < 3  # what diverged does not flatten the rest
    for method, rows in found.items():
        (line,) = [line for line in axes.get_lines() if line.get_label() == claim.files.label(method)]
        np.testing.assert_array_equal(sorted(line.get_xdata()), sorted(row["lr"] for row in rows))


def test_a_study_with_no_trials_yet_has_no_table_and_no_figure(plans, kept):
    entries = importlib.import_module("common.plan_entries")
    results = read_csv(kept.folder / "results.csv")
    for name in ("results", "summary", "tuning", "curves"):
        (kept.folder / f"{name}.csv").unlink()
    write_csv(kept.folder / "partial.csv", [{"run": f"runs/sgd-{row['seed']}", **row} for row in results[:2]])
    begun = plans.Kept(kept.folder)
    assert not begun.has_figure
    entry = entries.study_entry(begun, "curves.svg")
    assert "Of the runs to judge by 1 are made." in " ".join(entry.split())
    assert "| " not in entry
    assert "![" not in entry


def test_what_a_paper_says_stands_below_its_plan_and_is_called_published(plans, kept, tmp_path):
    entries = importlib.import_module("common.plan_entries")
    shutil.copytree(kept.folder, tmp_path / "paper-scaled" / "toy")
    words = " ".join(entries.study_table(plans.Kept(tmp_path / "paper-scaled" / "toy")).split())
    assert "Published ([1807.05031](" in words


def test_a_drawing_of_another_matplotlib_is_compared_by_what_it_shows(kept, plans):
    documents, figures = (importlib.import_module(f"common.{name}") for name in ("documents", "plan_figures"))
    drawing = documents.svg(figures.study_figure(kept))
    assert "<dc:date>" not in drawing
    kept.drawing.write_text(drawing)
    assert documents.is_of(kept.drawing, figures.study_figure(kept))
    clips = sorted(set(re.findall(r'id="(p[0-9a-f]{10})"', drawing)))
    kept.drawing.write_text(drawing.replace(clips[0], "p0123456789"))  # a hash that depends on the processor
    assert documents.is_of(kept.drawing, figures.study_figure(kept))
    kept.drawing.write_text(drawing.replace(clips[0], clips[1]))
    assert not documents.is_of(kept.drawing, figures.study_figure(kept))
    kept.drawing.write_text(drawing.replace("<path", "<path ", 1))
    assert not documents.is_of(kept.drawing, figures.study_figure(kept))
    kept.drawing.write_text(re.sub(r"Matplotlib v[\w.]+", "Matplotlib v1.0", drawing).replace("<path", "<path ", 1))
    assert documents.is_of(kept.drawing, figures.study_figure(kept))
    rows = read_csv(kept.folder / "curves.csv")
    rows[0]["loss"] *= 1.001
    write_csv(kept.folder / "curves.csv", rows)
    assert not documents.is_of(kept.drawing, figures.study_figure(plans.Kept(kept.folder)))


def test_lines_of_a_cell_stay_apart_and_code_is_not_broken(evidence):
    documents = importlib.import_module("common.documents")
    assert documents.markdown(["a", "b"], [["1\n2", "3"]]).splitlines()[-1] == "| 1<br>2 | 3 |"
    words = documents.wrapped(f"{'x ' * 55}`python benchmarks/a.py` {'y ' * 60}50 %")
    assert "`python benchmarks/a.py`" in words
    assert max(map(len, words.splitlines())) <= 120
    assert "50 %" in words


def test_paths_that_were_measured_have_a_table_of_their_own(kept):
    """Of two bursts and two measurements by hand, in any order; a method without any has none."""
    rows = [
        {"method": "sgd", "step": 20, "lambda_1": 6.0, "limit": 8.0},
        {"method": "sgd", "step": 0, "lambda_1": 9.0, "limit": 8.0},
        {"method": "sgd", "step": 30, "steps": 5, "crossed": 1, "along": 2, "height": 0.25, "distance": 3.5},
        {"method": "sgd", "step": 0, "steps": 4, "crossed": 2, "along": 1, "height": 0.5, "distance": 1.5},
        {"method": "nsgd", "step": 0, "lambda_1": 4.0, "limit": None},
    ]
    write_csv(kept.folder / "paths.csv", rows)
    entries = importlib.import_module("common.plan_entries")
    table = table_of(entries.study_table(kept).partition("\n\n")[2])
    names = ["largest eigenvalue, at most", "at the end", "its share of (2 + 2β) / lr", "barriers crossed"]
    names += ["along the floor", "height, first and last", "distance from the start"]
    assert [table["SGD"][name] for name in names] == ["9", "6", "0.75", "3 of 9", "3", "0.5, 0.25", "3.5"]
    assert [table["NSGD"][name] for name in names[:3]] == ["4", "4", entries.MISSING]
    assert set(table["AdamW"].values()) == {"AdamW", entries.MISSING}
    figures = importlib.import_module("common.plan_figures")
    losses, sharpness, _ = figures.study_figure(importlib.import_module("common.plans").Kept(kept.folder)).axes
    (line,) = [line for line in sharpness.get_lines() if line.get_label() == "_SGD"]
    np.testing.assert_allclose(line.get_xydata(), [[0, 9 / 8], [100, 6 / 8]])  # % of the run, shares of the limit
    assert [line.get_label() for line in sharpness.get_lines()] == ["_SGD", "_limit"]
    assert losses.get_xscale() == "linear"


def test_many_methods_give_a_figure_more_height_and_few_do_not(kept, monkeypatch):
    figures = importlib.import_module("common.plan_figures")
    assert figures.study_figure(kept).get_size_inches()[1] < 4
    monkeypatch.setattr(figures, "_ROW", 3.0)
    rows = 3.0 * len(kept.files.methods)
    assert rows < figures.study_figure(kept).get_size_inches()[1] < rows + 1


def test_runs_of_far_more_epochs_than_others_leave_these_their_room(kept):
    rows = read_csv(kept.folder / "curves.csv")
    longer = [{**row, "epoch": row["epoch"] + 200} for row in rows if row["method"] == "sgd"]
    write_csv(kept.folder / "curves.csv", [*rows, *longer])
    figures = importlib.import_module("common.plan_figures")
    losses, _ = figures.study_figure(importlib.import_module("common.plans").Kept(kept.folder)).axes
    assert losses.get_xscale() == "log"


def test_averages_by_name_stand_beside_their_schedules_in_table_and_figure(plans, tmp_path):
    falling = {"like": "sgd", "schedule": {"average": "ema-0.5"}, "label": "as EMA"}
    finished(tmp_path / "runs" / "toy", methods=["sgd", falling], seeds=2, epochs=1, averages=["ema-0.5", "swa-0.5"])
    importlib.import_module("cifar10").keep(tmp_path / "runs", tmp_path / "plans" / "averages-scaled")
    kept = plans.Kept(tmp_path / "plans" / "averages-scaled" / "toy")
    entry = importlib.import_module("common.plan_entries").study_entry(kept, "curves.svg")
    row = next(line.split(" | ") for line in entry.splitlines() if line.startswith("|  | EMA 0.5"))
    ends = {
        name: [
            r["test_accuracy"] for r in read_csv(kept.folder / "results.csv") if (r["method"], r["read_out"]) == name
        ]
        for name in (("sgd", "ema-0.5"), ("as-ema", "last"))
    }
    assert row[2].startswith(f"{100 * mean(ends['sgd', 'ema-0.5']):.1f}")
    assert row[4].startswith(f"{100 * mean(ends['as-ema', 'last']):.1f}")
    assert "averages by their settings, and of runs under the schedules" in entry
    figure = importlib.import_module("common.plan_figures").study_figure(kept)
    assert [axes.get_xlabel().partition(":")[0] for axes in figure.axes] == ["EMA", "SWA"]


def test_what_to_pick_is_the_best_marked_where_it_is_not_significantly_better(kept, monkeypatch):
    """Among all that are no control; after one marked stands the best of those that are; where none is ahead, SGD."""
    picks = importlib.import_module("common.picks")
    monkeypatch.setattr(picks, "_METHODS", dict(zip(picks._METHODS, [*METHODS, "nsgd"], strict=True)))
    summary = read_csv(kept.folder / "summary.csv")
    column = kept.files.endpoint.column

    def row(**changes):
        for entry in summary:
            if entry["read_out"] == "last" and entry["measure"] == column and entry["method"] in changes:
                entry["mean"], entry["p_holm"] = changes[entry["method"]]
        write_csv(kept.folder / "summary.csv", summary)
        return picks._row(importlib.import_module("common.plans").Kept(kept.folder), "task")

    none = math.nan
    sign = 1 if kept.files.endpoint.lower_is_better else -1
    best, second, base = (0.5 - sign * d for d in (0.2, 0.1, 0.0))
    assert row(sgd=(base, none), nsgd=(best, 0.06), adamw=(second, 0.5))[-1] == "NSGD (n.s.)"
    assert row(sgd=(base, none), nsgd=(best, 0.06), adamw=(second, 0.01))[-1] == "NSGD (n.s.), AdamW"
    assert row(sgd=(base, none), nsgd=(best, 0.04), adamw=(second, 0.01))[-1] == "NSGD"
    assert row(sgd=(base, none), nsgd=(1 - best, 0.04), adamw=(1 - best, 0.01))[-1] == "SGD"
    shown = row(sgd=(base, none), nsgd=(best, 0.04), adamw=(second, 0.01))
    assert shown[0] == f"task: {kept.files.endpoint.header}"
    measure = kept.files.endpoint
    assert [float(cell) for cell in shown[1:4]] == pytest.approx([measure.factor * v for v in (base, best, second)])
    for _, *seconds, pick in picks._to_a_loss():
        assert pick == list(picks._METHODS)[int(np.argmin([float(s) if s[0] == "0" else 9 for s in seconds]))]


def test_a_study_with_spectra_has_the_columns_of_the_2019_table(kept, made, plans):
    """Means over seeds, of the best validation and of the end, by the standard library."""
    rows, numbers = [], np.random.default_rng(0)
    for row in read_csv(kept.folder / "results.csv"):
        if row["read_out"] == "last":
            spectra = [dict(zip(("frobenius", "lambda_1", "distance"), numbers.random(3), strict=True)) for _ in "lb"]
            rows += [row | spectra[0], row | spectra[1] | {"read_out": "best", "test_accuracy": row["seed"] / 10}]
    write_csv(kept.folder / "results.csv", rows)
    config = yaml.safe_load((kept.folder / "config.yaml").read_text())
    (kept.folder / "config.yaml").write_text(yaml.safe_dump({**config, "spectrum": {"k": 3, "samples": 50}}))
    entries = importlib.import_module("common.plan_entries")
    assert entries._spectrum(plans.Kept(made)) == []
    (text,) = entries._spectrum(plans.Kept(kept.folder))
    assert "3 largest eigenvalues of the Hessian of 50 training samples" in " ".join(text.split())
    table, epoch = table_of(text), config["epochs"] // 2
    for method, label in METHODS.items():
        best, last = ([r for r in rows if (r["method"], r["read_out"]) == (method, name)] for name in ("best", "last"))
        both = {
            name: " / ".join(f"{mean(r[name] for r in each):.3g}" for each in (best, last))
            for name in ("frobenius", "lambda_1")
        }
        wanted = {
            "norm of the Hessian": both["frobenius"],
            "its largest eigenvalue": both["lambda_1"],
            "best: test accuracy, %": "10",
            "end: training loss": f"{mean(r['train_loss'] for r in last):.3g}",
            "best: distance": f"{mean(r['distance'] for r in best):.3g}",
        }
        curves = [r for r in read_csv(kept.folder / "curves.csv") if (r["method"], r["epoch"] + 1) == (method, epoch)]
        wanted[f"validation accuracy, %, at epoch {epoch}"] = f"{100 * mean(r['val_accuracy'] for r in curves):.3g}"
        assert {name: table[label][name] for name in wanted} == wanted


def test_a_study_of_rates_alone_shows_how_wide_the_good_ones_are(kept, plans):
    losses = {"sgd": [2.0, 1.05, 1.0, 1.5], "nsgd": [2.0, 0.92, 0.9, 0.95], "adamw": [1.0, 1.2, 1.4, 1.6]}
    rates = [0.01, 0.1, 1.0, 10.0]
    rows = [
        {
            "method": m,
            "lr": lr,
            "seed": seed,
            "train_loss": loss,
            "val_loss": loss,
            "val_accuracy": 0.5,
            "start_loss": 3.0,
        }
        for m, found in losses.items()
        for lr, loss in zip(rates, found, strict=True)
        for seed in range(2)
    ]
    write_csv(kept.folder / "sweep.csv", rows)
    config = yaml.safe_load((kept.folder / "config.yaml").read_text())
    config |= {"seeds": 1, "sweep_seeds": 2}
    (kept.folder / "config.yaml").write_text(yaml.safe_dump(config))
    entries, figures = (importlib.import_module(f"common.plan_{name}") for name in ("entries", "figures"))
    swept = plans.Kept(kept.folder)
    entry = " ".join(entries.study_entry(swept, "curves.svg").split())
    assert "best mean training loss: SGD 1.00, NSGD ≥ 2.00 and AdamW ≥ 0.00." in entry
    assert "Means over 2 seeds at each rate, no tests." in entry
    assert "Endpoint" not in entry
    assert {row["decades within 10 % of the best loss"] for row in table_of(entries.study_table(swept)).values()} == {
        "1.00",
        "≥ 2.00",
        "≥ 0.00",
    }
    assert [axes.get_xlabel() for axes in figures.study_figure(swept).axes] == ["learning rate"] * 2


def test_what_diverged_does_not_flatten_the_losses_of_the_rest(kept):
    rows = read_csv(kept.folder / "curves.csv")
    for row in rows:
        if row["method"] == "sgd" and row["epoch"] > 2:
            row["loss"] *= 1e9
    write_csv(kept.folder / "curves.csv", rows)
    figures = importlib.import_module("common.plan_figures")
    losses, _ = figures.study_figure(importlib.import_module("common.plans").Kept(kept.folder)).axes
    low, high = losses.get_ylim()
    others = [row["loss"] for row in rows if row["method"] != "sgd"]
    assert high == pytest.approx(1.2 * median(row["loss"] for row in rows if row["epoch"] == 0))
    assert low < min(others)
    assert (min(others) - low) < 0.2 * (high - low) or losses.get_yscale() == "log"
