"""Write the tables of README.md, nsgd/README.md and benchmarks/README.md between their markers.

python benchmarks/readme.py            # rewrites them
python benchmarks/readme.py --smoke    # fails if one is not what these files say
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.numbers import SIGNIFICANT, change_of, mean_of
from lightning_modules.study.methods import RECIPES
from lightning_modules.support.files import read_csv
from lightning_modules.support.score import TRAIN_LOSS, Measure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "tests" / "nsgd"))  # the cases of models


def markdown(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


SHORT = "CNN at 16 px, batch 1,024"  # the case of the README's one table


def short() -> str:
    """Six methods of one case."""
    _, rows = importlib.import_module("time_to_target").table(read_csv(RESULTS / "time_to_target.csv"))
    wanted = {
        "SGD, momentum": "SGD with momentum",
        "AdamW": "AdamW",
        "Muon": "Muon",
        "NSGD, momentum": "**NSGD**",
        "NSGD, momentum, 8 micro-batches": "**NSGD**, 8 micro-batches",
        "NSGD by samples, momentum": "NSGD by single samples",
    }
    found = {case.removeprefix(f"{SHORT}: "): rest for case, *rest in rows if case.startswith(f"{SHORT}: ")}
    body = []
    for method, label in wanted.items():
        lr, loss, accuracy, _, target, _, reached, _ = found[method]
        gradients, _, seconds = target.partition(" / ")
        body.append([label, lr, gradients, seconds or "", f"{reached} seeds", loss, accuracy])
    header = ["method", "lr", "gradients", "seconds", "reached by", "final training loss", "validation, %"]
    source = (
        "Medians over seeds; from `benchmarks/results/time_to_target.csv`. The row by single samples was made before\n"
        "their mean gradient was taken out."
    )
    return f"{markdown(header, body)}\n\n{source}"


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
    """What the drop-in's step takes on a GPU, in SGD's seconds, for every network of step.py that was measured there."""
    rows = read_csv(RESULTS / "step-cuda.csv")
    found = {(row["network"], row["batch"], row["method"]): row for row in rows}
    body = []
    for network, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        ratios = [f"{found[network, batch, f'NSGD, k = {k}']['ratio']:.2f}" for k in (10, 20)]
        sgd = found[network, batch, "SGD"]
        body.append([f"{network}, batch {batch:,}", f"{1000 * sgd['seconds']:.1f}", *ratios])
    header = ["", "an iteration of SGD, ms", "NSGD, k = 10, times that", "k = 20"]
    source = (
        f"Medians on one {rows[0]['device']}, bfloat16 autocast, channels last; from `benchmarks/results/step-cuda.csv`,\n"
        "made by `python benchmarks/step.py --device cuda`."
    )
    return f"{markdown(header, body)}\n\n{source}"


def claim() -> str:
    """What is made so far of the plan claim: the best of the trials of each method."""
    folder = RESULTS / "cifar10" / "claim" / "resnet-32-plain-1024"
    rows = read_csv(folder / "partial.csv")
    device = yaml.safe_load((folder / "environment.yaml").read_text())["device"]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        trials = [row for row in rows if row["method"] == method]
        best = min((row for row in trials if math.isfinite(row["val_loss"])), key=lambda row: row["val_loss"])
        lost = sum(not math.isfinite(row["val_loss"]) or row["train_loss"] > math.log(10) for row in trials)
        cells = [f"{best['lr']:.2g}", f"{lost} of {len(trials)}", f"{best['train_loss']:.2f}"]
        body.append([RECIPES[method].label, *cells, f"{100 * best['val_accuracy']:.1f}"])
    body.sort(key=lambda cells: float(cells[-1]))
    header = ["method", "best rate", "rates lost", "training loss", "validation accuracy, %"]
    source = (
        f"Partial: trials of one seed, {rows[0]['step']:.0f} steps, one {device}; no test accuracy or interval yet. Lost: no "
        "better than chance.\nFrom `benchmarks/results/cifar10/claim/`, made by `python benchmarks/cifar10.py --plan claim`."
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
    "README.md": {"picture": lambda: str(importlib.import_module("picture").caption()), "short": short, "claim": claim}
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
    "hvp": benchmark("hvp", "Medians of calls taken in turn.", lambda first: not first.endswith(", gradient")),
}


def rendered(document: str, found: str) -> str:
    """A document with every table made anew."""
    for name, table in TABLES[document].items():
        pattern = rf"(<!-- {name}: benchmarks/readme.py -->\n).*?(<!-- /{name} -->)"
        content = table()
        found, count = re.subn(pattern, lambda place, c=content: f"{place[1]}\n{c}\n\n{place[2]}", found, flags=re.S)
        if count != 1:
            raise ValueError(f"expected one place for the table {name} in {document}, got {count}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="check them instead of writing them")
    args = parser.parse_args()
    for document in TABLES:
        found = (ROOT / document).read_text(encoding="utf-8")
        wanted = rendered(document, found)
        if not args.smoke:
            (ROOT / document).write_text(wanted, encoding="utf-8")
        elif wanted != found:
            raise SystemExit(f"{document} is not what its tables are made from; run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
