"""Averages and the schedules that they equal, against a run by hand on a quadratic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from measured import (
    CENTRES,
    HESSIAN,
    ROTATION,
    SPECTRUM,
    Bowl,
    bowls,
    drawn,
    gradient_at,
    loss_at,
    near,
    samples_of,
    table,
)
from strangers import seeded
from torch import Tensor

from lightning_modules.callbacks.measurements.averaging import AveragingExperiment
from lightning_modules.report.measurements.averaging import draw_averaging

# -- averages and schedules ------------------------------------------------------------------------------------------


def averaging(make_trainer: Any, **options: Any) -> tuple[AveragingExperiment, list[Tensor], Tensor]:
    callback = AveragingExperiment(**options)
    kept = drawn(callback.evaluation, "draw")
    module = Bowl(partial(torch.optim.SGD, lr=0.02))
    make_trainer(callbacks=[callback]).fit(module, bowls())
    batches = [batch[0] for (batch, _), *_ in kept[1:]]  # the first are the evaluation samples
    return callback, batches, module.flat().detach().clone()


def descent(start: Tensor, batches: list[Tensor], rates: list[float]) -> Tensor:
    points = [start]
    for batch, rate in zip(batches, rates, strict=True):
        points.append(points[-1] - rate * gradient_at(points[-1], batch))
    return torch.stack(points)


def test_averages_are_the_weights_times_the_iterates_of_a_run_by_hand(make_trainer):
    steps, lr = 12, 0.02
    callback, batches, start = averaging(make_trainer, samples=8, steps=steps, lr=lr, replicates=1)
    found, centres = table(callback), samples_of(callback.evaluation.parts)
    assert {s for s, *_ in found} == {12}  # optimizer steps of the run
    assert len(batches) == 2 * steps  # of the model, then of the branch
    points = descent(start, batches[steps:], [lr] * steps)
    decay = 1 - 4 / steps
    ema = points[0]
    for point in points[1:]:
        ema = decay * ema + (1 - decay) * point
    averages = {
        "EMA": ema,
        "SWA": points[-6:].mean(0),
        "two points": (points[-1] + points[-7]) / 2,
        "whole run": points.mean(0),
    }
    assert near(found[12, "loss", "last", ""], loss_at(points[-1], centres))
    for name, average in averages.items():
        assert near(found[12, "loss", name, ""], loss_at(average, centres)), name
    for window in (2, 4, 8, 13):
        assert near(found[12, "loss", "window", window], loss_at(points[-window:].mean(0), centres))
    for spacing in (1, 2, 4, 8):
        one, other = points[-1], points[-1 - spacing]
        assert near(found[12, "loss", "spacing", spacing], loss_at((one + other) / 2, centres))
        gain = (loss_at(one, centres) + loss_at(other, centres)) / 2 - loss_at((one + other) / 2, centres)
        for quantity in ("two-point gain", "predicted two-point gain"):
            assert near(found[12, quantity, "", spacing], gain), quantity
        assert near(found[12, "squared distance", "", spacing], float((one - other).square().sum()))


def test_every_replicate_has_batches_of_its_own(make_trainer):
    steps, lr = 8, 0.1
    callback, batches, start = averaging(make_trainer, samples=8, steps=steps, lr=lr, replicates=3)
    centres = samples_of(callback.evaluation.parts)
    found = [r["value"] for r in callback.rows if (r["quantity"], r["of"]) == ("loss", "last")]
    runs = [batches[i * steps : (i + 1) * steps] for i in (1, 2, 3)]  # the first are the model's
    assert len({batch.sum().item() for batch in batches}) == 4 * steps
    assert [r["measurement"] for r in callback.rows if r["quantity"] == "loss" and r["of"] == "last"] == [1, 2, 3]
    for value, run in zip(found, runs, strict=True):
        assert near(value, loss_at(descent(start, run, [lr] * steps)[-1], centres))


def test_with_every_direction_a_schedule_ends_at_its_average(make_trainer):
    """On a quadratic, at a rate far from the limit of small steps: lr times the top curvature is 0.96."""
    found = table(averaging(make_trainer, samples=8, steps=16, lr=0.12, k=7, replicates=1)[0])
    for name in ("EMA", "SWA", "two points", "whole run"):
        # The eigenpairs come from a Krylov space of the full dimension, good to a part in 1e7 here.
        assert near(found[12, "loss", f"{name}, schedule", ""], found[12, "loss", name, ""], abs=1e-6), name
        assert abs(found[12, "loss", name, ""] - found[12, "loss", "last", ""]) > 0.01, name


def test_a_schedule_has_the_rates_of_the_sharpest_directions_and_one_for_the_rest(make_trainer):
    """By hand for two points, whose rates have a closed form, with the top eigenvectors of the known Hessian."""
    steps, lr, k = 8, 0.12, 2
    callback, batches, start = averaging(make_trainer, samples=8, steps=steps, lr=lr, k=k, replicates=1)
    found, centres = table(callback), samples_of(callback.evaluation.parts)
    sharp = ROTATION[:, :k]
    rest = gradient_at(start, batches[0])
    rest = rest - sharp @ (sharp.T @ rest)
    beyond = float(rest @ HESSIAN @ rest / (rest @ rest))
    assert found[12, "curvature", "rest", ""] == pytest.approx(beyond, rel=1e-5)
    for i in range(k):  # as good as eight products of Lanczos, seven of which span everything
        assert found[12, "curvature", f"e{i + 1}", ""] == pytest.approx(float(SPECTRUM[i]), rel=1e-6)

    def rate(h: float, n: int) -> float:
        power = (1 - lr * h) ** (n - 1)
        return lr * power / (1 + power) if n <= steps // 2 else lr

    point = start
    for t, batch in enumerate(batches[steps:]):
        n, gradient = steps - t, gradient_at(point, batch)
        along = sharp * (sharp.T @ gradient)
        step = rate(beyond, n) * (gradient - along.sum(1))
        point = point - step - sum(rate(float(SPECTRUM[i]), n) * along[:, i] for i in range(k))
    # Lanczos vectors are good to about 1e-5, and a loss of order 1 follows them.
    assert near(found[12, "loss", "two points, schedule", ""], loss_at(point, centres), abs=1e-4)


@pytest.mark.parametrize(("rate", "expected"), [(1e-3, 1e-3), (0.5, 1 / 8.0)])
def test_the_rate_of_the_averaging_experiment_is_that_of_the_optimizer_or_one_over_the_top(
    make_trainer, rate, expected
):
    callback = AveragingExperiment(samples=8, steps=8, replicates=1)
    make_trainer(callbacks=[callback], max_steps=1).fit(Bowl(partial(torch.optim.SGD, lr=rate)), bowls())
    assert float(SPECTRUM[0]) == 8
    assert table(callback)[1, "lr", "", ""] == pytest.approx(expected, rel=1e-6)  # seven products of Lanczos


class Steep(Bowl):
    """No quadratic: the fourth power of the distance along each axis, whose curvature grows with it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.flat() - batch[0]).pow(4).sum(1).mean() / 50


@pytest.mark.parametrize(
    ("module_of", "replicates", "verdict"),
    [
        (Bowl, 4, "is confirmed"),
        (Steep, 4, "is not confirmed"),
        (Bowl, 1, "is not resolved"),
    ],
)
def test_the_verdict_is_right_on_a_quadratic_and_on_what_is_none(make_trainer, module_of, replicates, verdict):
    callback = AveragingExperiment(samples=8, steps=16, lr=0.15, k=7, replicates=replicates)
    module = module_of(partial(torch.optim.SGD, lr=1e-6))  # stays at the start, far from the minimum
    make_trainer(callbacks=[callback], max_steps=1).fit(module, bowls())
    caption = draw_averaging(callback.rows)[1]
    assert f"mean loss of its schedule {verdict} by this run" in caption


def test_the_loss_that_is_none_has_other_averages_than_schedules():
    """By hand over 300 runs, with the curvature at the start along each axis, and the closed form for two points."""
    steps, spacing, lr, generator = 16, 8, 0.15, seeded(5)
    start = Steep(torch.optim.SGD).flat().detach()
    curvature = 12 / 50 * (start - CENTRES).square().mean(0)
    differences, changes = [], []
    for _ in range(300):
        average = last = scheduled = start
        for n in range(steps, 0, -1):
            batch = CENTRES[torch.randperm(96, generator=generator)[:8]]
            power = (1 - lr * curvature) ** (n - 1)
            rate = lr * power / (1 + power) if n <= spacing else lr
            scheduled = scheduled - rate * 4 / 50 * (scheduled - batch).pow(3).mean(0)
            last = last - lr * 4 / 50 * (last - batch).pow(3).mean(0)
            average = last if n == spacing + 1 else average
        losses = [(p - CENTRES).pow(4).sum(1).mean() / 50 for p in ((average + last) / 2, scheduled, last)]
        differences.append(losses[1] - losses[0])
        changes.append(losses[2] - losses[0])
    difference, change = torch.stack(differences), torch.stack(changes).square().mean().sqrt()
    error = difference.std() / 300**0.5
    assert difference.mean().abs() - 5 * error > change / 4
