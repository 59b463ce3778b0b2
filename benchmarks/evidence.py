"""The tables and figures of README.md, nsgd/README.md and benchmarks/README.md, from the files under results/.

A table stands between its markers; a study of cifar10.py that has none yet gets some in benchmarks/README.md.
Figures are compared to the byte where the same matplotlib drew them, else by the numbers and words that they show.

    python benchmarks/evidence.py            # makes all anew
    python benchmarks/evidence.py --check    # fails, and names each table and figure that is not what the files say
    python benchmarks/evidence.py --smoke    # half a minute: that, and a toy plan from its runs to its table and figure
"""

from __future__ import annotations

import argparse
import importlib
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from common import RESULTS
from common.documents import is_of, markdown, rendered, svg, with_places
from common.picks import picks
from common.plan_entries import study_entry
from common.plan_figures import study_figure
from common.plans import Kept, kept_in
from matplotlib.figure import Figure

from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.numbers import SIGNIFICANT, change_of, mean_of
from lightning_modules.study.methods import RECIPES
from lightning_modules.support.files import read_csv
from lightning_modules.support.score import TRAIN_LOSS, Measure

ROOT = Path(__file__).parent.parent
PLANS = RESULTS / "cifar10"
sys.path.append(str(ROOT / "tests" / "nsgd"))  # the cases of models


def digits() -> str:
    """The last weights of the default study."""
    files = read_folder(RESULTS / "digits")
    score, loss = files.endpoint, TRAIN_LOSS
    entries = {(row["measure"], row["method"]): row for row in files.summary if row["read_out"] == "last"}

    def change(entry: dict[str, Any], measure: Measure) -> str:
        if math.isnan(entry["p_holm"]):
            return ""
        verdict = "" if entry["p_holm"] < SIGNIFICANT else ", no significant difference"
        return f"{change_of(entry, measure)} (p = {entry['p_holm']:.2g}{verdict})"

    rows = []
    for method in files.methods:
        cells = [
            cell(entries[measure.column, method], measure) for measure in (score, loss) for cell in (mean_of, change)
        ]
        gradients = mean(row["gradients"] for row in files.results if row["method"] == method)
        rows.append([RECIPES[method].label, *cells, f"{gradients:.0f}"])
    ratio = files.effect(loss) == "ratio"
    against = f"{'over' if ratio else 'minus'} SGD"
    table = markdown(["last weights", score.header, "minus SGD", loss.label, against, "gradients"], rows)
    losses = ", of losses geometric ones and ratios" if ratio else ""
    source = (
        f"Means over five paired seeds{losses} ± half of the 95 % interval, p corrected by Holm's method; "
        "each learning rate\n"
        "was the best of 12 quasi-random trials by validation loss with one seed. From `benchmarks/results/digits/`,\n"
        "made by `nsgd compare` before the best trials ran again with two more seeds. The trials of today are in\n"
        "`benchmarks/results/digits-tuning.csv`, made by `nsgd compare digits --tune 12 --methods+=dom-sgd`."
    )
    return f"{table}\n\n{source}"


def benchmark(name: str, source: str, wanted: Callable[[str], bool] = lambda first: True) -> Callable[[], str]:
    """The table of a script in benchmarks/, from its file of results; or the rows whose first cell is wanted."""

    def render() -> str:
        header, rows = importlib.import_module(name).table(read_csv(RESULTS / f"{name}.csv"))
        body = markdown(list(header), [row for row in rows if wanted(row[0])])
        return f"{body}\n\n{source} From `benchmarks/results/{name}.csv`, made by `python benchmarks/{name}.py`."

    return render


def shown(tracker: str) -> bool:
    """Whether the table has room for a tracker."""
    hidden = ("samples, 32, every 1, decay 0.98", "decay 0.857", "6 products", "groups", " 128, every 12")
    return not any(part in tracker for part in (*hidden, "training gradients, decay 0.95"))


def cost() -> str:
    """What the drop-in's step and a refresh from samples take, counted and in seconds, for every network of step.py."""
    rows = read_csv(RESULTS / "step.csv")
    found = {(row["network"], row["batch"], row["method"]): row["ratio"] for row in rows}
    body = []
    for network, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        step = found[network, batch, "NSGD, k = 20"]
        refresh = found[network, batch, "a refresh from 32 samples, k = 20"]
        body.append([f"{network}, batch {batch:,}", "1.00", f"{step:.2f}", f"{32 / batch:.2f}", f"{refresh:.2f}"])
    header = ["", "a step: gradients", "seconds", "a refresh from 32 samples: their gradients", "seconds"]
    source = "In those of an iteration of SGD; medians, from `benchmarks/results/step.csv`."
    return f"{markdown(header, body)}\n\n{source}"


def cost_on_gpu() -> str:
    """What the drop-in's step takes on a GPU, in SGD's seconds, for every network of step.py measured there."""
    rows = read_csv(RESULTS / "step-cuda.csv")
    found = {(row["network"], row["batch"], row["method"]): row for row in rows}
    body = []
    for network, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        ratios = [f"{found[network, batch, f'NSGD, k = {k}']['ratio']:.2f}" for k in (10, 20)]
        sgd = found[network, batch, "SGD"]
        body.append([f"{network}, batch {batch:,}", f"{1000 * sgd['seconds']:.1f}", *ratios])
    header = ["", "an iteration of SGD, ms", "NSGD, k = 10, times that", "k = 20"]
    source = (
        f"Medians on one {rows[0]['device']}, bfloat16 autocast, channels last; from "
        "`benchmarks/results/step-cuda.csv`,\nmade by `python benchmarks/step.py --device cuda`."
    )
    return f"{markdown(header, body)}\n\n{source}"


def models() -> str:
    """What works with which source, from the cases that tests/nsgd/test_models.py runs; equal rows are put together."""
    cases = importlib.import_module("model_cases")
    together: dict[tuple[str, ...], list[str]] = {}
    for case in cases.CASES:
        cells = []
        for source in cases.SOURCES:
            way = case.refused.get(source)
            cells.append(f"no: {way.out}" if way else getattr(case.said.get(source), "out", "") or "yes")
        together.setdefault(tuple(cells), []).append(case.name)
    header = ["model or precision", "training gradients", "samples, `module=`", "samples, one by one", "products"]
    rows = [["; ".join(names), *cells] for cells, names in together.items()]
    return f"{markdown(header, rows, '---')}\n\nFrom `tests/nsgd/model_cases.py`; each entry is a test, on the CPU."


# What each document shows.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"picture": lambda: str(importlib.import_module("picture").caption()), "picks": picks}
}
TABLES["nsgd/README.md"] = {"cost": cost, "cost_on_gpu": cost_on_gpu, "models": models}
TABLES["benchmarks/README.md"] = {
    "digits": digits,
    "time_to_target": benchmark("time_to_target", "Medians over paired seeds, as many as the counts say."),
    "damping_rule": benchmark("damping_rule", "Means over paired seeds."),
    "rule_and_blocks": benchmark("rule_and_blocks", "Medians over paired seeds."),
    "tracking": benchmark("tracking", "Means over points of each path; more trackers are in the file.", shown),
    "eigen": benchmark("eigen", "Medians over checkpoints and seeds.", lambda first: ", k = 10," in first),
    "step": benchmark("step", "Medians of iterations taken in turn."),
    "centring": benchmark("centring", "Means over paired seeds."),
    "where_not": benchmark("where_not", "Means over seeds; along the path early / halfway / at the end, of one seed."),
    "hvp": benchmark("hvp", "Medians of calls taken in turn.", lambda first: not first.endswith(", gradient")),
}


PICTURE = RESULTS / "first_command.svg"
BENCHMARKS = "benchmarks/README.md"


def tables() -> dict[str, dict[str, Callable[[], str]]]:
    """Document to name to table: those above, and those of plans."""
    plans = {f"cifar10/{kept.name}": plan(kept) for kept in kept_in(PLANS)}
    return {**TABLES, BENCHMARKS: {**TABLES[BENCHMARKS], **plans}}


def plan(kept: Kept) -> Callable[[], str]:
    """What benchmarks/README.md has of a study."""
    return lambda: study_entry(kept, kept.drawing.relative_to(ROOT / "benchmarks").as_posix())


def figures() -> dict[Path, Callable[[], Figure]]:
    """Path to figure: README's first, and those of plans."""
    return {
        PICTURE: first_command,
        **{kept.drawing: partial(study_figure, kept) for kept in kept_in(PLANS) if kept.has_figure},
    }


def first_command() -> Figure:
    """README's first figure."""
    picture = importlib.import_module("picture")
    figure: Figure = picture.draw(*picture.read_results(PICTURE.with_suffix(".csv")))
    return figure


def check() -> list[str]:
    """What is not as the files say: a document and a table, or a figure."""
    wrong = []
    for document, contents in tables().items():
        text = with_places((ROOT / document).read_text(encoding="utf-8"), contents)
        _, differing = rendered(text, {name: table() for name, table in contents.items()}, document)
        wrong += [f"{document}: the table {name}" for name in differing]
    wrong += [str(path.relative_to(ROOT)) for path, figure in figures().items() if not is_of(path, figure())]
    return wrong


def redraw() -> None:
    """Write every table and figure."""
    for path, figure in figures().items():
        if not is_of(path, figure()):
            path.write_text(svg(figure()), encoding="utf-8")
    for document, contents in tables().items():
        text = with_places((ROOT / document).read_text(encoding="utf-8"), contents)
        text, _ = rendered(text, {name: table() for name, table in contents.items()}, document)
        (ROOT / document).write_text(text, encoding="utf-8")


def toy(folder: Path) -> str:
    """Make a plan of seconds on digits, and return what a document would have of it; its figure lies beside it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "cifar10.py"), "--smoke"]
    subprocess.run([*command, "--runs", str(folder / "runs"), "--out", str(folder / "kept")], check=True)
    (kept,) = kept_in(folder / "kept")
    kept.drawing.write_text(svg(study_figure(kept)), encoding="utf-8")
    if not is_of(kept.drawing, study_figure(kept)):
        raise SystemExit(f"expected the figure of {kept.name} to be drawn the same twice, got two")
    return study_entry(kept, kept.drawing.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare all with the files, and write nothing")
    parser.add_argument("--smoke", action="store_true", help="that, and a toy plan; writes nothing")
    args = parser.parse_args()
    try:
        if not (args.check or args.smoke):
            return redraw()
        wrong = check()
    except ValueError as error:  # of a place or a file
        raise SystemExit(str(error)) from error
    if wrong:
        raise SystemExit("\n".join([*wrong, "not what the files say; run python benchmarks/evidence.py"]))
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            print(toy(Path(folder)))


if __name__ == "__main__":
    main()
