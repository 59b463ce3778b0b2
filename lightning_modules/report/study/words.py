"""What a study's report says in sentences, every number of them from the study's files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_modules.report.study.files import READ_OUTS, Files, damps, label
from lightning_modules.report.study.tables import (
    SIGNIFICANT,
    aim,
    amount,
    difference_of,
    mean_of,
    shown_measures,
    upper,
    verdict,
)
from lightning_modules.study.methods import Method
from lightning_modules.support.score import COSTS, EVALUATED, Measure


def title(files: Files) -> str:
    """What was compared, on what."""
    config = files.config
    methods, seeds = ", ".join(label(m) for m in files.methods), _count(config["seeds"], "seed")
    return f"{methods} on {_data(files)}: {_net(files)}, {_count(config['epochs'], 'epoch')}, {seeds}"


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


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
    trials = _count(config["tune"], "quasi-random trial")
    tuned = (
        f"the settings of each are the best of {trials} by {files.criterion.label}"
        if config["tune"]
        else "their settings were given, and nothing was tuned"
    )
    return (
        f"{_and([label(m) for m in files.methods])} trained {kind} {_net(files)} on {data}, with {seeds} and "
        f"{_count(config['epochs'], 'epoch')} each; {tuned}."
    )


def _subjects(files: Files) -> list[Method]:
    """Whose result is the main one: the methods of NSGD's kind, or where there is none, all but the first."""
    return files.judged or files.methods[1:]


def _result(files: Files) -> str:
    base, subjects = label(files.base), _subjects(files)
    entries = {(e["method"], e["measure"]): e for e in files.summary if e["read_out"] == "last"}
    tested = any(not math.isnan(e["p_holm"]) for (m, _), e in entries.items() if m in subjects)
    said = []
    for method in subjects or [files.base]:
        measures = [
            _measured(entries[method, m.column], m, tested) for m in shown_measures(files) if files.last(method)
        ]
        said.append(
            f"{label(method)} had {', and '.join(measures)}" if measures else f"no run of {label(method)} survived"
        )
    if not subjects:
        return f"With its last weights {said[0]}, with nothing to compare it with."
    untested = "one seed, so no tests" if files.config["seeds"] == 1 else "no test was possible"
    why = "paired t-tests, p corrected by Holm's method" if tested else untested
    return f"Against {base}, with the last weights of each, {'; '.join(said)} ({why})."


def _measured(entry: dict[str, Any], measure: Measure, tested: bool) -> str:
    """A measure of a method's last weights, with its difference and what the test says of it."""
    difference = difference_of(entry, measure)
    by = f" ({difference}{measure.difference_unit})" if difference not in ("", "diverged") else ""
    # One interval is enough: the difference's, where there is one.
    mean = mean_of({**entry, "half_width": math.nan} if by else entry, measure)
    value = f"a {measure.label} that diverged" if mean == "diverged" else f"a {measure.label} of {mean}{measure.unit}"
    return f"{value}{by}{f', {verdict(entry)}' if tested else ''}"


def _cost(files: Files) -> str:
    base, shown = files.cost(files.base), [files.base, *_subjects(files)]
    said = []
    for method in shown:
        cost = files.cost(method)
        if cost is None:
            said.append(f"no run of {label(method)} survived")
        elif base is None or method == files.base:
            took = f"{amount(cost['gradients'])} gradients and {amount(cost['seconds'])} seconds"
            said.append(f"a run of {label(method)} took {took}")
        else:
            gradients, seconds = (f"{cost[name] / base[name]:.2f}" for name in ("gradients", "seconds"))
            said.append(f"one of {label(method)} {gradients} and {seconds} times as many")
    if files.target is not None:
        reached = _and([_reached(files, method) for method in shown])
        said.append(f"{aim(files, files.target)} was reached in {reached}")
    sentence = "; ".join(said)
    return f"{upper(sentence)}."


def _reached(files: Files, method: Method) -> str:
    reached, runs, medians = files.to_target(method)
    took = f" (median {amount(medians['gradients'])} gradients, {amount(medians['seconds'])} seconds)"
    return f"{reached} of {runs} runs of {label(method)}{'' if math.isinf(medians['step']) else took}"


# -- where NSGD did not help ---------------------------------------------------------------------------------------


def shortfalls(files: Files) -> list[str]:
    """For each method of NSGD's kind, where it was not significantly better than the first method, or dearer."""
    base = label(files.base)
    if not files.judged and damps(files.base):
        return [f"{base} is what others are compared with here, and so is not judged; for that put another first."]
    if not files.judged:
        return ["No method of this study damps the sharpest directions, so there is nothing to say of NSGD."]
    rule = (
        "Listed is every read-out and measure in which a method that damps the sharpest directions was not "
        f"significantly better than {base}, and every cost in which it was dearer."
    )
    return [rule, *(_shortfalls_of(files, method) for method in files.judged)]


def _shortfalls_of(files: Files, method: Method) -> str:
    own, seeds, last = label(method), files.config["seeds"], files.last(method)
    if not last:
        return f"{own}. None of its runs survived."
    found = [_not_better(files, method, measure) for measure in files.measures]
    found += [_dearer(files, method), _slower(files, method)]
    diverged = sum(not math.isfinite(row["train_loss"]) for row in last)
    found += [
        f"Of {_count(seeds, 'run')} {n} {how}." for n, how in ((seeds - len(last), "died"), (diverged, "diverged")) if n
    ]
    said = " ".join(words for words in found if words)
    none = f"In every read-out and measure it was significantly better than {label(files.base)}, and in no cost dearer."
    return f"{own}. {said or none}"


def _not_better(files: Files, method: Method, measure: Measure) -> str:
    name = measure.label
    kinds: dict[str, list[str]] = {}
    for entry in files.entries(measure.column):
        kind = _shortfall(entry, measure, label(files.base))
        if entry["method"] == method and kind:
            difference = difference_of(entry, measure)
            size = f"{difference}{measure.difference_unit}" if difference not in ("", "diverged") else difference
            p = "" if math.isnan(entry["p_holm"]) else f"p = {entry['p_holm']:.2g}"
            reason = ", ".join(part for part in (size, p) if part)
            kinds.setdefault(kind, []).append(READ_OUTS[entry["read_out"]] + (f" ({reason})" if reason else ""))
    said = "; ".join(f"{kind} with the {_and(places)} weights" for kind, places in kinds.items())
    return f"{upper(name)}: {said}." if said else ""


def _shortfall(entry: dict[str, Any], measure: Measure, base: str) -> str:
    """In what way a method was not significantly better; empty where it was."""
    if math.isnan(entry["p_holm"]):
        return "no test"
    if entry["p_holm"] >= SIGNIFICANT:
        return "no significant difference"
    better = (entry["difference"] < 0) if measure.lower_is_better else (entry["difference"] > 0)
    return "" if better else f"significantly worse than {base}"


def _dearer(files: Files, method: Method) -> str:
    own, base = files.cost(method), files.cost(files.base)
    if own is None or base is None:
        return ""
    more = [
        f"{own[name] / base[name]:.2f} times the {name} ({amount(own[name])} against {amount(base[name])})"
        for name in ("gradients", "seconds")
        if own[name] > base[name]
    ]
    return f"A run took {_and(more)} of {label(files.base)}." if more else ""


def _slower(files: Files, method: Method) -> str:
    """Where the target cost more, or was reached less often."""
    if files.target is None:
        return ""
    (reached, runs, own), (base_reached, base_runs, base) = files.to_target(method), files.to_target(files.base)
    aimed, said = aim(files, files.target), ""
    if math.isinf(own["step"]) or reached < base_reached:
        reference = f"with {label(files.base)} in {base_reached} of {base_runs}"
        said = f"{upper(aimed)} was reached in {reached} of {runs} runs, {reference}."
    names = {"step": "steps", "gradients": "gradients", "seconds": "seconds"}
    more = [
        f"{names[name]} (median {amount(own[name])} against {amount(base[name])})"
        for name in COSTS
        if base[name] < own[name] < math.inf
    ]
    return f"{said} To {aimed} it took more {_and(more)}.".strip() if more else said


# -- how the numbers were made -------------------------------------------------------------------------------------


def caption(files: Files) -> str:
    """Seeds, intervals, tests, learning rates, batch size, threads, units, and what became of the runs."""
    config = files.config
    rates = ", ".join(f"{label(m)} {files.settings[m]['lr']:g}" for m in files.methods if "lr" in files.settings[m])
    tuned = (
        f"tuned: the best of {_count(config['tune'], 'trial')} of each by {files.criterion.label}, from a scrambled "
        f"Halton sequence, run with seed {files.tuning_seed}"
        if config["tune"]
        else "given, not tuned"
    )
    batch = _of_data(files, "batch_size")
    size = "" if batch is None else f"; batch size {batch}"
    own = (
        ""
        if config["model"] is None
        else (" Each method's optimizer took the place of the module's own and of its schedules and callbacks.")
    )
    return (
        f"{_intervals(files)}. Learning rates: {rates} ({tuned}){size}; threads: {config['threads']}. "
        "One gradient is a forward and backward pass on a training batch, and refreshes are counted in; seconds are "
        "those of training without validation and measurements. Averages are read-outs of the same runs; training "
        f"losses are taken on at most {EVALUATED:,} samples, what is validated and tested on all.{own}{_lost(files)}"
    )


def _intervals(files: Files) -> str:
    if files.config["seeds"] == 1:
        return "One seed, so no intervals and no tests"
    means = f"Means over {files.config['seeds']} paired seeds ± half of the 95 % t-interval"
    if all(math.isnan(entry["p_holm"]) for entry in files.summary):
        return means
    untested = any(math.isnan(entry["p_holm"]) for entry in files.summary if entry["method"] != files.base)
    why = "; there is no test where the difference is the same for every seed, or a run diverged" if untested else ""
    return (
        f"{means}; p-values of paired t-tests, corrected by Holm's method for the methods compared with "
        f"{label(files.base)} at the same read-out and measure{why}"
    )


def _lost(files: Files) -> str:
    """What died, and for how many seeds the loss of the last weights is not finite."""
    counts = {m: sum(not math.isfinite(row["train_loss"]) for row in files.last(m)) for m in files.methods}
    diverged = ", ".join(f"{label(m)} {n} of {len(files.last(m))}" for m, n in counts.items() if n)
    chance = "; their accuracy is that of chance" if files.config["model"] is None else ""
    said = f" Runs that diverged: {diverged}{chance}." if diverged else ""
    return said + (f" Runs that died, and are left out: {', '.join(files.deaths)}." if files.deaths else "")
