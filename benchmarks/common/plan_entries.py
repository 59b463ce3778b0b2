"""What a document shows of a study of a plan: what was compared, what came of it, a table, and where it comes from."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from common.documents import markdown, wrapped
from common.plans import Kept
from lightning_modules.report.study.averages import averages_by_method, averages_tables
from lightning_modules.report.study.numbers import (
    MISSING,
    SIGNIFICANT,
    amount,
    and_,
    change_of,
    count,
    mean_of,
    test_of,
    upper,
)
from lightning_modules.report.study.rates import at_the_edge, sensitivity_table
from lightning_modules.report.study.tables import STATE
from lightning_modules.report.study.verdict import judgement
from lightning_modules.report.study.words import endpoint, title
from lightning_modules.support.files import Rows
from lightning_modules.support.quantities import DISTANCE, FROBENIUS, LAMBDA_1
from lightning_modules.support.score import TRAIN_LOSS

# What the papers say of the question of a plan.
PUBLISHED = {
    "walk": (
        "Published ([1802.08770](https://arxiv.org/abs/1802.08770)): the loss between iterates is nearly convex, with "
        "its floor in between; along the floor there are barriers. A large rate keeps the height above it, a small "
        "batch explores, and both go further from the start."
    ),
    "averages": (
        "Published ([2301.02312](https://arxiv.org/abs/2301.02312)): to first order an average of the weights equals a "
        "schedule of the rate; the mean of two points far apart is clearly better than the last."
    ),
    "paper": (
        "Published ([1807.05031](https://arxiv.org/abs/1807.05031)): less of the step along the sharpest directions "
        "can speed training up, and end where the loss is sharper and the network generalises better."
    ),
}
_NEAR = 4  # column of the table of rates
_EDGE = "*: the lowest or the highest of its trials, so that a better rate may lie beyond."


def study_entry(kept: Kept, drawing: str) -> str:
    """A heading, the table with its source, and the figure where there is one.

    Args:
        drawing: Its path from the document.
    """
    heading = wrapped(f"**{upper(kept.plan)}, {kept.folder.name}.** {title(kept.files)}{_data(kept)}. {_said(kept)}")
    picture = f"![{_alt(kept)}]({drawing})" if kept.has_figure else ""
    return "\n\n".join(filter(None, [heading, study_table(kept), picture]))


def study_table(kept: Kept) -> str:
    """Methods down, and below it where it comes from."""
    body, words = _results(kept) if kept.finished else _trials(kept)
    source = (
        f"From `benchmarks/results/cifar10/{kept.plan}/`, made by `python benchmarks/cifar10.py --plan {kept.plan}`."
    )
    published = PUBLISHED.get(kept.plan.removesuffix("-scaled"), "")
    below = wrapped(" ".join(filter(None, [words, source, published])))
    return "\n\n".join(filter(None, [body, *_spectrum(kept), *_averages(kept), *_paths(kept), below]))


def _said(kept: Kept) -> str:
    """What it says: of the methods that damp against the first, and which of all came out best."""
    if not kept.finished:
        return "Not finished: trials that choose the rates, and nothing to judge by yet."
    files, measure = kept.files, kept.files.endpoint
    if kept.swept_alone:
        widths = [f"{row[0]} {row[_NEAR]}" for row in sensitivity_table(files)["rows"]]
        return f"Decades of rates within 10 % of a method's best mean training loss: {and_(widths)}."
    ends = {method: kept.entries[measure.column, method] for method in files.methods}
    means = {method: measure.badness({measure.column: end["mean"]}) for method, end in ends.items() if end["n"]}
    best = min(means, key=lambda method: means[method], default=None)
    if best is None:
        return judgement(files)
    kind = "Lowest" if measure.lower_is_better else "Highest"
    mean = mean_of(ends[best], measure, interval=False)
    return f"{judgement(files)} {kind} of all: {files.label(best)}, {mean}{measure.unit}."


def _data(kept: Kept) -> str:
    """The sizes of the network and of the task, as the end of a sentence."""
    given = kept.files.config["data"]["init_args"] or {}
    sizes = (kept.files.config.get("sizes") or {}).items()
    parts = [
        *(f"{name} {value}" for name, value in sizes),
        f"{given['limit']:,} images" if given.get("limit") else "",
        f"at {given['side']} x {given['side']} pixels" if given.get("side") else "",
        f"batches of {given['batch_size']:,}" if given.get("batch_size") else "",
        "crops and flips" if given.get("augment") else "",
    ]
    return "".join(f", {part}" for part in parts if part)


def _alt(kept: Kept) -> str:
    """Its figure, for those who do not see it."""
    if kept.finished and averages_by_method(kept.files):
        label = upper(kept.files.endpoint.label)
        return f"{label} of averages by their settings, and of runs under the schedules that they are to equal."
    if kept.swept_alone:
        return f"Training loss and {kept.files.score.validation.label} against the learning rate. {_said(kept)}"
    if kept.finished:
        between = ", the largest eigenvalue over its limit" if kept.sharpness else ""
        return f"Training loss by epoch{between}, and {kept.files.endpoint.label} at the end. {_said(kept)}"
    found = [(method, kept.best_trial(method)) for method in kept.files.methods]
    best = [
        f"{kept.files.label(method)} {row['val_loss']:.2f} at {row['lr']:.2g}"
        for method, row in sorted(found, key=lambda pair: pair[1].get("val_loss", math.inf))
        if row
    ]
    return f"{upper(kept.files.criterion.label)} of every trial against its learning rate. Lowest: {and_(best)}."


def _results(kept: Kept) -> tuple[str, str]:
    """Of a finished study: every method in the order of the study, and what its numbers are."""
    files, base = kept.files, kept.files.label(kept.files.base)
    costs = {"step": "steps", "gradients": "gradients", "state": STATE}
    costs = {name: header for name, header in costs.items() if all(name in row for row in files.results)}
    measure, beside, entries = files.endpoint, files.secondary, kept.entries
    rows, edge = [], False
    for method in files.methods:
        end = entries[measure.column, method]
        label = f"{files.label(method)} (control)" if files.styles[method].control else files.label(method)
        at_edge = bool(at_the_edge(files, method))
        edge |= at_edge
        cells = [label, f"{_rate(files.settings[method])}{'*' if at_edge else ''}"]
        change = f"{change_of(end, measure)}, {test_of(end)}" if end["pairs"] else ""
        n = f"{end['n']} of {end['n'] + end['failed']}" if end["failed"] else str(end["n"])
        cells += [n, mean_of(end, measure), change]
        cells += [] if beside is None else [mean_of(entries[beside.column, method], beside)]
        spent = [[row[cost] for row in files.last(method)] for cost in costs]
        rows.append([*cells, *(amount(median(values)) if values else MISSING for values in spent)])
    over = f"{'over' if files.effect(measure) == 'ratio' else 'minus'} {base}"
    rate = "tuned rate" if files.tuning else "rate"
    shown = [measure.header, over, *([] if beside is None else [beside.header])]
    head = ["method", rate, "n", *shown, *costs.values()]
    tables = [] if kept.swept_alone else [markdown(head, rows)]
    if files.sweep:
        swept = sensitivity_table(files)
        tables += [f"{swept['title']}:", markdown(swept["header"], swept["rows"])]
    judged = "" if kept.swept_alone else endpoint(files)
    return "\n\n".join(tables), " ".join(filter(None, [judged, _how(kept), _EDGE if edge else ""]))


def _averages(kept: Kept) -> list[str]:
    """Of a finished study with averages by name: each beside the runs under its schedule, by the endpoint."""
    if not kept.finished:
        return []
    tables = averages_tables(kept.files)[:1]
    return [f"{table['title']}:\n\n{markdown(table['header'], table['rows'])}" for table in tables]


def _spectrum(kept: Kept) -> list[str]:
    """Of a finished study whose spectrum was measured: the columns of the table of Jastrzebski et al. (2019)."""
    if not kept.finished or not any(FROBENIUS in row for row in kept.files.results):
        return []
    files, score = kept.files, kept.files.score.validation
    epoch = files.config["epochs"] // 2
    tested = files.endpoint
    head = ["at the best validation / at the end", "norm of the Hessian", "its largest eigenvalue"]
    head += [
        f"best: {tested.header}",
        f"{score.header}, at epoch {epoch}",
        f"end: {TRAIN_LOSS.label}",
        "best: distance",
    ]
    body = []
    for method in files.methods:
        best, last = (
            [row for row in files.results if (row["method"], row["read_out"]) == (method, name)]
            for name in ("best", "last")
        )
        at_epoch = [row[score.column] for row in kept.epochs(method) if row["epoch"] + 1 == epoch]
        cells = [f"{_mean(best, name)} / {_mean(last, name)}" for name in (FROBENIUS, LAMBDA_1)]
        cells += [_mean(best, tested.column, tested.factor), _mean_of(at_epoch, score.factor)]
        body.append([files.label(method), *cells, _mean(last, TRAIN_LOSS.column), _mean(best, DISTANCE)])
    size = files.config["spectrum"]
    title = (
        f"The columns of the 2019 paper's table, means over seeds; the norm is the root of the sum of squares of the "
        f"{size['k']} largest eigenvalues of the Hessian of {size['samples']:,} training samples:"
    )
    return [f"{wrapped(title)}\n\n{markdown(head, body)}"]


def _mean(rows: Rows, column: str, factor: float = 1.0) -> str:
    return _mean_of([row[column] for row in rows], factor)


def _mean_of(values: list[float], factor: float = 1.0) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{factor * fmean(finite):.3g}" if finite else MISSING


def _paths(kept: Kept) -> list[str]:
    """Of a finished study whose paths were measured: sharpness, and the valley in the first and the last burst."""
    if not kept.paths or not kept.finished:
        return []
    walked = any("height" in row for row in kept.paths)
    body = []
    for method in kept.files.methods:
        own = [row for row in kept.paths if row["method"] == method]
        cells = _sharpness([row for row in own if row.get("lambda_1") is not None])
        cells += _valley([row for row in own if row.get("height") is not None]) if walked else []
        body.append([kept.files.label(method), *cells])
    head = ["along the first run", "largest eigenvalue, at most", "at the end", "its share of (2 + 2β) / lr"]
    head += (
        ["barriers crossed", "along the floor", "height, first and last", "distance from the start"] if walked else []
    )
    return [markdown(head, body)]


def _sharpness(measured: Rows) -> list[str]:
    if not measured:
        return [MISSING] * 3
    last = max(measured, key=lambda row: row["step"])
    share = f"{last['lambda_1'] / last['limit']:.2g}" if last.get("limit") else MISSING
    return [f"{max(row['lambda_1'] for row in measured):.3g}", f"{last['lambda_1']:.3g}", share]


def _valley(bursts: Rows) -> list[str]:
    if not bursts:
        return [MISSING] * 4
    ordered = sorted(bursts, key=lambda row: row["step"])
    first, last = ordered[0], ordered[-1]
    crossed, along, steps = (sum(row[name] for row in bursts) for name in ("crossed", "along", "steps"))
    return [
        f"{crossed:.0f} of {steps:.0f}",
        f"{along:.0f}",
        f"{first['height']:.2g}, {last['height']:.2g}",
        f"{last['distance']:.3g}",
    ]


def _how(kept: Kept) -> str:
    """What the numbers of a finished study are, and the hardware."""
    seeds = kept.files.config["seeds"]
    where = f"On {_hardware(kept)}."
    if kept.swept_alone:
        return f"Means over {count(kept.files.config['sweep_seeds'], 'seed')} at each rate, no tests. {where}"
    if seeds == 1:
        return f"One seed, so no interval and no test. {where}"
    return (
        f"Means over {seeds} paired seeds with their 95 % interval, of losses geometric; paired t-tests, Holm's p, "
        f"significant below {SIGNIFICANT:g}. {where}"
    )


def _trials(kept: Kept) -> tuple[str, str]:
    """Of a study that is not finished: the best of each method's trials, the worst method first."""
    files, rows = kept.files, []
    measure = files.score.validation
    done = len({row["run"] for row in kept.runs if row["run"].startswith("runs/")})
    made = f" Of the runs to judge by {done} are made." if done else ""
    if not files.tuning:
        return "", f"Partial, {_hardware(kept)}.{made}"
    for method in files.methods:
        trials, best = kept.trials_of(method), kept.best_trial(method)
        if not trials:
            continue
        lost = sum(not math.isfinite(row["val_loss"]) or row["train_loss"] > kept.chance for row in trials)
        cells = [files.label(method), _rate(best), f"{lost} of {len(trials)}"]
        if best:
            cells += [f"{best['train_loss']:.2f}", f"{measure.factor * best[measure.column]:.{measure.digits}f}"]
        else:
            cells += [MISSING] * 2
        rows.append((measure.badness(best), cells))
    rows.sort(key=lambda row: -row[0])
    seeds, steps = len({row["seed"] for row in files.tuning}), max(row["step"] for row in files.tuning)
    head = ["method", "best rate", "rates lost", TRAIN_LOSS.label, measure.header]
    words = (
        f"Partial: trials of {'one seed' if seeds == 1 else count(seeds, 'seed')}, {steps:.0f} steps, "
        f"{_hardware(kept)}; no {files.config['endpoint'].replace('_', ' ')} or interval yet.{made} "
        "Lost: no better than chance."
    )
    return markdown(head, [cells for _, cells in rows]), words


def _hardware(kept: Kept) -> str:
    environment = kept.files.environment
    device = environment.get("device", "cpu")
    return f"a CPU ({environment['processor']})" if device == "cpu" else f"one {device}"


def _rate(settings: dict[str, Any]) -> str:
    return f"{settings['lr']:.2g}" if "lr" in settings else MISSING
