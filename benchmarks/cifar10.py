"""What NSGD does on CIFAR-10, beside what a user would pick instead: plans of studies that `nsgd compare` makes.

A plan is a file in benchmarks/configs/cifar10: options that its studies share, and the studies, each with its own. The
plans named -scaled are the same questions at a size for two cores of a CPU. A run that takes more than half a minute
goes on from the end of its last epoch, so that minutes on a machine add up, today and another day:

    python benchmarks/cifar10.py --plan batch --dry                              # what it costs, on a GPU
    python benchmarks/cifar10.py --plan batch --minutes 9 --jobs 12              # begins, or goes on where it stopped
    python benchmarks/cifar10.py --plan batch-scaled --data PATH_OR_HUB_NAME     # hours on two cores
    python benchmarks/cifar10.py --smoke                                         # seconds, on digits, keeps nothing

Runs and pages lie in --runs, one folder a study; what is finished is copied to benchmarks/results/cifar10, with the
resolved configuration and the environment. Runs side by side (--jobs) share a device: their seconds say nothing. Those
of the plan "seconds" are alone, one after the other: it prints seconds a step by method, and keeps them in seconds.csv.
On a GPU runs are in bfloat16 where autocast has it.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import groupby, islice, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml
from common import RESULTS, print_table

from lightning_modules.commands.sigterm import CODE as TERMINATED
from lightning_modules.commands.sigterm import Terminated, raising_at_sigterm
from lightning_modules.report.measurements.numbers import by_step, value_of
from lightning_modules.report.measurements.report import measured
from lightning_modules.report.measurements.valley import bursts
from lightning_modules.study.options import Study
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows, read_csv, write_csv
from lightning_modules.support.read_outs import average
from lightning_modules.support.study_folder import StudyFolder

PLANS = Path(__file__).parent / "configs" / "cifar10"
HUB = "uoft-cs/cifar10"
IMAGES = 50_000  # of training
KEPT = (
    "config.yaml",
    "environment.yaml",
    "methods.yaml",
    "settled.yaml",
    "results.csv",
    "summary.csv",
    "tuning.csv",
    "sweep.csv",
)
COUNTS = (
    "methods",
    "tune",
    "seeds",
    "search",
    "sweep",
    "sweep_points",
    "sweep_seeds",
)  # options that say which runs there are
# Options that are not the study's: of a GPU's iteration by SGD, and whether runs are timed, each alone on its device.
OURS = ("milliseconds", "alone")
# An iteration by a method beside one by SGD, on an H100; what is not here takes about as long.
COSTS = {"gradients": 4.3, "lanczos": 20.0, "sam": 2.0}
TOGETHER = 0.6  # seconds of twelve runs side by side, beside those of one after the other, on an H100
SMOKE = {"epochs": 2, "seeds": 1, "sweep_points": 2, "sweep_seeds": 1, "target": None}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Options with others over them; mappings are merged, anything else is replaced."""
    both = {name: merged(base[name], over[name]) for name in base.keys() & over.keys() if _nested(base, over, name)}
    return {**base, **over, **both}


def _nested(base: Mapping[str, Any], over: Mapping[str, Any], name: str) -> bool:
    return isinstance(base[name], Mapping) and isinstance(over[name], Mapping)


def read_plan(name: str) -> dict[str, dict[str, Any]]:
    """The studies of a plan by name, each with all its options, also those that are ours: ``OURS``."""
    plan = yaml.safe_load((PLANS / f"{name}.yaml").read_text())
    if like := plan.get("like"):
        base = yaml.safe_load((PLANS / f"{like}.yaml").read_text())
        plan = {"common": merged(base["common"], plan["common"]), "studies": plan.get("studies", base["studies"])}
    return {study: merged(plan["common"], options or {}) for study, options in plan["studies"].items()}


def study_config(options: Mapping[str, Any], data: str, *, smoke: bool) -> dict[str, Any]:
    """A study as `nsgd compare` takes it, on CIFAR-10 that lies at a path, or on digits."""
    config = {name: value for name, value in options.items() if name not in OURS}
    ours = config["data"]["class_path"] == "HuggingFace"
    if smoke:
        config = _small(_of_few_steps(config)) | SMOKE | {"tune": min(1, config.get("tune", 0))}
        if not ours:
            return config | {"epochs": 1, "model": merged(config["model"], {"init_args": {"dim": 8, "depth": 1}})}
        batch = min(64, config["data"]["init_args"]["batch_size"])
        digits = {"class_path": "Digits", "init_args": {"batch_size": batch, "limit": 300}}
        return config | {"data": digits, "net": "mlp", "sizes": {"hidden": [16]}}
    if ours:
        config["data"] = merged(config["data"], {"init_args": {"path": data}})
    return config | ({"precision": "bf16-mixed"} if torch.cuda.is_available() else {})


def _of_few_steps(config: Mapping[str, Any]) -> dict[str, Any]:
    """A study without averages of points further apart than a smoke run is long, and without runs like them."""

    def fits(name: str | None) -> bool:
        return name is None or average(name).kind != "two-point" or average(name).value < 4

    def scheduled(method: str | Mapping[str, Any]) -> str | None:
        return None if isinstance(method, str) else (method.get("schedule") or {}).get("average")

    averages = {"averages": [name for name in config["averages"] if fits(name)]} if "averages" in config else {}
    return {**config, "methods": [method for method in config["methods"] if fits(scheduled(method))], **averages}


def _small(config: Mapping[str, Any]) -> dict[str, Any]:
    """A study whose variants are as short as the others, of batches, refreshes and samples that a smoke run has."""

    def small(method: str | Mapping[str, Any]) -> str | dict[str, Any]:
        if isinstance(method, str):
            return method
        size = {"batch_size": min(64, method["batch_size"])} if isinstance(method.get("batch_size"), int) else {}
        return {**method, **size, **({"epochs": 2} if "epochs" in method else {})}

    nsgd = {"nsgd": {**config["nsgd"], "warmup_steps": 1}} if "warmup_steps" in config.get("nsgd", {}) else {}
    measured = {"measure_samples": 16} if "measure_samples" in config else {}
    return {**config, **nsgd, **measured, "methods": [small(method) for method in config["methods"]]}


def make_plan(args: argparse.Namespace, studies: Mapping[str, dict[str, Any]], runs: Path, deadline: float) -> bool:
    """Make the studies of a plan, for a smoke run the first, as far as time allows; whether all are made."""
    for name, options in islice(studies.items(), 1 if args.smoke else None):
        file, folder = runs / f"{name}.yaml", runs / name
        runs.mkdir(parents=True, exist_ok=True)
        config = study_config(options, args.data, smoke=args.smoke)
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        print(f"{args.plan}: {name}", flush=True)
        command = [sys.executable, "-m", "lightning_modules", "compare", str(file), "--out", str(folder)]
        with subprocess.Popen([*command, "--jobs", str(args.jobs)]) as process:
            try:
                code = process.wait(None if math.isinf(deadline) else max(1.0, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, Terminated):
                process.terminate()
                code = process.wait()
        if code == TERMINATED:
            print(f"{args.plan}: {name} is not finished; the same command goes on", flush=True)
            return False
        if code:
            raise SystemExit(code)
    return True


def keep(runs: Path, results: Path) -> None:
    """Copy what is finished of the studies of a plan, without the path of the data, and of others the runs so far."""
    for folder in sorted(path.parent for path in runs.glob("*/config.yaml")):
        to = results / folder.name
        to.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (folder / name).exists():
                (to / name).write_text(_public((folder / name).read_text(), folder))
        for name, rows in (("curves", list(curves(folder))), ("paths", list(paths(folder)))):
            if rows:
                write_csv(to / f"{name}.csv", rows)
        partial = to / "partial.csv"
        if (folder / "results.csv").exists():
            partial.unlink(missing_ok=True)
        else:
            write_csv(partial, [{"run": name, **row} for name, rows in _finished(folder) for row in rows])


def _public(text: str, folder: Path) -> str:
    """A file of a study with the data's name on the hub in place of the path where they lay."""
    path = (yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"] or {}).get("path")
    return text if path is None else text.replace(str(path), HUB)


def _finished(folder: Path) -> Iterator[tuple[str, Rows]]:
    for path in sorted(folder.glob("*/*/results.csv")):
        yield f"{path.parent.parent.name}/{path.parent.name}", read_csv(path)


def curves(folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each epoch of each run that counts: its mean training loss, what was spent and validated at its end.

    Args:
        folder: Of a study.
    """
    study = StudyFolder(folder)
    for path in sorted(folder.glob("runs/*/metrics.csv")):
        run = study.run(f"runs/{path.parent.name}")
        about = {name: run.settings()[name] for name in ("method", "seed")}
        for epoch, rows in groupby(run.steps(), key=lambda row: row["epoch"]):
            of_epoch = list(rows)
            last = of_epoch[-1]
            scores = {name: value for name, value in last.items() if name.startswith("val_") and value is not None}
            spent = {name: last[name] for name in ("step", "gradients", "seconds")}
            yield {**about, "epoch": epoch, "loss": fmean(float(row["loss"]) for row in of_epoch), **spent, **scores}


def paths(folder: Path) -> Iterator[dict[str, Any]]:
    """What was measured along the first run of each method: the sharpness, and each burst of steps in the valley.

    Args:
        folder: Of a study.
    """
    for path in sorted(folder.glob("runs/*-0")):
        run = StudyFolder(folder).run(f"runs/{path.name}")
        if not run.finished:
            continue
        method, rows = run.settings()["method"], measured(path)
        sharpness = rows.get(quantities.SHARPNESS, [])
        top = by_step(sharpness, quantities.EIGENVALUE, quantities.eigenvector(1))
        limits = by_step(sharpness, quantities.STABILITY_LIMIT)
        for step, value in top.items():
            samples = value_of(sharpness, quantities.EVALUATION_SAMPLES)
            yield {"method": method, "step": step, "lambda_1": value, "limit": limits.get(step), "samples": samples}
        for burst in bursts(rows.get(quantities.VALLEY, [])):
            yield {"method": method, **burst}


def seconds_a_step(folder: Path) -> Rows:
    """Medians over the runs of each method of a finished study, of the median step and of the mean one.

    The mean has what comes now and then, such as refreshes. The first epoch is left out: it warms up.

    Args:
        folder: Of a study whose runs were alone on their device.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.glob("runs/*/metrics.csv")):
        run = StudyFolder(folder).run(f"runs/{path.parent.name}")
        rows = run.steps()
        steps = [now["seconds"] - before["seconds"] for before, now in pairwise(rows) if now["epoch"] > 0]
        found.setdefault(run.settings()["method"], []).append((median(steps), fmean(steps)))
    methods = yaml.safe_load((folder / "methods.yaml").read_text())
    of = {
        method: [median(values) for values in zip(*found[method], strict=True)] for method in methods if method in found
    }
    base = next(iter(of.values()))  # the first, where its runs did not die
    return [
        {
            **{"method": method, "runs": len(found[method]), "median": middle, "mean": mean},
            **{"median_over_base": middle / base[0], "mean_over_base": mean / base[1]},
        }
        for method, (middle, mean) in of.items()
    ]


def keep_seconds(runs: Path, results: Path) -> None:
    """Keep and print the seconds a step of the finished studies of a plan."""
    for folder in sorted(path.parent for path in runs.glob("*/results.csv")):
        rows = seconds_a_step(folder)
        write_csv(results / folder.name / "seconds.csv", rows)
        base = rows[0]["method"]
        head = (f"{folder.name}, ms a step", "median", "mean", f"median over {base}'s", "mean over it")
        body = [
            [row["method"], *(f"{1000 * row[name]:.2f}" for name in ("median", "mean"))]
            + [f"{row[f'{name}_over_base']:.2f}" for name in ("median", "mean")]
            for row in rows
        ]
        print_table(head, body)


def print_costs(whole: str, studies: Mapping[str, dict[str, Any]]) -> None:
    """Runs, steps and GPU minutes of studies, and of the whole that they are."""
    body, minutes = [], 0.0
    for name, options in studies.items():
        study = Study(data=None, **{key: options[key] for key in COUNTS if key in options})
        runs, milliseconds, usual = (
            plan_runs(study),
            options["milliseconds"],
            options["data"]["init_args"]["batch_size"],
        )
        steps, iterations = steps_of(options), 0.0
        for run in runs:
            recipe = study.recipes[run.method]
            size = _images(options) if recipe.batch_size == "all" else recipe.batch_size or usual
            own = {"epochs": recipe.epochs or options["epochs"], "data": _of_batches(options["data"], size)}
            # An iteration takes as long as its batch is large, and no less than a launch-bound one.
            iterations += steps_of({**options, **own}) * _relative(study, run.method, options) * max(1.0, size / usual)
        cost = iterations * milliseconds / 60_000
        minutes += cost
        counts = [str(len(runs)), str(steps), f"{milliseconds:g}"]
        body.append([name, *counts, f"{cost:.0f}", f"{cost * TOGETHER:.0f}"])
    body.append([f"{whole} in all", "", "", "", f"{minutes:.0f}", f"{minutes * TOGETHER:.0f}"])
    head = ("study", "runs", "steps a run", "ms an iteration of SGD", "GPU minutes, one by one", "12 side by side")
    print_table(head, body)


def steps_of(options: Mapping[str, Any]) -> int:
    """Steps of a run on CIFAR-10, or on a text of Python's length."""
    return int(options["epochs"]) * (_images(options) // int(options["data"]["init_args"]["batch_size"]))


def _images(options: Mapping[str, Any]) -> int:
    """Samples of the training split."""
    given = options["data"]["init_args"]
    if options["data"]["class_path"] == "HuggingFace":
        images = given.get("limit") or IMAGES
        return int(images - math.ceil(images * given.get("val_fraction", 0.2)))
    return int(round(0.8 * 460_000) // given.get("context", 64))


def _of_batches(data: Mapping[str, Any], size: int) -> dict[str, Any]:
    return {**data, "init_args": {**data["init_args"], "batch_size": size}}


def _relative(study: Study, method: str, options: Mapping[str, Any]) -> float:
    recipe = study.recipes[method]
    solver = "" if recipe.damping is None else str({**options.get("nsgd", {}), **recipe.damping}.get("solver", ""))
    return COSTS.get(solver, COSTS["sam"] if (recipe.like or method) == "sam" else 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plans = sorted(path.stem for path in PLANS.glob("*.yaml"))
    parser.add_argument("--plan", choices=plans, default="batch", help="default: batch")
    parser.add_argument("--study", metavar="NAME", help="make this study of the plan alone (default: all of them)")
    parser.add_argument("--data", default=HUB, help="CIFAR-10: a hub name or a local folder")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("cifar10-runs"), help="folder of runs and pages")
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar10", help="folder of what is kept")
    parser.add_argument("--dry", action="store_true", help="print what the plan costs on a GPU, and make nothing")
    parser.add_argument("--smoke", action="store_true", help="seconds, on digits, claims nothing")
    args = parser.parse_args()
    studies = read_plan(args.plan)
    if args.study not in (None, *studies):
        parser.error(f"expected --study to be one of the plan {args.plan}: {', '.join(studies)}; got {args.study}")
    if args.study:
        studies = {args.study: studies[args.study]}
    if args.dry:
        print_costs(args.study or args.plan, studies)
        return
    if not args.minutes > 0 or args.jobs < 1:
        parser.error(f"expected --minutes above 0 and --jobs of at least 1, got {args.minutes:g} and {args.jobs}")
    alone = any(options.get("alone") for options in studies.values())
    if alone and args.jobs > 1:
        parser.error(f"expected --jobs 1 with the plan {args.plan}, each run of which is timed alone, got {args.jobs}")
    deadline = time.monotonic() + 60 * args.minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as passing:
        runs, out = args.runs / args.plan, args.out / args.plan
        if args.smoke and args.runs == parser.get_default("runs"):
            runs, out = Path(passing) / "runs", Path(passing) / "out"
        with raising_at_sigterm():
            made = make_plan(args, studies, runs, deadline)
            keep(runs, out)
            if alone:
                keep_seconds(runs, out)
            print(f"{args.plan}: {'all is made' if made else 'stopped'}; {out}", flush=True)


if __name__ == "__main__":
    main()
