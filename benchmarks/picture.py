"""The two pictures of README.md: what the first command, `nsgd compare`, finds, and the page that it writes.

Digits in batches of 32 and of 1,024: the training loss of every method against steps and against seconds, and the top
of the page as a browser shows it (chromium, and playwright to drive it). Beside the pictures stand the losses, the
means of epochs or of as many of them as leave 60, and what they were made with. The drawing of the losses and README's
words come from these, by `python benchmarks/evidence.py`.

    python benchmarks/picture.py            # two minutes; runs `nsgd compare`, writes results/first_command.*
    python benchmarks/picture.py --smoke    # seconds; draws the losses that are there, writes nothing
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common.documents import svg, wrapped
from matplotlib.figure import Figure

from lightning_modules.commands.main import main as nsgd
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.curves import Point, epoch_losses, has_logarithm, plot, plot_seeds
from lightning_modules.report.study.files import read_folder
from lightning_modules.report.style import MethodStyle, method_styles
from lightning_modules.support.files import Rows, read_csv, write_csv, write_yaml

RESULTS = Path(__file__).parent / "results"
COSTS = {"step": "steps", "seconds": "seconds"}
POINTS = 60  # of a run's curve, at most
WIDTH = 1000  # pixels of the page
MARGIN = 16  # below its first figure
COLORS = 128  # of its picture, which makes the file a third as large

Curves = dict[int, dict[str, dict[int, list[Point]]]]  # of each batch size, method and seed


def read_studies(folder: Path) -> tuple[Rows, dict[str, Any]]:
    """The losses of the studies that `nsgd compare` left in a folder, and what they were made with."""
    rows: Rows = []
    about: dict[str, Any] = {"made": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "settings": {}}
    for path in sorted(folder.glob("*/config.yaml"), key=lambda path: batch_size(yaml.safe_load(path.read_text()))):
        files = read_folder(path.parent)
        batch = batch_size(files.config)
        for method, runs in files.metrics.items():
            for seed, run in runs.items():
                rows += [
                    {
                        "batch_size": batch,
                        "method": method,
                        "seed": seed,
                        "step": row["step"],
                        "seconds": round(row["seconds"], 4),
                        "loss": float(f"{loss:.4g}"),
                    }
                    for row, loss in thinned(epoch_losses(run))
                ]
        about["settings"][batch] = files.settings
        about |= {"methods": yaml.safe_load((path.parent / "methods.yaml").read_text()), **files.environment}
    return rows, about


def thinned(curve: list[Point]) -> list[Point]:
    """Means of as many points in a row as leave few enough, each at the last of them."""
    width = -(-len(curve) // POINTS)
    parts = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(part[-1][0], float(np.mean([loss for _, loss in part]))) for part in parts]


def batch_size(config: dict[str, Any]) -> int:
    size: int = config["data"]["init_args"]["batch_size"]
    return size


def curves_of(rows: Rows) -> Curves:
    curves: Curves = {}
    for row in rows:
        runs = curves.setdefault(row["batch_size"], {}).setdefault(row["method"], {})
        runs.setdefault(row["seed"], []).append((row, row["loss"]))
    return curves


def middle(runs: dict[int, list[Point]]) -> list[Point]:
    """Medians over the seeds, up to the end of the shortest run."""
    return [
        ({cost: float(np.median([row[cost] for row, _ in at])) for cost in COSTS}, float(np.median([y for _, y in at])))
        for at in zip(*runs.values(), strict=False)
    ]


def crossing(curve: list[Point], level: float) -> dict[str, float]:
    """What it costs until a curve first is at a level, on straight lines of the drawing; empty if it never is."""
    if curve[0][1] <= level:
        return curve[0][0]
    for (before, high), (after, low) in pairwise(curve):
        if low <= level:
            part = np.log(high / level) / np.log(high / low)
            return {cost: before[cost] + part * (after[cost] - before[cost]) for cost in COSTS}
    return {}


def passages(methods: dict[str, dict[int, list[Point]]], subject: str) -> tuple[float, dict[str, float]]:
    """Where the first method's median ends, and what another's costs until it is there, in shares of the first's."""
    first, second = (middle(methods[method]) for method in (next(iter(methods)), subject))
    level = first[-1][1]
    base, other = crossing(first, level), crossing(second, level)
    return level, {cost: other[cost] / base[cost] for cost in other if cost in COSTS}


def subject_of(styles: dict[str, MethodStyle]) -> str:
    """The first method that damps."""
    return next(method for method, style in styles.items() if style.damps)


def draw(rows: Rows, about: dict[str, Any]) -> Figure:
    """A row of panels for each batch size, one against steps and one against seconds."""
    curves, styles = curves_of(rows), method_styles(about["methods"], about["methods"])
    figure, panels = new_figure(len(COSTS), rows=len(curves))
    for i, (batch, methods) in enumerate(curves.items()):
        base, subject = styles[next(iter(methods))], subject_of(styles)
        level, shares = passages(methods, subject)
        for axes, (cost, unit) in zip(panels[len(COSTS) * i :], COSTS.items(), strict=False):
            for method, runs in methods.items():
                plot_seeds(axes, styles[method], cost, runs)
                x, y = [row[cost] for row, _ in middle(runs)], [loss for _, loss in middle(runs)]
                plot(axes, styles[method], x, y)
            axes.axhline(level, color=base.color, linewidth=0.7, zorder=1)
            reached = f"after {100 * shares[cost]:.0f} % of its {unit}" if shares else "not reached"
            axes.set(xlabel=f"{unit} of training", yscale="log" if has_logarithm(axes) else "linear")
            axes.minorticks_off()
            axes.set_title(
                f"Batches of {batch:,}: {styles[subject].label} at {base.label}'s last loss\n{reached}",
                fontsize=10,
                loc="left",
            )
        panels[len(COSTS) * i].set_ylabel("training loss, means of epochs")
    panels[1].legend(frameon=False, fontsize=8, loc="upper right", handlelength=3.5)
    return figure


def findings(rows: Rows, about: dict[str, Any]) -> str:
    """What the drawing says, a sentence for each batch size."""
    styles, sentences = method_styles(about["methods"], about["methods"]), []
    subject = subject_of(styles)
    for batch, methods in curves_of(rows).items():
        _, shares = passages(methods, subject)
        base = styles[next(iter(methods))].label
        ends = {styles[method].label: middle(runs)[-1][1] for method, runs in methods.items()}
        lowest = min((label for label in ends if np.isfinite(ends[label])), key=lambda label: ends[label])
        reaches = (
            f"is at {base}'s last loss after {100 * shares['step']:.0f} % of its steps and "
            f"{100 * shares['seconds']:.0f} % of its seconds"
            if shares
            else f"does not reach {base}'s last loss"
        )
        sentences.append(f"In batches of {batch:,} {styles[subject].label} {reaches}; {lowest} ends lowest.")
    return " ".join(sentences)


def caption() -> str:
    """The picture for README.md, with its words."""
    rows, about = read_results(RESULTS / "first_command.csv")
    curves, seconds = curves_of(rows), []
    for method, style in method_styles(about["methods"], about["methods"]).items():
        took = [f"{middle(runs[method])[-1][0]['seconds']:.2g}" for runs in curves.values() if method in runs]
        seconds.append(f"{style.label} {' and '.join(took)}")
    words = (
        f"Thin: each of {len({row['seed'] for row in rows})} seeds; thick: their median. {findings(rows, about)} "
        f"Median seconds of a run at {' and '.join(f'{batch:,}' for batch in curves)}: {', '.join(seconds)}. From "
        "`benchmarks/results/first_command.csv`, made by `python benchmarks/picture.py` on "
        f"{about['cores']} cores of a CPU, {about['made']}."
    )
    alt = f"Training loss on digits, on a logarithmic scale, against steps and against seconds. {findings(rows, about)}"
    return f"![{alt}](benchmarks/results/first_command.svg)\n\n{wrapped(words)}"


def read_results(path: Path) -> tuple[Rows, dict[str, Any]]:
    return read_csv(path), yaml.safe_load(path.with_suffix(".yaml").read_text())


def photograph(page: Path, out: Path, browser: str) -> None:
    """The top of a page, down to the end of its first figure, on a light screen."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        shown = chromium.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        shown.goto(page.resolve().as_uri())
        figure = shown.locator("figure").first.bounding_box()
        assert figure is not None
        whole = {"x": 0.0, "y": 0.0, "width": float(WIDTH), "height": figure["y"] + figure["height"] + MARGIN}
        photo = shown.screenshot(clip=whole, full_page=True)  # type: ignore[arg-type]
        chromium.close()
    Image.open(io.BytesIO(photo)).convert("RGB").quantize(COLORS).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("nsgd-compare"), help="folder of `nsgd compare`")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_command.csv")
    parser.add_argument("--smoke", action="store_true", help="draw the losses that are there, write nothing")
    args = parser.parse_args()
    if args.smoke:
        svg(draw(*read_results(args.out)))
        return
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("expected the browser chromium on PATH, got none; on Debian, apt-get install chromium")
    if code := nsgd(["compare", "--out", str(args.study)]):  # runs that are there already are not made again
        raise SystemExit(code)
    rows, about = read_studies(args.study)
    write_csv(args.out, rows)
    write_yaml(args.out.with_suffix(".yaml"), about)
    photograph(args.study / "report.html", args.out.with_suffix(".png"), browser)


if __name__ == "__main__":
    main()
