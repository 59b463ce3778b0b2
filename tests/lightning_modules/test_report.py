"""The report: self-contained, complete, escaped, and true to the files in the folder."""

from __future__ import annotations

import base64
import io
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml
from matplotlib.axes import Axes
from rich.console import Console

from lightning_modules import Digits
from lightning_modules.compare import NSGDOptions, Study, read_csv, run_study, write_csv
from lightning_modules.report import print_table, write_report

FIGURES = ("training-loss", "validation-accuracy", "eigenvalues")


def make_study(**options: Any) -> Study:
    settings: dict[str, Any] = {
        "data": Digits(batch_size=50, limit=300),
        "methods": ["sgd", "nsgd", "bulk-sgd"],
        "seeds": 2,
        "epochs": 2,
        "lr": 0.2,
        "momentum": 0.5,
        "nsgd": NSGDOptions(k=2, gamma=0.25, refresh_every=3, samples=16),
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


class Page(HTMLParser):
    """Tags with their attributes, the text, and every table as rows of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.tables = "", []
        self._cell = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def test_the_page_stands_alone(folder):
    page = Page(write_report(folder))
    assert not any(scheme in page.source.lower() for scheme in ("http://", "https://", "@import", "url("))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    assert page.source.lower().startswith("<!doctype html>")


def test_the_figures_are_pictures_and_the_page_holds_the_same_bytes(folder):
    page = Page(write_report(folder))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == len(FIGURES)
    for name, source in zip(FIGURES, sources, strict=True):
        content = (folder / f"{name}.png").read_bytes()
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == content
        picture = matplotlib.image.imread(io.BytesIO(content), format="png")
        assert min(picture.shape[:2]) > 300
        assert len({tuple(pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3)}) > 10  # lines, bands and letters
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_the_tables_say_what_the_summary_holds(folder):
    page = Page(write_report(folder))
    accuracy, loss, cost = page.tables
    summary = read_csv(folder / "summary.csv")
    for table, measure, scale, digits in ((accuracy, "test_accuracy", 100, 1), (loss, "train_loss", 1, 4)):
        assert table[0] == ["weights", "method", "mean", "minus SGD", "paired t-test"]
        entries = [e for e in summary if e["measure"] == measure]
        assert len(table) == 1 + len(entries) == 1 + 4 * 3
        for row, e in zip(table[1:], entries, strict=True):
            assert row[2] == f"{e['mean'] * scale:.{digits}f} ± {e['half_width'] * scale:.{digits}f}"
            if e["method"] == "sgd":
                assert row[3:] == ["", ""]
                continue
            assert row[3].startswith(f"{e['difference'] * scale:+.{digits}f} ± ")
            said = row[4].split(" (p")[0]
            assert said in ("significant", "no significant difference", "no test")
            assert math.isnan(e["p"]) or (said == "significant") == (e["p"] < 0.05)
    assert [row[0] for row in cost] == ["method", "SGD", "NSGD", "Bulk-SGD"]
    assert [row[1] for row in cost[1:]] == ["8", "8", "8"]  # steps
    assert cost[1][2] == "8"  # gradients of SGD
    assert float(cost[2][2]) > 8


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.049, "significant (p = 0.049)"), (0.051, "no significant difference (p = 0.051)"), (math.nan, "no test")],
)
def test_a_difference_without_significance_is_said_as_such(folder, p, said):
    rows = read_csv(folder / "summary.csv")
    others = {"nsgd": p, "bulk-sgd": 0.2}  # two seeds may well differ alike, which has no test either
    write_csv(folder / "summary.csv", [{**row, "p": others.get(row["method"], row["p"])} for row in rows])
    page = Page(write_report(folder))
    console = Console(file=io.StringIO(), width=200)
    print_table(folder, console)
    for table in page.tables[:2]:
        assert {row[4] for row in table[1:] if row[1] == "NSGD"} == {said}
    assert console.file.getvalue().count(said) == 8


@pytest.mark.parametrize(
    "path", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b </title></h1>", "{{ 7 * 7 }}"]
)
def test_names_from_the_config_are_escaped(folder, path):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["init_args"]["path"] = path
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(folder))
    assert path in page.text.replace("\n", " ")
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(tag == "img" for tag, _ in page.tags) == len(FIGURES)
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_the_terminal_shows_a_name_with_brackets_as_it_is(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["init_args"]["path"] = "data[bold]/[/x]"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    console = Console(file=io.StringIO(), width=200)
    print_table(folder, console)
    assert "data[bold]/[/x]" in console.file.getvalue()


def test_stability_lines_stand_at_two_plus_two_beta_over_lr(folder, monkeypatch):
    levels: list[float] = []
    plain = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **kw: (levels.append(y), plain(self, y, **kw))[1])
    write_report(folder)
    limit = (2 + 2 * 0.5) / 0.2
    assert levels == pytest.approx([limit, limit / 0.25, limit])  # NSGD: undamped and damped; Bulk-SGD: undamped


def test_the_caption_names_rates_seeds_threads_and_how_they_were_chosen(folder):
    text = Page(write_report(folder)).text
    for said in ("SGD 0.2, NSGD 0.2, Bulk-SGD 0.2 (given, not tuned)", "2 paired seeds", "threads: 1", "momentum 0.5"):
        assert said in text
    assert yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()), sort_keys=False) in text


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The curves of curvature, each method's from the smallest to the largest."""
    curves: list[list[float]] = []
    plain = Axes.plot

    def plot(self: Axes, x: Any, y: Any, *args: Any, **options: Any) -> Any:
        if "alpha" in options:
            curves.append(list(y))
        return plain(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    write_report(folder)
    return curves


def test_the_curvature_of_each_refresh_is_drawn(folder, monkeypatch):
    curves = drawn(folder, monkeypatch)
    assert len(curves) == 2 * 2  # NSGD and Bulk-SGD, k = 2
    for method, (second, first) in (("nsgd", curves[:2]), ("bulk-sgd", curves[2:])):
        rows = [r for r in read_csv(folder / "runs" / f"{method}-0" / "metrics.csv") if "weight_1" in r]
        assert [r["step"] for r in rows] == [1, 4, 7]
        assert first == [r["weight_1"] for r in rows]
        assert second == [r["weight_2"] for r in rows]


def test_fewer_weights_at_first_than_later_are_drawn_with_a_gap(tmp_path, monkeypatch):
    """Two groups a refresh give two directions more each time, up to k."""
    options = NSGDOptions(k=5, refresh_every=2, samples=16, group_size=8)
    run_study(make_study(methods=["nsgd"], seeds=1, nsgd=options), tmp_path / "out", lambda *_: None)
    rows = [r for r in read_csv(tmp_path / "out" / "runs" / "nsgd-0" / "metrics.csv") if "weight_1" in r]
    assert [sum(name.startswith("weight_") for name in r) for r in rows] == [2, 4, 5, 5]
    curves = drawn(tmp_path / "out", monkeypatch)
    assert [[math.isnan(v) for v in y] for y in curves[::-1]] == [
        *[[False] * 4] * 2,
        *[[True, False, False, False]] * 2,
        [True, True, False, False],
    ]
    page = Page(tmp_path / "out" / "report.html")
    assert sum(tag == "img" for tag, _ in page.tags) == len(FIGURES)


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ("auto", "gradients of small groups"),
        ("gradients", "gradients of small groups"),
        ("lanczos", "that products found"),
    ],
)
def test_the_figure_of_curvature_says_what_it_shows(tmp_path, solver, said):
    options = NSGDOptions(k=2, refresh_every=4, samples=16, solver=solver)
    run_study(make_study(methods=["nsgd"], seeds=1, epochs=1, nsgd=options), tmp_path / "out", lambda *_: None)
    page = Page(write_report(tmp_path / "out"))
    assert said in page.text
    assert (tmp_path / "out" / "eigenvalues.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ["sgd"], "seeds": 1, "epochs": 1},
        {"methods": ["nsgd"], "seeds": 1, "epochs": 1},
        {"methods": ["nsgd", "sgd", "dom-sgd"], "seeds": 1, "lr": 0.0},
        {"methods": ["sgd", "nsgd"], "seeds": 1, "nsgd": NSGDOptions(k=2, warmup_steps=1000)},
        {"methods": ["sgd", "nsgd"], "seeds": 1, "nsgd": NSGDOptions(k=1, gamma=0.0, refresh_every=100)},
        {"methods": ["sgd"], "seeds": 2, "lr": 1e12},
    ],
    ids=["SGD alone", "no SGD", "no steps", "no refresh", "one refresh", "diverged"],
)
def test_an_unusual_study_is_reported_too(tmp_path, options):
    run_study(make_study(**options), tmp_path / "out", lambda *_: None)
    page = Page(write_report(tmp_path / "out"))
    assert len(page.tables) == 3
    assert ("minus SGD" in page.tables[0][0]) == ("sgd" in options["methods"] and len(options["methods"]) > 1)
    print_table(tmp_path / "out", Console(file=io.StringIO()))
