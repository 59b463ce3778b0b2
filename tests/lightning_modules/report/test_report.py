"""The report: true to the files in the folder, in words, tables and figures, whatever became of the runs."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml
from matplotlib.axes import Axes
from rich.console import Console
from studies import MEASURES

from lightning_modules import Digits
from lightning_modules.report.study.figures import study_figures
from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.numbers import ratio
from lightning_modules.report.study.rates import edges, range_near_the_best, settings_table, stable_range
from lightning_modules.report.study.report import print_table, write_report
from lightning_modules.report.study.shortfalls import shortfalls_table, shortfalls_words
from lightning_modules.report.study.tables import main_tables, overview
from lightning_modules.report.study.verdict import beside_averages, verdict
from lightning_modules.report.study.words import caption, summary, title
from lightning_modules.report.style import EARLIER, method_styles
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import RECIPES, NSGDOptions
from lightning_modules.study.methods.schedule import Schedule
from lightning_modules.study.options import Study
from lightning_modules.study.statistics import summarise
from lightning_modules.support.files import read_csv, write_csv

MOMENTUM = 0.5
DEAD = None
LOSS_THEN = "0.0031\n-0.0068 ± 0.0008 better"  # of the kept study, whose losses were compared as differences


class Page(HTMLParser):
    """Tags with their attributes, the text, the items of lists, and every table as rows of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.tables, self.items = "", [], []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += "" if {"style", "script"} & set(self._open) else data
        if "li" in self._open:
            self.items[-1] += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data


# -- folders written by hand -----------------------------------------------------------------------------------------

Result = tuple[float, float]  # accuracy of test and validation, training loss

SGD: Sequence[Result | None] = [(0.90, 0.30), (0.91, 0.30), (0.92, 0.30)]
NSGD: Sequence[Result | None] = [(0.91, 0.20), (0.93, 0.19), (0.95, 0.21)]


def write_study(
    folder: Path, runs: Mapping[str, Sequence[Result | None]], *, start_loss: float = math.inf, **config: Any
) -> Path:
    """A study of two epochs of four steps; a run with no result died."""
    seeds = len(next(iter(runs.values())))
    study = Study(methods=[*runs], seeds=seeds, epochs=2, endpoint="test_accuracy")
    plain = yaml.safe_load(yaml.safe_dump(study.resolved()))
    results, times, deaths = [], [], []
    settings = {m: dict(RECIPES[m].defaults) for m in runs}
    for method, found in runs.items():
        extra, second = (1.1, 3.0) if RECIPES[method].damping is not None else (1.0, 2.0)
        for seed, result in enumerate(found):
            if result is DEAD:
                deaths.append({"run": f"runs/{method}-{seed}", "method": method, "seed": seed})
                continue
            accuracy, loss = result
            counts = {"step": 8, "gradients": 8 * extra, "refreshes": 2, "hvps": 0}
            scores = {"test_accuracy": accuracy, "val_accuracy": accuracy, "train_loss": loss, "val_loss": loss}
            own = {"method": method, "seed": seed}
            rate = {"lr": settings[method]["lr"]} if "lr" in settings[method] else {}
            results.append({**own, "read_out": "last", **rate, **scores, **counts, "start_loss": start_loss})
            times.append({**own, "seconds": second})
            steps = [
                {"step": i, "epoch": (i - 1) // 4, "loss": loss, "gradients": i * extra, "seconds": i * second / 8}
                for i in range(1, 9)
            ]
            for row in steps[3::4]:
                row["val_accuracy"] = accuracy
            run = folder / "runs" / f"{method}-{seed}"
            write_csv(run / "metrics.csv", steps)
            (run / "run.yaml").write_text(yaml.safe_dump({**own, **settings[method]}))
    (folder / "config.yaml").write_text(yaml.safe_dump({**plain, **config}, sort_keys=False))
    (folder / "environment.yaml").write_text("python: 3.11\n")
    if not set(runs) <= set(EARLIER):
        described = Study(methods=[*runs]).described_methods()
        (folder / "methods.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    (folder / "settled.yaml").write_text(yaml.safe_dump({"settings": settings, "target": None}, sort_keys=False))
    for name, rows in {"results": results, "times": times, "deaths": deaths}.items():
        write_csv(folder / f"{name}.csv", rows)
    write_csv(folder / "summary.csv", summarise(results, [*runs], MEASURES, range(seeds)))
    return folder


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[float], list[float]]]:
    """Label, x and y of every curve that is drawn from now on."""
    drawn: list[tuple[str, list[float], list[float]]] = []
    plain = Axes.plot

    def plot(self: Axes, x: Any, y: Any, *args: Any, **options: Any) -> Any:
        drawn.append((options.get("label", ""), [float(v) for v in x], [float(v) for v in y]))
        return plain(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    return drawn


def change(path: Path, **values: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}, sort_keys=False))


def change_rows(path: Path, **values: Any) -> None:
    write_csv(path, [{**row, **values} for row in read_csv(path)])


class Report:
    """What a report says, without its figures."""

    def __init__(self, folder: Path) -> None:
        files = read_folder(folder)
        self.verdict, self.averages = verdict(files).split("\n"), beside_averages(files)
        self.summary, self.shortfalls, self.caption = summary(files), shortfalls_words(files), caption(files)
        self.overview, short = overview(files), shortfalls_table(files)
        self.short = {row[0]: dict(zip(short["header"][1:], row[1:], strict=True)) for row in short["rows"]}
        self.tables = [[table["header"], *table["rows"]] for table in (*main_tables(files), settings_table(files))]
        titles = [table["title"] for table in main_tables(files)]
        self.text = "\n".join([title(files), *titles, *self.summary, *self.shortfalls, self.caption])

    def table(self, *header: str) -> list[list[str]]:
        """Rows of the only table whose header begins so."""
        (found,) = [rows for names, *rows in self.tables if names[: len(header)] == list(header)]
        return found


def printed(folder: Path, width: int = 100) -> str:
    file = io.StringIO()
    print_table(folder, Console(file=file, width=width))
    return file.getvalue()


def test_the_summary_says_what_came_out(tmp_path):
    """Differences of 1, 2 and 3 points: t = 2 √3, and with two degrees of freedom p = 1 - t / √(t² + 2) = 0.0742.

    Ratios of the loss, 0.667, 0.633 and 0.7, on their logarithm: mean -0.406, standard deviation 0.0500; t = 14.1, p =
    0.0050; half-widths 4.303 / √3 standard deviations.
    """
    report = Report(write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}))
    sentences = [
        "SGD and NSGD trained the network mlp on Digits, with 3 paired seeds and 2 epochs each; their settings were "
        "given, and nothing was tuned.",
        "Against SGD, with the last weights of each, NSGD had a test accuracy of 93.0 % (+2.0 ± 2.5 points), no "
        "significant difference (p = 0.074), and a training loss of 0.1998 (0.67 times, 95 % 0.59 to 0.75), "
        "significant (p = 0.005) (paired t-tests, p corrected by Holm's method).",
        "A run of SGD took 8 gradients and 2 seconds; one of NSGD 1.10 and 1.50 times as many.",
    ]
    assert report.summary[:3] == sentences
    text = Page(write_report(tmp_path)).text
    assert [said in text for said in sentences] == [True] * 3
    assert "No significant difference in test accuracy: NSGD 93.0 % against SGD 91.0 %." in " ".join(
        printed(tmp_path).split()
    )


def test_every_method_is_in_the_summary(tmp_path):
    report = Report(write_study(tmp_path, {m: SGD if m == "sgd" else NSGD for m in EARLIER}))
    for sentence in report.summary:
        assert [style.label for style in EARLIER.values() if style.label not in sentence] == []
    assert [row[0].split("\n")[0] for row in report.overview["rows"]] == [style.label for style in EARLIER.values()]


def test_where_nsgd_did_not_help_lists_all_that_is_not_significantly_better(tmp_path):
    report = Report(write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}))
    assert report.short == {
        "NSGD": {
            "no significant difference in": "test accuracy, validation accuracy",  # not the training loss: it did help
            "dearer": "1.10 times the gradients of a run (8.8 against 8); "
            "1.50 times the seconds of a run (3 against 2)",
        }
    }


def test_a_significant_loss_is_said_as_such(tmp_path):
    report = Report(write_study(tmp_path, {"nsgd": NSGD, "bulk-sgd": SGD}))
    assert report.short["Bulk-SGD"]["significantly worse in"] == "training loss"
    assert report.short["Bulk-SGD"]["dearer"] == "–"  # it cost the same


def test_where_nsgd_helped_everywhere_that_is_said(tmp_path):
    better = [(0.95 + 0.001 * i, 0.1 + 0.001 * i) for i in range(3)]
    worse = [(0.90, 0.3)] * 3
    report = Report(write_study(tmp_path, {"nsgd": worse, "bulk-sgd": better}))
    assert report.shortfalls[1:] == [
        "Bulk-SGD: significantly better than NSGD in every read-out and measure, and in no cost dearer."
    ]
    assert report.short == {}
    assert report.verdict[0].startswith(
        "Significantly better in test accuracy: Bulk-SGD 95.1 % (+5.1 ± 0.2 points; p = "
    )
    assert report.verdict[0].endswith(") against NSGD 90.0 %.")


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (
            ["sgd", "adamw"],
            "No method of this study damps the sharpest directions, so there is nothing to say of NSGD.",
        ),
        (
            ["sgd", "random"],
            "No method of this study damps the sharpest directions, so there is nothing to say of NSGD.",
        ),
        (["nsgd", "sgd"], "NSGD is what others are compared with here, and so is not judged"),
        (["sgd"], "No method of this study damps the sharpest directions"),
    ],
)
def test_without_nsgd_to_judge_that_is_said(tmp_path, methods, said):
    report = Report(write_study(tmp_path, dict(zip(methods, (SGD, NSGD), strict=False))))
    assert sum(words.startswith(said) for words in report.shortfalls) == 1
    if len(methods) == 2:
        first, second = (RECIPES[m].label for m in methods)
        assert (
            f"Against {first}, with the last weights of each, {second} had a test accuracy of 93.0 %"
            in report.summary[1]
        )
    else:
        assert report.summary[1] == (
            "With its last weights SGD had a test accuracy of 91.0 ± 2.5 %, and a training loss of 0.3000 (0.3000 to "
            "0.3000), with nothing to compare it with."
        )
        assert report.tables[0][0] == ["weights", "method", "mean"]


def test_one_seed_has_neither_intervals_nor_tests(tmp_path):
    report = Report(write_study(tmp_path, {"sgd": SGD[:1], "nsgd": NSGD[:1]}))
    assert report.summary[1] == (
        "Against SGD, with the last weights of each, NSGD had a test accuracy of 91.0 % (+1.0 points), and a training "
        "loss of 0.2000 (0.67 times) (one seed, so no tests)."
    )
    assert report.tables[0][2] == ["", "NSGD", "91.0", "+1.0", "no test", "–"]
    assert "One seed, so no intervals and no tests" in report.text
    assert report.short["NSGD"]["no test of"] == "test accuracy, validation accuracy, training loss"
    assert report.verdict[0] == "One seed allows no test of test accuracy: NSGD 91.0 % against SGD 90.0 %."
    assert title(read_folder(tmp_path)) == "SGD, NSGD on Digits: mlp, 2 epochs, 1 seed"


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.049, "significant (p = 0.049)"), (0.051, "no significant difference (p = 0.051)"), (math.nan, "no test")],
)
def test_the_verdict_is_that_of_the_corrected_p_value(tmp_path, p, said):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD, "bulk-sgd": NSGD})
    rows = read_csv(folder / "summary.csv")
    write_csv(folder / "summary.csv", [{**r, "p": 0.01, "p_holm": p if r["method"] == "nsgd" else 0.7} for r in rows])
    report = Report(folder)
    for table in report.tables[:2]:
        assert [row[4] for row in table[1:]] == ["", said, "no significant difference (p = 0.7)"]
    shortly = {"no test": "no test", "significant (p = 0.049)": "better"}.get(said, "n.s.")
    assert [row[1].endswith(f" {shortly}") for row in report.overview["rows"]] == [False, True, shortly == "n.s."]
    (line,) = [line for line in printed(folder).splitlines() if line.startswith(" NSGD ")]
    assert " ".join(line.split()) == f"NSGD 93.0 {shortly}"


# -- the one table, and averaging ------------------------------------------------------------------------------------


def with_averages(folder: Path, averages: Mapping[str, Mapping[str, Sequence[float]]]) -> Report:
    """Test accuracies of other read-outs: read-out to method to one for each seed."""
    rows = read_csv(folder / "results.csv")
    last = [row for row in rows if row["read_out"] == "last"]
    for read_out, values in averages.items():
        rows += [
            {**row, "read_out": read_out, "test_accuracy": values[row["method"]][row["seed"]]}
            for row in last
            if row["method"] in values
        ]
    write_csv(folder / "results.csv", rows)
    write_csv(
        folder / "summary.csv",
        summarise(
            rows,
            list(dict.fromkeys(row["method"] for row in rows)),
            MEASURES,
            range(len({row["seed"] for row in rows})),
        ),
    )
    return Report(folder)


def test_one_table_has_methods_down_and_read_outs_across(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD, "random": SGD})
    report = with_averages(
        folder, {"ema": {"sgd": [0.92, 0.93, 0.94]}, "swa": {"sgd": [0.9, 0.9, 0.9], "nsgd": [0.95, 0.95, 0.95]}}
    )
    assert report.overview["header"] == ["method", "last", "EMA", "SWA", "training loss", "a run"]
    assert report.overview["rows"] == [
        ["SGD", "91.0 ± 2.5", "93.0 ± 2.5", "90.0 ± 0.0", "0.3000 (0.3000 to 0.3000)", "2 s\n8 steps"],
        # Holm makes 0.15 of 0.074, and 0.0050 of the loss remains below 0.05 twice.
        [
            "NSGD",
            "93.0\n+2.0 ± 2.5 n.s.",
            "–",
            "95.0\n+5.0 ± 0.0 no test",
            *("0.1998\n0.67 times (0.59 to 0.75) better", "3 s\n8 steps"),
        ],
        [
            "random directions\ncontrol",
            "91.0\n+0.0 ± 0.0 n.s.",
            "–",
            "–",
            "0.3000\n1.00 times (1.00 to 1.00) n.s.",
            "3 s\n8 steps",
        ],
    ]


@pytest.mark.parametrize(
    ("average", "said"),
    [
        # NSGD's 91, 93 and 95 minus these: 2, 2.1 and 2.2; -1, 0 and 1; -2, -2.1 and -2.2.
        ([0.89, 0.909, 0.928], "+2.1 ± 0.2 points, more than averaging gives"),
        ([0.92, 0.93, 0.94], "+0.0 ± 2.5 points, not shown to be more than averaging gives"),
        ([0.93, 0.951, 0.972], "-2.1 ± 0.2 points, less than averaging gives"),
        ([0.89, 0.91, 0.93], "+2.0 ± 0.0 points, the same on every seed, so no test"),
    ],
)
def test_a_gain_is_held_against_the_better_average_of_the_first_methods_own_run(tmp_path, average, said):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD, "adamw": SGD})
    (words,) = with_averages(folder, {"ema": {"sgd": [0.1, 0.2, 0.3]}, "swa": {"sgd": average}}).averages
    assert words.endswith(f"Against that average, the last weights of NSGD are at {said}.")
    assert words.startswith("By averaging alone, SGD's own SWA is at ")


def test_a_method_without_a_run_is_held_against_no_average(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": [DEAD] * 3})
    (words,) = with_averages(folder, {"ema": {"sgd": [0.89, 0.909, 0.928]}}).averages
    assert words.endswith("the last weights of NSGD have no run beside it.")


def test_without_averages_or_with_one_seed_no_gain_is_tested(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD[:1], "nsgd": NSGD[:1]})
    assert Report(folder).averages == []
    (words,) = with_averages(folder, {"ema": {"sgd": [0.95]}}).averages
    assert words.endswith("NSGD are at -4.0 points, one seed, so no test.")


def test_how_many_seeds_would_show_a_difference_is_said_where_none_is_significant(tmp_path):
    """Differences of 1, 2 and 3 points are 2 standard deviations: five pairs, by the tables of G*Power."""
    report = Report(write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}))
    assert report.verdict[1] == "A difference of this size would take about 5 seeds to show."
    assert report.tables[0][2][5] == "about 5"
    change_rows(tmp_path / "summary.csv", seeds_to_show=math.inf)
    assert Report(tmp_path).verdict[1] == "A difference of this size would take over 1,000 seeds to show."
    (tmp_path / "two").mkdir()
    two = Report(write_study(tmp_path / "two", {"sgd": SGD, "nsgd": NSGD, "bulk-sgd": NSGD}))
    assert (
        two.verdict[1] == "Differences of these sizes would take about 6 (NSGD) and about 6 (Bulk-SGD) seeds to show."
    )


def test_a_target_that_no_run_reached_is_said_once(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    assert with_target(folder, dict.fromkeys(("sgd", "nsgd"), [math.inf] * 3)).verdict[-1] == (
        "90 % validation accuracy was reached in no run."
    )


def test_the_verdict_names_what_is_worse_and_what_is_cheaper(tmp_path):
    worse = [(0.80 + 0.001 * i, 0.5 + 0.01 * i) for i in range(3)]
    report = Report(write_study(tmp_path, {"nsgd": SGD, "bulk-sgd": worse, "sgd": SGD}))
    assert report.verdict[0].startswith(
        "Significantly worse in test accuracy: Bulk-SGD 80.1 % (-10.9 ± 2.2 points; p = "
    )
    assert report.verdict[1] == (
        "Secondary, training loss against NSGD 0.3000: significantly worse with Bulk-SGD 0.5099 (1.70 times, 95 % 1.62 "
        "to 1.78)."
    )
    assert report.verdict[2] == "A run of Bulk-SGD took as many seconds as NSGD."


# -- methods that a study names itself -------------------------------------------------------------------------------


@pytest.mark.draws
def test_methods_are_called_and_drawn_as_the_study_says(tmp_path, curves):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    for path in (folder / "results.csv", folder / "times.csv", folder / "summary.csv"):
        rows = [{**row, "method": {"nsgd": "damped-lion"}.get(row["method"], row["method"])} for row in read_csv(path)]
        write_csv(path, rows)
    for seed in range(3):
        (folder / "runs" / f"nsgd-{seed}").rename(folder / "runs" / f"damped-lion-{seed}")
    settled = yaml.safe_load((folder / "settled.yaml").read_text())["settings"]
    change(folder / "settled.yaml", settings={"sgd": settled["sgd"], "damped-lion": {"lr": 0.1}})
    change(folder / "config.yaml", methods=["sgd", {"class_path": "lion.Lion", "damped": True}])
    written = {
        "sgd": {"label": "plain SGD", "color": "#112233", "line": "-", "control": False, "damps": False, "new": 1},
        "damped-lion": {
            "label": "damped Lion",
            "color": "#445566",
            "line": [0, [5, 2]],
            "control": False,
            "damps": True,
        },
    }
    (folder / "methods.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    report = Report(folder)
    assert (
        report.verdict[0] == "No significant difference in test accuracy: damped Lion 93.0 % against plain SGD 91.0 %."
    )
    assert list(report.short) == ["damped Lion"]
    source = write_report(folder).read_text()
    assert "methods.yaml" in source
    assert "stroke: #445566" in source
    (folder / "methods.yaml").unlink()
    change(folder / "config.yaml", methods=["sgd", "damped-lion"])
    with pytest.raises(ValueError, match=r"expected methods\.yaml to say how 'damped-lion' is drawn, got none"):
        read_folder(folder)


def test_a_folder_that_was_kept_without_its_runs_still_opens(tmp_path):
    kept = Path(__file__).parents[3] / "benchmarks" / "results" / "digits"
    folder = Path(shutil.copytree(kept, tmp_path / "out"))
    page = Page(write_report(folder))
    assert page.tables[0][0][0] == "method"
    assert [row[0] for row in page.tables[0][1:]] == ["SGD", "NSGD", "Bulk-SGD"]
    assert page.source.count("<figure") == 1  # of the final values, which need the results alone
    assert page.tables[0][2][1:5] == ["97.2\n-0.2 ± 0.4 n.s.", *["97.2\n-0.1 ± 0.5 n.s."] * 2, LOSS_THEN]
    assert all((folder / str(attributes["href"])).is_file() for tag, attributes in page.tags if tag == "a")


# -- runs that died or diverged --------------------------------------------------------------------------------------


def test_seeds_that_died_are_left_out_and_named(tmp_path):
    report = Report(write_study(tmp_path, {"sgd": SGD, "nsgd": [NSGD[0], DEAD, NSGD[2]]}))
    assert report.tables[0][2][3] == "+2.0 ± 12.7"  # 1 and 3 points: 12.706 standard errors of 1
    assert "Runs that failed, and are in no mean and no test: NSGD 1 of 3 (died, or" in report.text
    assert "Runs that died: runs/nsgd-1." in report.text
    assert report.tables[0][2][2] == "93.0 ± 25.4\n2 of 3 seeds; 1 failed"
    assert report.overview["rows"][1][1] == "93.0\n+2.0 ± 12.7 n.s.\n2 of 3 seeds; 1 failed"
    assert report.short["NSGD"]["runs"] == "of 3 runs 1 died"


def test_a_method_none_of_whose_runs_survived_has_no_numbers(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": [DEAD] * 3, "bulk-sgd": NSGD})
    report = Report(folder)
    assert "every run of NSGD failed; Bulk-SGD had a test accuracy of 93.0 %" in report.summary[1]
    assert "every run of NSGD died; one of Bulk-SGD 1.10" in report.summary[2]
    assert report.short["NSGD"] == {**dict.fromkeys(report.short["NSGD"], "–"), "runs": "of 3 runs 3 died"}
    assert ["NSGD", *["–"] * 5] in report.table("method", "steps")
    assert report.tables[0][2] == ["", "NSGD", "failed\nall 3 seeds", "", "no test", "–"]
    assert "Every run of NSGD failed; no significant difference in test accuracy: Bulk-SGD" in " ".join(
        printed(folder).split()
    )
    assert report.overview["rows"][1][1:] == [*["failed\nall 3 seeds"] * 2, "–"]


def test_a_first_method_that_died_leaves_nothing_to_compare_with(tmp_path):
    report = Report(write_study(tmp_path, {"sgd": [DEAD] * 3, "nsgd": NSGD}))
    assert report.tables[0][2] == ["", "NSGD", "93.0 ± 5.0", "", "no test", "–"]
    assert report.verdict[0] == "Every run of SGD failed, so there is nothing to compare with."
    assert "NSGD had a test accuracy of 93.0 ± 5.0 %" in report.summary[1]
    assert report.summary[1].endswith("(no test was possible).")
    assert report.summary[2] == "Every run of SGD died; a run of NSGD took 8.8 gradients and 3 seconds."


FAILED_WELL = [(0.95, 0.2), (0.951, 0.19), (0.1, 3.0), (0.952, 0.21), (0.953, 0.2)]  # four good, one that diverged
EVEN = [(0.90, 0.3), (0.901, 0.3), (0.902, 0.3), (0.903, 0.31), (0.904, 0.3)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3.0])
def test_a_seed_that_diverged_is_counted_and_not_averaged(tmp_path, loss):
    """Its last loss is not finite, or above that of the first batch, 2.3: 95.1 % is the mean of the other four."""
    nsgd = [(accuracy, loss if i == 2 else value) for i, (accuracy, value) in enumerate(FAILED_WELL)]
    report = Report(write_study(tmp_path, {"sgd": EVEN, "nsgd": nsgd}, start_loss=2.3))
    for text in (*report.overview["rows"][1][1:3], report.verdict[0], report.summary[1]):
        assert "4 of 5 seeds; 1 failed" in text
    assert report.verdict[0].startswith(
        "Significantly better in test accuracy: NSGD 95.1 % (4 of 5 seeds; 1 failed; +4.9 ± 0.1 points; p = "
    )
    assert report.verdict[1].startswith(
        "Secondary, training loss against SGD 0.3020: significantly better with NSGD 0.1999 (4 of 5 seeds; 1 failed; "
        "0.66 times"
    )
    assert report.short["NSGD"]["runs"] == "of 5 runs 1 diverged"
    assert report.shortfalls[1:] == []  # not better everywhere
    assert "Runs that failed, and are in no mean and no test: NSGD 1 of 5 (" in report.text
    assert "± 40" not in report.text


def test_a_change_over_fewer_seeds_than_the_mean_says_so(tmp_path):
    """Of SGD two of five seeds fail: the mean of NSGD is over five, its change from SGD over three pairs."""
    sgd = [(0.5, 9.0), (0.6, 9.0), (0.95, 0.1), (0.96, 0.1), (0.95, 0.1)]
    nsgd = [(0.70, 0.1), (0.72, 0.1), (0.951, 0.1), (0.962, 0.1), (0.953, 0.1)]
    folder = write_study(tmp_path, {"sgd": sgd, "nsgd": nsgd}, start_loss=2.3)
    report = Report(folder)
    assert report.overview["rows"][1][1] == "85.7\n+0.2 ± 0.2 over 3 pairs n.s."
    assert "+0.2 ± 0.2 points over 3 pairs" in report.summary[1]
    lines = printed(folder, width=80).splitlines()
    assert any(line.strip().startswith("2 of 5 seeds failed") for line in lines)
    assert any(line.split() == ["NSGD", "85.7", "n.s."] for line in lines)


def test_averages_are_held_against_the_runs_that_did_not_fail(tmp_path):
    folder = write_study(tmp_path, {"sgd": EVEN, "nsgd": FAILED_WELL}, start_loss=2.3)
    (words,) = with_averages(folder, {"ema": {"sgd": [0.9, 0.902, 0.5, 0.905, 0.907]}}).averages
    assert words.endswith("NSGD (4 of 5 seeds; 1 failed) are at +4.8 ± 0.3 points, more than averaging gives.")


def test_one_pair_that_is_left_allows_no_test(tmp_path):
    nsgd = [(0.95, 0.2), *[(0.1, 3.0)] * 4]
    report = Report(write_study(tmp_path, {"sgd": EVEN, "nsgd": nsgd}, start_loss=2.3))
    assert report.verdict[0] == (
        "No test is possible of test accuracy: NSGD 95.0 % (1 of 5 seeds; 4 failed) against SGD 90.2 %."
    )


# -- the endpoint, and what losses are compared as --------------------------------------------------------------------


def test_the_verdict_is_on_the_endpoint_that_the_study_names(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}, endpoint="train_loss")
    report = Report(folder)
    assert report.verdict[0] == (
        "Significantly better in training loss: NSGD 0.1998 (0.67 times, 95 % 0.59 to 0.75; p = 0.005) against SGD "
        "0.3000."
    )
    assert report.overview["header"] == ["method", "last", "test accuracy, %", "a run"]
    titles = [table["title"] for table in main_tables(read_folder(folder))]
    assert titles[:2] == ["Training loss: the endpoint, with the last weights", "Test accuracy, %: secondary"]
    said = "Endpoint, fixed before the runs: training loss (train_loss) of the last weights. All else is secondary."
    page = Page(write_report(folder)).text
    assert page.count(said) == 2  # below the one table, and among the settings
    assert "Training loss, mean over 3 seeds" in " ".join(printed(folder).split())  # a terminal's table is of it


def test_a_study_of_before_names_no_endpoint(tmp_path):
    kept = Path(__file__).parents[3] / "benchmarks" / "results" / "digits"
    assert "Endpoint" not in Page(write_report(Path(shutil.copytree(kept, tmp_path / "out")))).text


def test_seconds_of_samples_that_were_taken_one_by_one_are_said_to_be(tmp_path):
    folder, words = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}), "gradients of samples were taken one by one"
    assert words not in Page(write_report(folder)).text
    with (folder / "runs" / "nsgd-1" / "run.yaml").open("a") as file:
        file.write("samples_one_by_one: true\n")
    assert Page(write_report(folder)).text.count(f"NSGD: {words}, since torch.func.vmap could not take") == 1


def test_losses_that_are_not_above_zero_are_compared_as_differences_and_that_is_said(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": [(0.91, 0.2), (0.93, 0.0), (0.95, 0.21)]})
    report = Report(folder)
    assert report.overview["rows"][1][2].startswith("0.1367\n-0.1633 ± ")
    assert "Not compared as a ratio, for a value is not above 0: training loss." in Page(write_report(folder)).text
    assert "as a ratio" not in Page(write_report(write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}))).text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0357, "0.036"),
        (0.98, "0.98"),
        (1.0, "1.00"),
        (28.3, "28"),
        (1234.5, "1,234"),
        (1e-6, "1e-06"),
        (2e5, "2e+05"),
    ],
)
def test_ratios_have_two_digits_at_least(value, text):
    assert ratio(value) == text


# -- every seed ------------------------------------------------------------------------------------------------------


def test_every_seed_is_a_point_and_what_failed_stands_at_the_edge(tmp_path, curves):
    folder = write_study(tmp_path, {"sgd": EVEN, "nsgd": FAILED_WELL}, start_loss=2.3)
    figure, words = study_figures(read_folder(folder))["final-values"]
    points = {label: x for label, x, _ in curves if label in ("_sgd last", "_nsgd last")}
    assert points == {  # of the panel of the loss, which comes second
        "_sgd last": pytest.approx([0.3, 0.3, 0.3, 0.3, 0.31]),
        "_nsgd last": pytest.approx([0.19, 0.2, 0.2, 0.21]),
    }
    accuracies = next(x for label, x, _ in curves if label == "_nsgd last")
    assert accuracies == pytest.approx([95.0, 95.1, 95.2, 95.3])
    heights = next(y for label, x, y in curves if label == "_sgd last" and x[0] < 1)
    assert len(set(heights[:4])) == 4  # equal values stand beside each other
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["× 1 failed"]] * 2
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
    assert "At the right edge: seeds that failed." in words
    means = [x for label, x, _ in curves if label == "_nsgd last mean"]
    assert means == [pytest.approx([95.15]), pytest.approx([(0.2 * 0.19 * 0.21 * 0.2) ** 0.25])]


# -- cost to a target ------------------------------------------------------------------------------------------------


def with_target(folder: Path, steps: Mapping[str, Iterable[float]]) -> Report:
    change(folder / "settled.yaml", target=0.9)
    rows = [
        {"method": m, "seed": seed, "reached": int(math.isfinite(step)), "step": step, "gradients": 2 * step}
        for m, all_steps in steps.items()
        for seed, step in enumerate(all_steps)
    ]
    write_csv(folder / "target.csv", rows)
    times = [{"method": r["method"], "seed": r["seed"], "seconds": r["step"] / 10} for r in rows]
    write_csv(folder / "target-times.csv", times)
    return Report(folder)


def test_the_cost_to_the_target_is_a_median_over_all_seeds(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    report = with_target(folder, {"sgd": [10, 20, 40], "nsgd": [30, math.inf, 10]})
    assert report.table("method", "reached") == [
        ["SGD", "3 of 3", "20", "40", "2"],
        ["NSGD", "2 of 3", "30", "60", "3"],
    ]
    assert report.summary[2].endswith(
        "; 90 % validation accuracy was reached in 3 of 3 runs of SGD (median 40 gradients, 2 seconds) and 2 of 3 runs "
        "of NSGD (median 60 gradients, 3 seconds)."
    )
    assert report.short["NSGD"]["dearer"].endswith(
        "; 90 % validation accuracy in 2 of 3 runs, with SGD in 3 of 3; to 90 % validation accuracy 1.50 times the "
        "steps (median 30 against 20), 1.50 times the gradients (median 60 against 40) and 1.50 times the seconds "
        "(median 3 against 2)"
    )
    assert report.verdict[-1] == (
        "To 90 % validation accuracy, NSGD needed 50 % more steps and, not clearly, 50 % more seconds (medians, "
        "against SGD)."
    )
    assert [row[3:] for row in report.overview["rows"]] == [
        ["2 s\n20 steps", "2 s\n8 steps"],
        ["3 s\n30 steps", "3 s\n8 steps"],
    ]
    assert "that of SGD's best trial" in report.text


def test_seconds_that_differ_on_every_seed_are_no_doubt(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    report = with_target(folder, {"sgd": [20, 21, 22], "nsgd": [10, 10.5, 11]})
    assert report.verdict[-1] == (
        "To 90 % validation accuracy, NSGD needed 50 % fewer steps and 50 % fewer seconds (medians, against SGD)."
    )


def test_the_verdict_tells_of_a_baseline_that_wins(tmp_path):
    wins = [(accuracy, loss / (9 + seed)) for seed, (accuracy, loss) in enumerate(SGD)]
    report = Report(write_study(tmp_path, {"sgd": SGD, "nsgd": SGD, "adamw": wins}))
    (secondary,) = [line for line in report.verdict if line.startswith("Secondary")]
    assert "significantly better with AdamW 0.0301 (0.10 times" in secondary
    assert "NSGD" not in secondary


def test_a_target_that_most_runs_missed_has_no_median(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}, target=0.9)
    report = with_target(folder, {"sgd": [10, 20, 40], "nsgd": [5, math.inf, math.inf]})
    assert report.table("method", "reached")[1] == ["NSGD", "1 of 3", *["not reached"] * 3]
    assert report.summary[2].endswith("and 1 of 3 runs of NSGD.")
    assert "90 % validation accuracy in 1 of 3 runs, with SGD in 3 of 3" in report.short["NSGD"]["dearer"]
    assert report.verdict[-1] == ("To 90 % validation accuracy, NSGD reached it in 1 of 3 runs, SGD in 3 of 3.")
    assert "best trial" not in report.text
    assert "not reached" in report.overview["rows"][1]
    assert report.verdict[-1] in " ".join(printed(folder).split())


def test_a_target_reached_sooner_is_no_shortfall(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    report = with_target(folder, {"sgd": [10, math.inf, math.inf], "nsgd": [5, 6, 7]})
    assert "90 %" not in report.short["NSGD"]["dearer"]


# -- learning rates --------------------------------------------------------------------------------------------------


def test_the_schedule_of_each_method_is_among_its_settings(tmp_path):
    study = Study(methods=["sgd", "muon"], schedule=Schedule(name="cosine", warmup=0.05))
    folder = write_study(tmp_path, {"sgd": SGD, "muon": NSGD})
    (folder / "methods.yaml").write_text(yaml.safe_dump(study.described_methods(), sort_keys=False))
    rows = Report(folder).table("method", "settings", "schedule")
    assert [row[2] for row in rows] == [study.recipes[m].schedule_label(study.schedule) for m in ("sgd", "muon")]
    assert "cosine" in rows[0][2]


def test_settings_as_given_are_said_to_be(tmp_path):
    report = Report(write_study(tmp_path, {"sgd": SGD, "adamw": NSGD}))
    assert report.table("method", "settings") == [
        ["SGD", "lr 0.1, momentum 0, weight_decay 0"],
        ["AdamW", "lr 0.001, weight_decay 0.01"],
    ]
    assert "Learning rates: SGD 0.1, AdamW 0.001 (given, not tuned)" in report.text


def with_trials(folder: Path, rows: list[dict[str, Any]], **chosen: dict[str, float]) -> Path:
    """A study with trials, of which the settings of these methods come."""
    write_csv(folder / "tuning.csv", rows)
    (folder / "tuning" / "sgd-0").mkdir(parents=True)
    (folder / "tuning" / "sgd-0" / "run.yaml").write_text("seed: 1000\n")
    settings = yaml.safe_load((folder / "settled.yaml").read_text())["settings"]
    change(folder / "settled.yaml", settings={m: {**own, **chosen.get(m, {})} for m, own in settings.items()})
    return folder


def trial(method: str, trial: int, lr: float, loss: float, **rest: float) -> dict[str, Any]:
    scores = {"val_loss": loss, "val_accuracy": 0.5, "train_loss": loss}
    return {"method": method, "trial": trial, **rest, "lr": lr, **scores}


PLAIN = "momentum 0, weight_decay 0"


def test_trials_are_counted_with_their_best_and_median(tmp_path):
    """Of before the best ran again."""
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD, "sgd-more": SGD}, tune=4)
    losses = {"sgd": [0.5, 0.25, 0.75, 1.0], "nsgd": [math.nan, math.inf, 0.125]}  # the last of NSGD's died
    rows = [trial(m, i, round(0.1 * (i + 1), 1), loss) for m, own in losses.items() for i, loss in enumerate(own)]
    sgd, nsgd = {"lr": 0.2}, {"lr": 0.3, "k": 12.4}
    report = Report(with_trials(folder, rows, **{"sgd": sgd, "sgd-more": sgd, "nsgd": nsgd}))
    assert report.table("method", "trials") == [
        ["SGD", "4", f"lr 0.2, {PLAIN}", "0.2500", "0.6250"],
        [
            *("NSGD", "3", f"lr 0.3, {PLAIN}, k 12\nlr at the upper edge of its trials; widen search.nsgd"),
            *("0.1250", "diverged"),
        ],
        [RECIPES["sgd-more"].label, "as SGD", f"lr 0.2, {PLAIN}", "", ""],
    ]
    assert "the settings of each are the best of 4 quasi-random trials by validation loss" in report.summary[0]
    assert "run with seed 1000)" in report.text


def test_the_best_is_a_mean_over_its_seeds_and_what_is_not_in_it_is_said(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}, tune=4)
    rows = [trial(m, i, lr, 0.1 * (i + 1), seed=1000) for m in ("sgd", "nsgd") for i, lr in enumerate(RATES)]
    rows += [trial("sgd", 1, RATES[1], loss, seed=seed) for seed, loss in ((1001, 0.3), (1002, 0.7))]
    rows += [trial("nsgd", 2, RATES[2], loss, seed=seed) for seed, loss in ((1001, math.nan), (1002, 0.5))]
    report = Report(with_trials(folder, rows, sgd={"lr": RATES[1]}, nsgd={"lr": RATES[2]}))
    assert [row[3:] for row in report.table("method", "trials")] == [
        ["0.4000", "0.2500"],  # of 0.2, 0.3, 0.7; of 0.1, 0.2, 0.3, 0.4
        ["0.4000\non 2 of 3 seeds; diverged or died on 1", "0.2500"],  # of 0.3 and 0.5
    ]
    (title,) = (table["title"] for table in [settings_table(read_folder(folder))])
    assert title.endswith("by validation loss; the best ran again with 2 more seeds, and the mean decided")
    assert "run with seed 1000, the best 1 again with seeds 1001 and 1002, where the mean decided)" in report.text


RATES = (0.2, 0.05, 0.4, 0.1)


@pytest.mark.parametrize(
    ("lr", "gamma", "words"),
    [
        (0.4, 0.3, "lr at the upper edge of its trials; widen search.nsgd"),
        (0.05, 0.3, "lr at the lower edge of its trials; widen search.nsgd"),
        (0.05, 0.4, "lr at the lower edge, gamma at the upper edge of its trials; widen search.nsgd"),
        (0.1, 0.3, ""),
    ],
)
def test_a_best_value_at_the_edge_of_its_trials_is_said_in_page_and_terminal(tmp_path, lr, gamma, words):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}, tune=4)
    others = (0.1, 0.35, 0.36, 0.2)
    gammas = [gamma if rate == lr else other for rate, other in zip(RATES, others, strict=True)]
    rows = [trial("nsgd", i, RATES[i], 0.1, seed=1000, gamma=gammas[i]) for i in range(4)]
    rows += [trial("sgd", i, RATES[i], 0.1, seed=1000) for i in range(4)]
    with_trials(folder, rows, sgd={"lr": 0.1}, nsgd={"lr": lr, "gamma": gamma})
    (sgd, nsgd) = Report(folder).table("method", "trials")
    assert "edge" not in sgd[2]
    assert nsgd[2].partition("\n")[2] == words
    sentences = [f"NSGD: {words}."] if words else []
    assert edges(read_folder(folder)) == sentences
    in_terminal = " ".join(printed(folder).split())
    assert in_terminal.count(" of its trials; widen ") == len(sentences)
    assert all(sentence in in_terminal for sentence in sentences)


def test_beyond_a_trial_that_died_there_is_nothing_to_widen(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}, tune=3)
    rows = [trial(method, i, (0.1, 0.2)[i], 0.1, seed=1000) for method in ("sgd", "nsgd") for i in range(2)]
    with_trials(folder, rows, sgd={"lr": 0.2}, nsgd={"lr": 0.2})
    assert [words.partition(":")[0] for words in edges(read_folder(folder))] == ["SGD", "NSGD"]
    write_csv(folder / "deaths.csv", [{"run": "tuning/nsgd-2", "method": "nsgd", "seed": 1000}])
    (folder / "tuning" / "nsgd-2").mkdir(parents=True)
    (folder / "tuning" / "nsgd-2" / "run.yaml").write_text(yaml.safe_dump({"method": "nsgd", "lr": 0.4}))
    assert [words.partition(":")[0] for words in edges(read_folder(folder))] == ["SGD"]


def test_one_trial_has_no_edge(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD}, tune=1)
    rows = [trial(method, 0, 0.2, 0.1, seed=1000) for method in ("sgd", "nsgd")]
    report = Report(with_trials(folder, rows, sgd={"lr": 0.2}, nsgd={"lr": 0.2}))
    assert "edge" not in str(report.table("method", "trials"))


def with_sweep(folder: Path, losses: Mapping[str, Mapping[float, float | None]]) -> Report:
    rows, deaths = [], []
    for method, own in losses.items():
        for i, (lr, loss) in enumerate(own.items()):
            if loss is DEAD:
                name = f"sweep/{method}-{i}"
                deaths.append({"run": name, "method": method, "seed": 2000})
                (folder / name).mkdir(parents=True)
                (folder / name / "run.yaml").write_text(yaml.safe_dump({"method": method, "lr": lr}))
            else:
                scores = {"train_loss": loss, "val_loss": loss, "val_accuracy": 0.5, "start_loss": 2.3}
                rows.append({"method": method, "seed": 2000, "read_out": "last", "lr": lr, **scores})
    write_csv(folder / "sweep.csv", rows)
    write_csv(folder / "deaths.csv", deaths)
    return Report(folder)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([2.0, 1.0, 1.5, math.nan], (0.1, 0.4)),
        ([3.0, 1.0, 1.0, 4.0], (0.2, 0.4)),
        ([1.0, math.inf, 1.0, 1.0], (0.4, 0.8)),
        ([math.nan] * 4, None),
    ],
)
def test_the_stable_range_is_the_longest_unbroken_one_that_learns(losses, found):
    rows = [{"lr": lr, "train_loss": loss} for lr, loss in zip((0.1, 0.2, 0.4, 0.8), losses, strict=True)]
    assert stable_range(rows[::-1], 2.3) == found


def test_the_range_of_stable_rates_ends_where_the_loss_rises_and_where_a_run_died(tmp_path):
    folder = write_study(tmp_path, dict.fromkeys(("sgd", "nsgd", "bulk-sgd", "adamw", "sam"), SGD))
    report = with_sweep(
        folder,
        {
            "sgd": {0.001: 2.4, 0.01: 1.0, 0.1: 0.5, 1.0: 2.5},
            "nsgd": {0.001: 2.2, 0.01: 1.0, 0.1: 0.5, 1.0: math.inf},
            "bulk-sgd": {0.001: 2.2, 0.01: DEAD, 0.1: 0.5, 1.0: 1.5},
            "adamw": {0.001: math.nan, 0.01: 3.0, 0.1: 3.5, 1.0: math.nan},
            "sam": {0.001: DEAD, 0.01: DEAD, 0.1: DEAD, 1.0: DEAD},
        },
    )
    assert report.table("method", "stable from") == [
        ["SGD", "0.01", "0.1", "1.00", "0.00", "0.1", "0.5000", "50.0"],
        ["NSGD", "0.001", "0.1", "≥ 2.00", "0.00", "0.1", "0.5000", "50.0"],
        ["Bulk-SGD", "0.1", "1", "≥ 1.00", "0.00", "0.1", "0.5000", "50.0"],
        ["AdamW", "–", "–", "–", "0.00", "0.01", "3.0000", "50.0"],
        ["SAM", *["–"] * 7],
    ]
    assert "≥ 2.00" in Page(write_report(folder)).text


def test_rates_are_compared_by_means_over_the_seeds_of_a_sweep(tmp_path):
    """Of seeds, one loss that is not finite, or one death, counts as such for its rate."""
    folder = write_study(tmp_path, {"sgd": SGD})
    losses = {0.01: (1.0, 1.2), 0.1: (0.9, 1.1), 1.0: (0.1, math.inf), 10.0: (0.1, DEAD)}
    rows: list[dict[str, Any]] = []
    for lr, seeds in losses.items():
        for seed, loss in enumerate(seeds):
            if loss is not DEAD:
                scores = {"train_loss": loss, "val_loss": loss, "val_accuracy": 0.5, "start_loss": 2.3}
                rows.append({"method": "sgd", "seed": 2000 + seed, "read_out": "last", "lr": lr, **scores})
    write_csv(folder / "sweep.csv", rows)
    dead = folder / "sweep" / "sgd-7"
    dead.mkdir(parents=True)
    (dead / "run.yaml").write_text(yaml.safe_dump({"method": "sgd", "lr": 10.0}))
    write_csv(folder / "deaths.csv", [{"run": "sweep/sgd-7", "method": "sgd", "seed": 2001}])
    report = Report(folder)
    assert report.table("method", "stable from") == [
        ["SGD", "0.01", "0.1", "≥ 1.00", "≥ 1.00", "0.1", "1.0000", "50.0"]
    ]
    assert "means over 2 seeds, which are the crosses" in Page(write_report(folder)).text


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([2.0, 1.0, 1.05, 1.2], (0.2, 0.4)),
        ([1.0, 1.09, 1.2, 1.0], (0.1, 0.2)),
        ([math.nan, 1.0, math.inf, math.nan], (0.2, 0.2)),
        ([math.nan] * 4, None),
    ],
)
def test_the_range_near_the_best_loss_is_within_a_tenth_of_it(losses, found):
    rows = [{"lr": lr, "train_loss": loss} for lr, loss in zip((0.1, 0.2, 0.4, 0.8), losses, strict=True)]
    assert range_near_the_best(rows[::-1]) == found


def test_a_report_is_written_without_torch_and_lightning(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    code = (
        "import sys; from pathlib import Path; from lightning_modules.report.study.report import write_report; "
        "write_report(Path(sys.argv[1])); print([m for m in ('torch', 'pytorch_lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- names, links, the terminal --------------------------------------------------------------------------------------


@pytest.mark.draws
def test_names_from_the_config_are_escaped(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    plain = [tag for tag, _ in Page(write_report(folder)).tags]
    path = """<script>alert(1)</script> "><img src=x onerror=alert(1)> a & b </title></h1> {{ 7 * 7 }}"""
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    change(folder / "config.yaml", data={**data, "init_args": {**data["init_args"], "path": path}})
    page = Page(write_report(folder))
    assert page.text.count(path) > 2  # in the title of the window, above the page, and in its sentences
    assert [tag for tag, _ in page.tags] == plain


USERS = """<script>alert(1)</script> "><img src=x onerror=alert(1)>' a & b {{ 7 * 7 }} {% x %} $x_{ $ %s [/b] é"""


@pytest.mark.draws
def test_whatever_users_name_is_shown_as_text_wherever_it_stands(tmp_path):
    """Labels of methods, classes, options, networks, metrics, the machine, and the folder itself."""
    plain = Page(write_report(write_study(tmp_path / "plain", {"sgd": SGD, "nsgd": NSGD})))
    folder = write_study(tmp_path / "a<b> &amp; [/x] $'", {"sgd": SGD, "nsgd": NSGD})
    described = Study(methods=["sgd", "nsgd"]).described_methods()
    described["nsgd"]["label"] = label = """<b>"&'{{7}}$x_{ $[/b]"""
    (folder / "methods.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    change(folder / "config.yaml", net=USERS, data={**data, "init_args": {USERS: USERS}}, model={"class_path": USERS})
    change(folder / "environment.yaml", processor=USERS, packages={USERS: USERS})
    page = Page(write_report(folder))
    assert page.text.count(USERS) > 2  # in the title of the window, above the page, and in its sentences
    assert page.text.count(label) > 10
    known = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} <= known
    assert page.source.count("<script") == plain.source.count("<script") == 1
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        link = attributes.get("href") or ""
        assert not re.match(r"\w+:", link), link
    said = "".join(printed(folder).split())
    assert "".join(USERS.split()) in said
    assert "".join(label.split()) in said


def test_the_terminal_shows_a_name_with_brackets_as_it_is(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD})
    change(folder / "config.yaml", net="net[bold]/[/x]")
    assert printed(folder).count("net[bold]/[/x]") == 1


def test_every_method_fits_a_terminal_of_100_columns(tmp_path):
    methods = [m for m, recipe in RECIPES.items() if "lr" in recipe.defaults]
    folder = write_study(tmp_path, {m: SGD if m == "sgd" else NSGD for m in methods})
    with_target(folder, {m: [10, 20, 30] for m in methods})
    with_sweep(folder, {m: {0.00123: 1.0, 0.0123: 0.5} for m in methods if RECIPES[m].more_of is None})
    said = printed(folder)
    assert max(len(line) for line in said.splitlines()) <= 100
    assert "…" not in said + printed(folder, width=80)  # nothing was cut
    assert all(word in said for m in methods for word in RECIPES[m].label.split())


def test_the_terminal_has_one_line_a_method_in_80_columns(tmp_path):
    """NSGD's last weights are 1, 2 and 3 points above SGD's, its EMA about 2 on each seed, all else 0."""
    runs = {"sgd": SGD, "nsgd": NSGD, "random": SGD}
    folder = write_study(tmp_path, runs)
    rows = read_csv(folder / "results.csv")
    gains = {"ema": {"nsgd": (0.020, 0.021, 0.019)}, "swa": {}, "two-point": {}}
    for read_out, gain in gains.items():
        for row in [row for row in rows if row["read_out"] == "last"]:
            accuracy = SGD[row["seed"]][0] + gain.get(row["method"], (0.0, 0.0, 0.0))[row["seed"]]
            rows.append({**row, "read_out": read_out, "test_accuracy": accuracy})
    write_csv(folder / "results.csv", rows)
    write_csv(folder / "summary.csv", summarise(rows, [*runs], MEASURES, range(3)))
    lines = [line.rstrip() for line in printed(folder, width=80).splitlines()]
    table = [re.split(r"  +", line.strip()) for line in lines[lines.index("") :] if "  " in line.strip()]
    assert table == [
        ["method", "last", "EMA", "SWA"],
        ["SGD", "91.0", "91.0", "91.0"],
        ["NSGD", "93.0 n.s.", "93.0 better", "91.0 n.s."],
        ["random directions (control)", "91.0 n.s.", "91.0 n.s.", "91.0 n.s."],
    ]
    title = "Test accuracy, %, mean over 3 seeds; better or worse than SGD, or not significantly so (n.s.)"
    assert title in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 20


def test_links_lead_to_files_of_the_study(tmp_path):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    page = Page(write_report(folder))
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    runs = {f"runs/{m}-{s}/{name}" for m in ("sgd", "nsgd") for s in range(3) for name in ("metrics.csv", "run.yaml")}
    assert {"config.yaml", "results.csv", "summary.csv"} | runs <= links
    assert all((folder / str(link)).is_file() for link in links)


def test_the_caption_says_what_became_of_the_modules_own_optimizer_and_of_a_shorter_test(tmp_path):
    model: dict[str, Any] = {"class_path": "mymodule.Mine"}
    folder = write_study(tmp_path / "all", {"sgd": SGD, "nsgd": NSGD}, model=model)
    caption = Report(folder).caption
    assert "Each method's optimizer took the place of the module's own" in caption
    assert "what is validated and tested on all." in caption
    folder = write_study(tmp_path / "own", {"sgd": SGD, "own": SGD, "muon": NSGD}, model=model, limit_test=3)
    caption = Report(folder).caption
    assert "But for the module's own optimizer, each method's optimizer took the place of the module's own" in caption
    assert "what is validated on all, and what is tested on the first 3 batches." in caption
    assert "Learning rates: SGD 0.1, Muon 0.005 (" in caption


# -- figures ---------------------------------------------------------------------------------------------------------


def test_no_two_methods_look_alike_even_in_grey():
    described = Study(methods=[*RECIPES]).described_methods()
    for styles in (method_styles(EARLIER, {}), method_styles(described, described)):
        assert len({style.line for style in styles.values()}) == len(styles)
        assert styles["sgd"].line == EARLIER["sgd"].line  # the first keeps its own


def test_a_study_of_before_is_described_as_one_is_now():
    described = Study(methods=[*EARLIER]).described_methods()
    kept = ("label", "color", "line", "control", "damps", "damping")
    assert {name: {key: getattr(style, key) for key in kept} for name, style in EARLIER.items()} == {
        name: {key: values[key] for key in kept} for name, values in described.items()
    }


def test_a_last_epoch_cut_short_and_runs_of_other_lengths_are_drawn(tmp_path, curves):
    folder = write_study(tmp_path, {"sgd": SGD[:2], "sgd-more": SGD[:2], "nsgd": NSGD[:2]})
    for seed, extra in ((0, 2), (1, 5)):  # two steps of the third epoch; four, with a validation, and one of the fourth
        path = folder / "runs" / f"sgd-more-{seed}" / "metrics.csv"
        rows = read_csv(path)
        for step in range(9, 9 + extra):
            rows.append({"step": step, "epoch": (step - 1) // 4, "loss": 0.1, "gradients": step, "seconds": step / 4})
        write_csv(path, rows)
    study_figures(read_folder(folder))
    name = RECIPES["sgd-more"].label
    in_steps = [(x, y) for label, x, y in curves if label == name][::2]  # the other panel is in seconds
    assert in_steps[0][0] == [4, 8, (10 + 12) / 2]
    assert in_steps[0][1] == pytest.approx([0.3, 0.3, 0.1])
    assert in_steps[1] == ([4, 8], pytest.approx([90.5, 90.5]))  # no validation after two steps


def test_every_seed_is_drawn_beside_the_median(tmp_path, curves):
    folder = write_study(tmp_path, {"sgd": SGD, "nsgd": NSGD})
    study_figures(read_folder(folder))
    losses = next(y for label, _, y in curves if label == "NSGD")
    seeds = {label: y for label, _, y in curves[: len(curves) // 2] if label.startswith("_NSGD")}
    assert losses == pytest.approx([0.20, 0.20])  # of 0.20, 0.19 and 0.21
    assert seeds == {f"_NSGD, seed {i}": pytest.approx([loss] * 2) for i, (_, loss) in enumerate(NSGD)}


def make_study(**options: Any) -> Study:
    methods = ["sgd", "nsgd", "bulk-sgd"]
    settings: dict[str, Any] = {
        "data": Digits(batch_size=50, limit=300),
        "methods": methods,
        "seeds": 2,
        "epochs": 2,
        "settings": {m: {"lr": 0.2, "momentum": MOMENTUM} for m in methods},
        "nsgd": NSGDOptions(k=2, gamma=0.25, refresh_every=3, samples=16, solver="gradients"),
    }
    return Study(**{**settings, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    run_study(make_study(), folder, lambda *_: None)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.mark.draws
def test_the_page_stands_alone(folder):
    page = Page(write_report(folder))
    assert page.source.lower().startswith("<!doctype html>")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "img")
        assert "src" not in attributes
        assert ":" not in (attributes.get("href") or "")
    for said in ("SGD 0.2, NSGD 0.2, Bulk-SGD 0.2 (given, not tuned)", "2 paired seeds", "threads: 1", "batch size 50"):
        assert said in page.text
    assert yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()), sort_keys=False) in page.text
    for name in ("training-loss", "validation-accuracy", "eigenvalues"):
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert len({tuple(pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3)}) > 10  # lines, bands and letters


def test_the_tables_say_what_the_files_hold(folder):
    report = Report(folder)
    found = read_csv(folder / "summary.csv")
    for table, measure, scale, digits in (
        (report.tables[0], "test_accuracy", 100, 1),
        (report.tables[1], "train_loss", 1, 4),
    ):
        against = "over SGD" if measure == "train_loss" else "minus SGD"
        assert table[0] == ["weights", "method", "mean", against, "paired t-test", "seeds to show it"]
        entries = [e for e in found if e["measure"] == measure]
        assert len(table) == 1 + len(entries) == 1 + 4 * 3
        assert [row[0] for row in table[1::3]] == ["last", "EMA", "SWA", "two-point"]
        for row, e in zip(table[1:], entries, strict=True):
            mean, low, high = (f"{e[name] * scale:.{digits}f}" for name in ("mean", "low", "high"))
            half = f"{(e['high'] - e['low']) / 2 * scale:.{digits}f}"
            assert row[2].split("\n")[0] == (f"{mean} ± {half}" if digits == 1 else f"{mean} ({low} to {high})")
            if e["method"] == "sgd":
                assert row[3:] == ["", "", ""]
                continue
            change = f"{e['change'] * scale:+.{digits}f} ± " if digits == 1 else f"{e['change']:.2f} times ("
            assert row[3].startswith(change)
            said = row[4].split(" (p")[0]
            assert said in ("significant", "no significant difference", "no test")
            assert math.isnan(e["p_holm"]) or (said == "significant") == (e["p_holm"] < 0.05)
    cost = report.table("method", "steps")
    assert cost[0][:3] == ["SGD", "8", "8"]
    assert [row[1] for row in cost] == ["8", "8", "8"]
    assert float(cost[1][2]) > 8  # gradients, with refreshes


def levels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    plain = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **kw: (found.append(y), plain(self, y, **kw))[1])
    study_figures(read_folder(folder))
    return found


def test_stability_lines_stand_at_two_plus_two_beta_over_lr(folder, monkeypatch):
    limit = (2 + 2 * MOMENTUM) / 0.2  # NSGD: undamped and damped; Bulk-SGD: undamped
    assert levels(folder, monkeypatch) == pytest.approx([limit, limit / 0.25, limit])


def test_stability_lines_follow_the_settings_that_a_method_trained_with(folder, monkeypatch):
    settings = yaml.safe_load((folder / "settled.yaml").read_text())["settings"]
    settings["nsgd"] |= {"lr": 0.5, "momentum": 0.9, "gamma": 0.5}
    change(folder / "settled.yaml", settings=settings)
    assert levels(folder, monkeypatch)[:2] == pytest.approx([3.8 / 0.5, 3.8 / 0.25])


def test_the_curvature_of_each_refresh_is_drawn(folder, curves):
    study_figures(read_folder(folder))
    drawn = [(x, y) for label, x, y in curves if not label]
    assert len(drawn) == 2 * 2  # NSGD and Bulk-SGD, k = 2, from the smallest to the largest
    for method, (second, first) in (("nsgd", drawn[:2]), ("bulk-sgd", drawn[2:])):
        rows = [r for r in read_csv(folder / "runs" / f"{method}-0" / "metrics.csv") if "weight_1" in r]
        assert first == ([1, 4, 7], [r["weight_1"] for r in rows])
        assert second == ([1, 4, 7], [r["weight_2"] for r in rows])


def test_the_weights_of_random_directions_are_no_curvature_and_adamw_has_no_limit(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    options = NSGDOptions(k=2, refresh_every=4, samples=16, solver="gradients")
    methods = ["random", "damped-adamw"]
    run_study(make_study(methods=methods, settings={}, seeds=1, nsgd=options), folder, lambda *_: None)
    assert levels(folder, monkeypatch) == []
    figure, words = study_figures(read_folder(folder))["eigenvalues"]
    assert [axes.get_title() for axes in figure.axes] == ["damped AdamW"]
    assert "Curvature along the 2 directions" in words
    assert "Dashed: the limit" not in words
    shutil.rmtree(folder / "runs" / "damped-adamw-0")
    rows = [row for row in read_csv(folder / "results.csv") if row["method"] == "random"]
    write_csv(folder / "results.csv", rows)
    write_csv(folder / "summary.csv", summarise(rows, methods, MEASURES, [0]))
    assert "eigenvalues" not in study_figures(read_folder(folder))


def test_fewer_weights_at_first_than_later_are_drawn_with_a_gap(tmp_path, curves):
    """Three groups a refresh, which differ in two directions, give two more each time, up to k."""
    options = NSGDOptions(k=5, refresh_every=2, samples=16, group_size=6, solver="gradients")
    run_study(make_study(methods=["nsgd"], seeds=1, nsgd=options), tmp_path / "out", lambda *_: None)
    rows = [r for r in read_csv(tmp_path / "out" / "runs" / "nsgd-0" / "metrics.csv") if "weight_1" in r]
    assert [sum(name.startswith("weight_") for name in r) for r in rows] == [2, 4, 5, 5]
    study_figures(read_folder(tmp_path / "out"))
    drawn = [y for label, _, y in curves if not label]
    assert [[math.isnan(v) for v in y] for y in drawn[::-1]] == [
        *[[False] * 4] * 2,
        *[[True, False, False, False]] * 2,
        [True, True, False, False],
    ]


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ("auto", "gradients of small groups"),
        ("gradients", "gradients of small groups"),
        ("lanczos", "that products found"),
    ],
)
def test_the_figure_of_curvature_says_what_it_shows(folder, solver, said):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(folder / "config.yaml", nsgd={**config["nsgd"], "solver": solver})
    assert said in study_figures(read_folder(folder))["eigenvalues"][1]


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ["sgd"], "seeds": 1, "epochs": 1, "measure": ["quadratic"]},
        {"methods": ["nsgd", "sgd", "dom-sgd"], "seeds": 1, "settings": {}, "lr": 0.0},
        {"methods": ["sgd", "nsgd"], "seeds": 1, "nsgd": NSGDOptions(k=2, warmup_steps=1000)},
        {"methods": ["sgd"], "seeds": 2, "settings": {}, "lr": 1e12},
        {"methods": ["sgd", "nsgd", "sgd-more"], "seeds": 1, "tune": 2, "sweep": "lr", "sweep_points": 2},
    ],
    ids=["SGD alone, measured", "no steps", "no refresh", "diverged", "tuned and swept"],
)
def test_an_unusual_study_is_reported_too(tmp_path, options):
    study, folder = make_study(**options), tmp_path / "out"
    run_study(study, folder, lambda *_: None)
    page = Page(write_report(folder))
    # The one table, that of shortfalls where a method is judged, then the score, the loss, the cost and the settings;
    # with trials and a sweep cost to the target, and sensitivity too.
    judged = "nsgd" in study.methods[1:]
    assert len(page.tables) == (6 if study.tune else 4) + 1 + judged
    assert ("minus" in " ".join(page.tables[1 + judged][0])) == (len(study.methods) > 1)
    drawn = {path.stem for path in folder.glob("*.png")}
    assert ("quadratic-sgd" in drawn) == bool(study.measure)
    assert ({"trials", "learning-rates"} <= drawn) == bool(study.tune)
    assert " ".join(verdict(read_folder(folder)).split()) in " ".join(printed(folder).split())
