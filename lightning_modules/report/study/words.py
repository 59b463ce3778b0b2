"""What a study's report says in sentences, every number of them from the study's files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import (
    SIGNIFICANT,
    aim,
    amount,
    and_,
    change_of,
    count,
    mean_of,
    seeds_of,
    test_of,
    upper,
)
from lightning_modules.report.study.rates import seeds_of_trials
from lightning_modules.report.study.tables import shown_measures
from lightning_modules.support.score import EVALUATED, Measure


def title(files: Files) -> str:
    """What was compared, on what."""
    config = files.config
    few = len(files.methods) <= 3
    methods = (
        ", ".join(files.label(m) for m in files.methods)
        if few
        else f"{files.label(files.base)} and {len(files.methods) - 1} other methods"
    )
    seeds = count(config["seeds"], "seed")
    return f"{methods} on {_data(files)}: {_net(files)}, {count(config['epochs'], 'epoch')}, {seeds}"


def _net(files: Files) -> str:
    model = files.config["model"]
    return str(files.config["net"]) if model is None else _class(model)


def _class(config: dict[str, Any]) -> str:
    return str(config["class_path"]).rpartition(".")[2]


def _data(files: Files) -> str:
    data = files.config["data"]
    if data is None:
        return "the module's own data"
    path = Path(str(_of_data(files, "path") or _class(data)))
    return path.name if path.is_absolute() else str(path)


def _of_data(files: Files, name: str) -> Any:
    """An option of our own data; of other classes it may mean anything."""
    data = files.config["data"]
    ours = data is not None and data["class_path"].startswith("lightning_modules.")
    return (data.get("init_args") or {}).get(name) if ours else None


# -- the summary ---------------------------------------------------------------------------------------------------


def summary(files: Files) -> list[str]:
    """Three sentences: what was compared, what came of it, and what it cost."""
    return [_compared(files), _result(files), _cost(files)]


def _compared(files: Files) -> str:
    config = files.config
    seeds = "one seed" if config["seeds"] == 1 else f"{config['seeds']} paired seeds"
    limit = _of_data(files, "limit")
    data = f"{limit:,} images of {_data(files)}" if limit else _data(files)
    kind = "the network" if config["model"] is None else "the module"
    trials = count(config["tune"], "quasi-random trial")
    tuned = (
        f"the settings of each are the best of {trials} by {files.criterion.label}{_untuned(files)}"
        if files.tuning
        else "their settings were given, and nothing was tuned"
    )
    return (
        f"{and_([files.label(m) for m in files.methods])} trained {kind} {_net(files)} on {data}, with {seeds} and "
        f"{count(config['epochs'], 'epoch')} each; {tuned}."
    )


def _result(files: Files) -> str:
    base, others = files.label(files.base), files.methods[1:]
    entries = {(e["method"], e["measure"]): e for e in files.summary if e["read_out"] == "last"}
    tested = any(not math.isnan(e["p_holm"]) for (m, _), e in entries.items() if m in others)
    clauses = []
    for method in others or [files.base]:
        shown = [(entries.get((method, m.column), {"n": 0}), m) for m in shown_measures(files)]
        measures = [_measured(entry, m, tested) for entry, m in shown if entry["n"]]
        label = files.label(method)
        clauses.append(f"{label} had {', and '.join(measures)}" if measures else f"every run of {label} failed")
    if not others:
        return f"With its last weights {clauses[0]}, with nothing to compare it with."
    untested = "one seed, so no tests" if files.config["seeds"] == 1 else "no test was possible"
    why = "paired t-tests, p corrected by Holm's method" if tested else untested
    return f"Against {base}, with the last weights of each, {'; '.join(clauses)} ({why})."


def _measured(entry: dict[str, Any], measure: Measure, tested: bool) -> str:
    """A measure of a method's last weights, with failed seeds, its change and what the test says of it."""
    change = change_of(entry, measure, words=True)
    facts = "; ".join(filter(None, [seeds_of(entry), "" if change == "diverged" else change]))
    mean = mean_of(entry, measure, interval=not change)  # one interval is enough: the change's, where there is one
    value = f"a {measure.label} that diverged" if mean == "diverged" else f"a {measure.label} of {mean}{measure.unit}"
    return f"{value}{f' ({facts})' if facts else ''}{f', {test_of(entry)}' if tested else ''}"


def _cost(files: Files) -> str:
    base, clauses = files.cost(files.base), []
    for method in files.methods:
        cost = files.cost(method)
        if cost is None:
            clauses.append(f"every run of {files.label(method)} died")
        elif base is None or method == files.base:
            took = f"{amount(cost['gradients'])} gradients and {amount(cost['seconds'])} seconds"
            clauses.append(f"a run of {files.label(method)} took {took}")
        else:
            gradients, seconds = (f"{cost[name] / base[name]:.2f}" for name in ("gradients", "seconds"))
            clauses.append(f"one of {files.label(method)} {gradients} and {seconds} times as many")
    if files.target is not None:
        reached = and_([_reached(files, method) for method in files.methods])
        clauses.append(f"{aim(files, files.target)} was reached in {reached}")
    return f"{upper('; '.join(clauses))}."


def _reached(files: Files, method: str) -> str:
    reached, runs, medians = files.to_target(method)
    took = f" (median {amount(medians['gradients'])} gradients, {amount(medians['seconds'])} seconds)"
    return f"{reached} of {runs} runs of {files.label(method)}{'' if math.isinf(medians['step']) else took}"


# -- how the numbers were made -------------------------------------------------------------------------------------


def notes(files: Files) -> str:
    """What the cells of the one table mean, what was tuned, and what was lost."""
    config, base = files.config, files.label(files.base)
    tuned = (
        f"learning rates are the best of {count(config['tune'], 'trial')} of each method{_untuned(files)}"
        if files.tuning
        else "learning rates are those of the study, not tuned in it"
    )
    under = (
        f"below it the {_changes(files, base)}; one seed, so no intervals and no tests"
        if config["seeds"] == 1
        else f"below it the {_changes(files, base)} with its 95 % interval: better or worse where that is "
        f"significant (paired t-test, Holm, p < {SIGNIFICANT:g}), n.s. where it is not"
    )
    ratios = any(files.effect(m) == "ratio" for m in shown_measures(files))
    mean = f"the mean{' (of losses the geometric one)' if ratios else ''}"
    cells = f" Upper line: {mean} over {count(config['seeds'], 'seed')}; {under}." if files.methods[1:] else ""
    reach = "A run" if files.target is None else f"To {aim(files, files.target)}, and a run"
    reach = f" {reach}: medians over seeds." if config["seeds"] > 1 else ""
    control = " A control gets what NSGD gets, but for the sharpest directions." if _controls(files) else ""
    words = f"{upper(tuned)}.{cells}{control}{reach}{_one_by_one(files)}{_fallen_back(files)}{_lost(files)}"
    return " ".join(filter(None, [endpoint(files), words]))


def endpoint(files: Files) -> str:
    """What the study is judged by, where its file says so."""
    if "endpoint" not in files.config:
        return ""
    what = f"{files.endpoint.label} ({files.endpoint.column}) of the last weights"
    return f"Endpoint, fixed before the runs: {what}. All else is secondary."


def _changes(files: Files, base: str) -> str:
    """What changes from the first method are."""
    effects = {files.effect(measure) for measure in shown_measures(files)}
    if effects == {"difference"}:
        return f"difference to {base}"
    return f"ratio to {base}" if effects == {"ratio"} else f"change from {base} (of losses a ratio)"


def _one_by_one(files: Files) -> str:
    """Whose seconds are more than they need be."""
    labels = and_([files.label(method) for method in files.one_by_one])
    return (
        f" {labels}: gradients of samples were taken one by one, since torch.func.vmap could not take this "
        "training_step (torchmetrics in it, for one) or its batch; at once they take fewer seconds, which a "
        "curvature_loss(batch) without these allows."
        if labels
        else ""
    )


def _fallen_back(files: Files) -> str:
    """Which losses have no ratio."""
    fallen = [
        measure.label
        for measure in files.measures
        if measure.effect == "ratio"
        and any(
            row.get(measure.column, 1) <= 0 for row in files.results if row["seed"] not in files.failed[row["method"]]
        )
    ]
    return f" Not compared as a ratio, for a value is not above 0: {and_(fallen)}." if fallen else ""


def _untuned(files: Files) -> str:
    """Which methods had nothing to tune, as the end of a sentence on those that had."""
    tuned = {row["method"] for row in files.tuning}
    own = [m for m in files.methods if m not in tuned and m.removesuffix("-more") not in tuned]
    return f", but for {and_([files.label(m) for m in own])}, not tuned" if own else ""


def _controls(files: Files) -> bool:
    return any(files.styles[method].control for method in files.methods)


def caption(files: Files) -> str:
    """Seeds, intervals, tests, learning rates, batch size, threads, units, and what became of the runs."""
    config = files.config
    rates = ", ".join(
        f"{files.label(m)} {files.settings[m]['lr']:g}" for m in files.methods if "lr" in files.settings[m]
    )
    tuned = (
        f"tuned: the best of {count(config['tune'], 'trial')} of each by {files.criterion.label}, from a scrambled "
        f"Halton sequence, run with {seeds_of_trials(files)}{_untuned(files)}"
        if files.tuning
        else "given, not tuned"
    )
    batch = _of_data(files, "batch_size")
    size = ("" if batch is None else f"; batch size {batch}") + _of_their_own(files)
    test = config.get("limit_test")  # which studies of before did not have
    tested = (
        "what is validated and tested on all"
        if test is None
        else (
            f"what is validated on all, and what is tested on the first {'batch' if test == 1 else f'{test} batches'}"
        )
    )
    return (
        f"{_intervals(files)}. Learning rates: {rates or 'of the module itself'} ({tuned}){size}; threads: "
        f"{config['threads']}. "
        "One gradient is a forward and backward pass on a training batch, and refreshes are counted in; seconds are "
        "those of training without validation and measurements; an optimizer's state is what it holds between steps, "
        "in multiples of the parameters. Averages are read-outs of the same runs; training "
        f"losses are taken on at most {EVALUATED:,} samples, {tested}.{_optimizers(files)}{_lost(files)}"
    )


def _of_their_own(files: Files) -> str:
    """Which methods have other batches, epochs or gradients than what is said of all."""
    entries = zip(files.styles, files.config["methods"], strict=True)
    keys = ("batch_size", "epochs", "noise")
    names = [files.label(name) for name, entry in entries if isinstance(entry, dict) and any(map(entry.get, keys))]
    return f" ({and_(names)}: batches, epochs or noise of their own, and gradients of such batches)" if names else ""


def _optimizers(files: Files) -> str:
    """What became of the optimizer of a module that is not ours."""
    if files.config["model"] is None:
        return ""
    kept = [files.label(m) for m in files.methods if "lr" not in files.settings[m]]  # its rate is the module's
    if not kept:
        return " Each method's optimizer took the place of the module's own and of its schedules and callbacks."
    return (
        f" But for {' and '.join(kept)}, each method's optimizer took the place of the module's own and of its "
        "schedules; its callbacks were left out of all runs."
    )


def _intervals(files: Files) -> str:
    if files.config["seeds"] == 1:
        return "One seed, so no intervals and no tests"
    ratios = any(files.effect(measure) == "ratio" for measure in files.measures)
    losses = "; of losses geometric means with the ends of theirs, and ratios" if ratios else ""
    means = f"Means over {files.config['seeds']} paired seeds ± half of the 95 % t-interval{losses}"
    if all(math.isnan(entry["p_holm"]) for entry in files.summary):
        return means
    untested = any(math.isnan(entry["p_holm"]) for entry in files.summary if entry["method"] != files.base)
    why = "; there is no test of fewer than two pairs, or where all are the same" if untested else ""
    needed = any(not math.isnan(entry["seeds_to_show"]) for entry in files.summary)
    seeds = (
        "; seeds to show it: as many as find a change of that size and spread in four of five studies, by a paired "
        f"t-test at 5 % over the number of methods compared with {files.label(files.base)}"
    )
    return (
        f"{means}; p-values of paired t-tests, corrected by Holm's method for the methods compared with "
        f"{files.label(files.base)} at the same read-out and measure{why}{seeds if needed else ''}"
    )


def _lost(files: Files) -> str:
    """What failed, and what of it died."""
    failed = [f"{files.label(m)} {len(seeds)} of {files.config['seeds']}" for m, seeds in files.failed.items() if seeds]
    out = ", and are in no mean and no test" if any(entry["failed"] for entry in files.summary) else ""
    words = (
        f" Runs that failed{out}: {', '.join(failed)} (died, or ended with a training loss that is not below the "
        "least of the first batches)."
        if failed
        else ""
    )
    return words + (f" Runs that died: {', '.join(files.deaths)}." if files.deaths else "")
