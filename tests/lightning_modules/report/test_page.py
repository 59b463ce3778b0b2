"""The page that reports share, as a browser shows it: sortable, readable on a phone, in the dark, in print."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from playwright.sync_api import Browser, Page, sync_playwright
from studies import finished

from lightning_modules import AveragingExperiment, BatchQuadratic, Classifier, Digits, SharpnessMonitor, ValleyWalk
from lightning_modules.report.escape.report import write_escape
from lightning_modules.report.measurements.report import measurements_in, write_measurements
from lightning_modules.report.page import Section, new_figure, write_page
from lightning_modules.report.study.report import write_report
from lightning_modules.study.escape import EscapeStudy, run_escape

pytestmark = pytest.mark.draws

PAGES = ("example", "study", "escape", "measurements")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
HEADER = ["weights", "method", "mean", "minus SGD", "paired t-test", "gradients"]
ROWS = [
    ["last", "SGD", "97.5 ± 0.4", "", "", "1,024"],
    ["", "NSGD", "97.2 ± 0.4", "-0.3 ± 0.4 (p = 0.11)", "no significant difference (p = 0.11)", "not reached"],
    ["", "Bulk-SGD", "diverged", "", "no test", "∞"],
    ["EMA", "SGD", "101.0 ± 1.0", "", "", "352"],
    ["", "NSGD", "9.9 ± 3.1", "+0.4 ± 1.1", "significant (p = 1.2e-05)", "1e3"],
    ["", "Bulk-SGD", "97.5 ± 0.3", "-12 ± 9.1", "significant (p = 0.0031)", "0.96"],
]


def curves(scale: str) -> Figure:
    """Three panels with one label and one legend, as studies have them, black, grey and in colour."""
    figure, panels = new_figure(3)
    steps = np.arange(1, 41)
    for i, (name, color) in enumerate({"SGD": "#444444", "NSGD": "#0072b2", "Bulk-SGD": "black"}.items()):
        loss = 0.004 + 2.2 * np.exp(-steps / (12 - 2 * i))
        for axes, label in zip(panels, ("optimizer steps", "gradients", "seconds"), strict=True):
            axes.plot(8 * steps, loss, color=color, label=name)
            axes.fill_between(8 * steps, 0.9 * loss, 1.1 * loss, color=color, alpha=0.15, linewidth=0)
            axes.set(xlabel=label, yscale=scale)
    panels[0].set_ylabel("training loss, mean of each epoch")
    panels[0].legend()
    return figure


def write_example(path: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "title": "SGD, NSGD and Bulk-SGD on Digits",
        "figures": {
            "training-loss": (curves("log"), "Training loss against the three axes of cost."),
            "validation-loss": (curves("linear"), "Validation loss, likewise."),
        },
        "tables": [{"title": "Test accuracy, %", "header": HEADER, "rows": ROWS}],
        "text_columns": ("weights", "method", "paired t-test"),
        "caption": "Means over five paired seeds ± half of the 95 % t-interval.",
        "verdict": "No significant difference.\nNSGD needed fewer steps.",
        "summary": ["No method differs significantly from SGD.", "NSGD took 10 % more gradients."],
        "sections": [
            Section(
                "Where NSGD did not help",
                ["Refreshes cost more than they gained.", "So it was with both averages."],
            ),
            Section("Every read-out", tables=[{"title": "All", "header": ["n"], "rows": [["1"]]}], folded=True),
        ],
        "links": {"NSGD, seed 0": "runs/nsgd 0/metrics.csv"},
        "appendix": {"Configuration": "net: mlp\nepochs: 40\n" + "a_long_word_" * 20},
    }
    return write_page(path, **{**settings, **options})


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of every kind, all but the first by the commands' own reports."""
    example, study, escape, measured = (tmp_path_factory.mktemp(name) for name in PAGES)
    (example / "runs" / "nsgd 0").mkdir(parents=True)
    (example / "runs" / "nsgd 0" / "metrics.csv").write_text("step,loss\n")
    torch.set_num_threads(1)
    tiny = EscapeStudy(lr=[0.02], batch_sizes=[20.0, 30.0], gammas=[1.0, 0.5], walkers=200, steps=300)
    run_escape(tiny, escape / "out", lambda *_: None)
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    callbacks = [
        SharpnessMonitor(samples=32, every=20, k=3, products=12, path=measured / "sharpness.csv"),
        ValleyWalk(samples=32, every=15, length=6, points=4, path=measured / "valley.csv"),
        BatchQuadratic(every=15, path=measured / "quadratic.csv"),
        AveragingExperiment(samples=32, steps=8, path=measured / "averaging.csv"),
    ]
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=50, max_epochs=-1, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **silent
    )
    trainer.fit(module, datamodule=Digits())
    return {
        "example": write_example(example / "report.html"),
        "study": write_report(finished(study / "out")),
        "escape": write_escape(escape / "out"),
        "measurements": write_measurements(measured, measurements_in(measured), title="A run"),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("expected the browser chromium on PATH, got none; on Debian, apt-get install chromium")
    quiet = ("background-networking", "component-update", "sync")
    args = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=args)
        yield chromium
        chromium.close()


def opened(browser: Browser, path: Path, **options: Any) -> Page:
    page = browser.new_context(**options).new_page()
    page.goto(path.as_uri())
    return page


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_the_file_names_no_other_but_by_relative_links(pages, name):
    source = pages[name].read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|\bsrc=|<link|<iframe|url\((?!#)", source)
    for link in re.findall(r'<a href="([^"]+)"', source):
        assert not link.startswith("/")
        assert (pages[name].parent / unquote(link)).is_file()
    figures = source.count("<figure>")
    assert figures == len(list(pages[name].parent.glob("*.png"))) == len(list(pages[name].parent.glob("*.pdf"))) > 0


@pytest.mark.parametrize("name", PAGES)
def test_ids_are_unique_and_what_refers_to_them_finds_them(pages, name):
    source = pages[name].read_text(encoding="utf-8")
    ids = Counter(re.findall(r'\bid="([^"]+)"', source))
    assert set(ids.values()) == {1}
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', source))
    assert used
    assert used <= set(ids)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        write_example(folder / "report.html")
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert len(first) == 1 + 2 * 2


def test_a_figure_is_given_back_with_all_its_panels(tmp_path):
    figure = curves("linear")
    pages = [write_example(tmp_path / "report.html", figures={"loss": (figure, "")}).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert all(axes.get_visible() for axes in figure.axes)


def test_tick_labels_that_overlap_are_hidden_minor_ones_first(tmp_path):
    figure, (axes,) = new_figure(1)
    axes.plot([1, 2], [0, 1])
    axes.set_xticks([1, 2], ["one", "two"])
    axes.set_xticks([1.001, 1.5], ["hidden", "kept"], minor=True)
    source = write_example(tmp_path / "report.html", figures={"ticks": (figure, "")}).read_text()
    assert [word for word in ("one", "two", "hidden", "kept") if f">{word}</text>" in source] == ["one", "two", "kept"]


@pytest.mark.parametrize(
    "words", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "{{ 7 * 7 }}", r"$x_{ $ \frac$"]
)
def test_words_are_shown_as_they_are(browser, tmp_path, words):
    figure, (axes,) = new_figure(1)
    axes.plot([1, 2], label=words)
    axes.set(title=words, xlabel=words)
    axes.legend()
    table = {"title": words, "header": [words, "n"], "rows": [[words, "1"], ["", "2"]]}
    options: dict[str, Any] = {
        **{"title": words, "summary": [words], "tables": [table], "text_columns": [words], "caption": words},
        **{
            "verdict": words,
            "sections": [Section(words, [words])],
            "links": {words: words},
            "appendix": {words: words},
        },
        "figures": {"figure": (figure, words)},
    }
    page = opened(browser, write_example(tmp_path / "report.html", **options))
    assert page.title() == words
    for place in (
        "h1",
        ".verdict strong",
        ".summary li",
        "h3",
        "th button",
        "tbody th",
        ".caption",
        "h2 + p",
        "svg text",
    ):
        assert words in page.locator(place).all_text_contents()
    for place in ("figcaption p", "details a", "summary", "pre", ".repeat", "button.key span"):
        assert words in page.locator(place).all_text_contents()
    assert words in str(page.locator("svg[role=img]").get_attribute("aria-label"))
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_no_request_leaves_the_page_and_nothing_fails_in_it(browser, pages, name):
    page = browser.new_page()
    requests: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.on("console", lambda message: faults.append(message.text))
    page.goto(pages[name].as_uri(), wait_until="networkidle")
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    for button in page.locator("thead button, button.key").all():
        button.click()
    assert requests == [pages[name].as_uri()]
    assert faults == []


def shown(page: Page, column: int) -> list[str]:
    """A column of the first table, as it is seen."""
    return [
        row.locator("th, td").nth(column).inner_text() for row in page.locator("table").first.locator("tbody tr").all()
    ]


ASCENDING = {
    "mean": ["9.9 ± 3.1", "97.2 ± 0.4", "97.5 ± 0.3", "97.5 ± 0.4", "101.0 ± 1.0", "diverged"],
    "minus SGD": ["-12 ± 9.1", "-0.3 ± 0.4 (p = 0.11)", "+0.4 ± 1.1", "", "", ""],
    "gradients": ["0.96", "352", "1e3", "1,024", "∞", "not reached"],
    "method": ["Bulk-SGD", "Bulk-SGD", "NSGD", "NSGD", "SGD", "SGD"],
    "paired t-test": [
        *("no significant difference (p = 0.11)", "no test"),
        *("significant (p = 1.2e-05)", "significant (p = 0.0031)", "", ""),
    ],
}


@pytest.mark.parametrize("press", ["click", "Enter", "Space"])
@pytest.mark.parametrize("name", list(ASCENDING))
def test_a_table_sorts_by_the_header_that_is_pressed(browser, pages, name, press):
    page = opened(browser, pages["example"])
    column = HEADER.index(name)
    header = page.locator("table").first.locator("thead th").nth(column)
    assert header.get_attribute("aria-sort") is None
    wanted = ASCENDING[name]
    missing = [cell for cell in wanted if cell in ("", "diverged", "not reached")]  # what has no value stays last
    reverse = wanted[: len(wanted) - len(missing)][::-1] + missing
    for direction, order in (("ascending", wanted), ("descending", reverse), ("ascending", wanted)):
        button = header.locator("button")
        if press == "click":
            button.click()
        else:
            button.focus()
            page.keyboard.press(press)
        assert header.get_attribute("aria-sort") == direction
        assert shown(page, column) == order
    assert page.locator("[aria-sort]").count() == 1


def test_the_rows_of_a_group_say_its_name_once_they_are_sorted(browser, pages):
    page = opened(browser, pages["example"])
    repeats = page.locator(".repeat")
    assert repeats.all_text_contents() == ["last", "last", "EMA", "EMA"]
    assert all(box["width"] <= 1 for box in (item.bounding_box() for item in repeats.all()))
    page.get_by_role("button", name="mean").click()
    assert shown(page, 0) == ["EMA", "last", "EMA", "last", "EMA", "last"]
    assert all(box["width"] > 10 for box in (item.bounding_box() for item in repeats.all()))


def test_a_table_is_whole_without_the_script(browser, pages):
    page = opened(browser, pages["example"], java_script_enabled=False)
    table = page.locator("table").first
    assert table.locator("thead th").all_inner_texts() == HEADER
    assert [row.locator("th, td").all_text_contents()[1:] for row in table.locator("tbody tr").all()] == [
        row[1:] for row in ROWS
    ]
    assert page.locator("button").count() == 0


def test_the_page_says_what_it_was_given_in_order(browser, pages):
    page = opened(browser, pages["example"])
    headings = page.locator("h1, h2, summary").all_inner_texts()
    assert headings == [
        *("SGD, NSGD and Bulk-SGD on Digits", "Training loss", "Validation loss", "Results", "Where NSGD did not help"),
        *("Every read-out", "Configuration", "Files"),
    ]
    assert page.locator("h1 + .verdict strong").inner_text() == "No significant difference."
    assert page.locator(".verdict span").inner_text() == "NSGD needed fewer steps."
    assert page.locator(".summary li").count() == 2
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("table").first.locator("thead th[scope=col]").count() == len(HEADER)
    labels = [svg.get_attribute("aria-label") for svg in page.get_by_role("img").all()]
    assert labels[:2] == [
        "Training loss, panel 1 of 3: training loss, mean of each epoch against optimizer steps; SGD, NSGD, Bulk-SGD",
        "Training loss, panel 2 of 3: gradients; SGD, NSGD, Bulk-SGD",
    ]
    assert not page.get_by_text("epochs: 40").is_visible()
    page.get_by_text("Configuration").click()
    assert page.get_by_text("epochs: 40").is_visible()


LAYOUT = """() => {
  document.querySelectorAll("details").forEach((part) => (part.open = true));
  const place = (item) => {
    const { left, top, right, bottom } = item.getBoundingClientRect();
    return { name: item.id || item.textContent.trim().slice(0, 40), left, top, right, bottom };
  };
  const places = (root, selector) => [...root.querySelectorAll(selector)].map(place);
  return {
    blocks: places(document, "h1, h2, h3, p, li, svg[role], .legend, .scroll, summary, pre"),
    headers: [...document.querySelectorAll("thead tr")].map((row) => places(row, "th")),
    panels: [...document.querySelectorAll("svg[role]")].map((svg) => ({
      frame: place(svg),
      texts: places(svg, "[id*=-text_]"),
      sizes: [...svg.querySelectorAll("text")]
        .map((text) => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a),
    })),
    sideways: document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth,
  };
}"""


def overlapping(boxes: list[dict[str, Any]], tolerance: float = 1.0) -> list[tuple[str, str]]:
    """Pairs of boxes that share more than a rim; `tolerance` is in pixels."""
    return [
        (a["name"], b["name"])
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > tolerance
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > tolerance
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_overlaps_and_the_page_does_not_scroll_sideways(browser, pages, name, width):
    page = opened(browser, pages[name], viewport={"width": width, "height": 800})
    layout = page.evaluate(LAYOUT)
    assert layout["sideways"] == 0
    assert len(layout["blocks"]) > 5
    assert overlapping(layout["blocks"]) == []
    assert all(0 <= box["left"] < box["right"] <= width for box in layout["blocks"])
    for headers in layout["headers"]:
        assert overlapping(headers) == []
    assert layout["panels"]
    for panel in layout["panels"]:
        assert len(panel["texts"]) > 3
        assert overlapping(panel["texts"], tolerance=3) == []  # boxes have room above and below the letters
        for text in panel["texts"]:  # none is cut off
            assert panel["frame"]["left"] - 1 <= text["left"] < text["right"] <= panel["frame"]["right"] + 1
            assert panel["frame"]["top"] - 1 <= text["top"] < text["bottom"] <= panel["frame"]["bottom"] + 1
        assert min(panel["sizes"]) > 7  # pixels


CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
  const light = (color) => channels(color)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (item) => {
    const color = getComputedStyle(item).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && item.parentElement ? behind(item.parentElement) : color;
  };
  const found = [...document.querySelectorAll("h1, h2, h3, p, li, a, th, td, summary, pre, svg text")].map((item) => {
    const style = getComputedStyle(item);
    const [x, y] = [light(item.closest("svg") ? style.fill : style.color), light(behind(item))];
    return [item.tagName, (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)];
  });
  return { found, paper: light(getComputedStyle(document.body).backgroundColor) };
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_words_stand_out_in_light_and_dark(browser, pages, name, scheme):
    page = opened(browser, pages[name], color_scheme=scheme)
    seen = page.evaluate(CONTRAST)
    assert (seen["paper"] > 0.9, seen["paper"] < 0.1) == (scheme == "light", scheme == "dark")
    assert "text" in {tag for tag, _ in seen["found"]}
    assert [tag for tag, contrast in seen["found"] if contrast < 4.5] == []  # WCAG 2, level AA


def test_lines_keep_their_colour_in_the_dark_but_black_and_greys(browser, pages):
    lines = ".panel [data-kind=line] > path"
    strokes = f"() => [...document.querySelectorAll('{lines}')].map((p) => getComputedStyle(p).stroke)"
    light, dark = (set(opened(browser, pages["example"], color_scheme=s).evaluate(strokes)) for s in SCHEMES)
    assert {"rgb(68, 68, 68)", "rgb(26, 26, 26)", "rgb(0, 114, 178)"} <= light
    assert {"rgb(187, 187, 187)", "rgb(232, 232, 232)", "rgb(0, 114, 178)"} <= dark


def test_print_is_on_white_with_everything_open(browser, pages):
    page = opened(browser, pages["example"], color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(CONTRAST)["paper"] > 0.9
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_text("epochs: 40").is_visible()


# -- legends, values under the pointer, tables on a phone ------------------------------------------------------------


def shown_lines(page: Page, series: str) -> int:
    """How many lines of a series are seen in the first figure."""
    number = page.evaluate("JSON.parse(document.querySelector('[data-names]').dataset.names)").index(series)
    lines = page.locator("figure").first.locator(f".panel [data-series='{number}']")
    return sum(line.is_visible() for line in lines.all())


def test_a_press_in_a_legend_hides_and_shows_lines_in_every_panel_of_its_figure(browser, pages):
    page = opened(browser, pages["study"])
    figure = page.locator("figure").first
    button = figure.get_by_role("button", name="NSGD", exact=True)
    assert button.count() == 1  # one legend, beside both panels
    every = {name: shown_lines(page, name) for name in ("SGD", "NSGD")}
    assert every == {"SGD": 6, "NSGD": 6}  # two seeds and their median, against steps and against seconds
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert [shown_lines(page, name) for name in ("SGD", "NSGD")] == [6, 0]
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert shown_lines(page, "NSGD") == 6


def test_a_legend_of_a_panel_is_beside_it_and_not_in_its_drawing(browser, pages):
    page = opened(browser, pages["example"])
    panels = page.locator("figure").first.locator(".panel")
    assert panels.first.locator(".legend button.key").all_inner_texts() == ["SGD", "NSGD", "Bulk-SGD"]
    assert page.locator(".legend").count() == 2  # each figure's first panel has one
    assert "NSGD" not in " ".join(panels.first.locator("svg[role] text").all_text_contents())
    plain = opened(browser, pages["example"], java_script_enabled=False)
    assert plain.locator(".key").first.inner_text() == "SGD"  # a legend is one without the script, too


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_line_says_its_values_under_the_pointer(browser, tmp_path, scale):
    figure, (axes,) = new_figure(1)
    axes.plot([1, 2, 3], [0.5, 0.02, 4.0], label="SGD")
    axes.plot([1, 2, 3], [0.3, 1.25, 0.1], label="NSGD")
    axes.set(xlabel="optimizer steps", yscale=scale)
    axes.legend()
    page = opened(browser, write_example(tmp_path / "report.html", figures={"loss": (figure, "")}))
    svg = page.locator("svg[data-axes]")
    assert not page.locator(".tip").is_visible()
    # Where the second point of NSGD is drawn, as the browser says.
    at = page.evaluate(
        """() => {
          const line = document.querySelector(".panel [data-series='1'] path");
          const [, x, y] = line.getAttribute("d").match(/L ([\\d.]+) ([\\d.]+)/).map(Number);
          const { x: left, y: top } = new DOMPoint(x, y).matrixTransform(line.getScreenCTM());
          return [left, top];
        }"""
    )
    page.mouse.move(at[0] + 3, at[1] + 3)
    assert page.locator(".tip").inner_text() == "NSGD: 1.25 at 2 optimizer steps"
    page.get_by_role("button", name="NSGD", exact=True).click()
    page.mouse.move(at[0] + 2, at[1] + 2)
    assert "NSGD" not in page.locator(".tip").inner_text() or not page.locator(".tip").is_visible()
    page.mouse.move(2, 2)
    assert not page.locator(".tip").is_visible()
    assert svg.locator("circle").count() == 0


def test_a_scale_without_numbers_for_its_points_says_none(browser, tmp_path):
    figure, (axes,) = new_figure(1)
    axes.plot([1, 2, 3], [-1, 0, 1000], label="SGD")
    axes.set(yscale="symlog")
    page = opened(browser, write_example(tmp_path / "report.html", figures={"loss": (figure, "")}))
    assert page.locator("svg[role]").count() == 1
    assert page.locator("svg[data-axes]").count() == 0


def test_on_a_phone_the_one_table_is_cards_and_others_scroll_in_their_box(browser, pages):
    page = opened(browser, pages["study"], viewport={"width": 390, "height": 800})
    cards = page.locator("table.cards").first
    assert not cards.locator("thead").is_visible()
    first = cards.locator("tbody tr").first
    assert first.locator("td").first.evaluate("cell => getComputedStyle(cell, '::before').content") == '"last"'
    widths = page.evaluate(
        "[...document.querySelectorAll('table.cards td')].map((c) => c.getBoundingClientRect().right)"
    )
    assert widths
    assert max(widths) <= 390  # nothing is cut off
    page.get_by_text("Every read-out with its test, costs").click()
    box = page.locator(".scroll:visible", has=page.locator("table:not(.cards)")).first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    assert "gradient" in box.evaluate("box => getComputedStyle(box).backgroundImage")  # the shadow that says so
    wide = opened(browser, pages["study"], viewport={"width": 1280, "height": 800})
    assert wide.locator("table.cards thead").first.is_visible()


def test_a_study_is_printed_on_three_pages(browser, pages):
    page = opened(browser, pages["study"])
    page.emulate_media(media="print")
    printed = page.pdf(format="A4")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 3


def test_the_first_things_of_a_study_are_its_verdict_its_figure_and_one_table(browser, pages):
    page = opened(browser, pages["study"])
    places = [
        page.locator(selector).first.bounding_box()["y"]  # type: ignore[index]
        for selector in ("h1", ".verdict", "figure", "table", "details")
    ]
    assert places == sorted(places)
    assert page.locator("table:visible").count() == 2  # the one table, and where NSGD did not help
    assert page.locator("figure:visible").count() == 2  # the losses, and every seed
    assert page.locator("figure:visible").first.locator("svg[role]").count() == 2
