"""Averages and the schedules that they equal, against a run by hand on a quadratic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from measured import HESSIAN, Bowl, bowls, drawn, gradient_at, loss_at, near, samples_of, table
from torch import Tensor

from lightning_modules.callbacks.measurements.averaging import AveragingExperiment

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
    callback, batches, start = averaging(make_trainer, samples=8, steps=steps, lr=lr)
    found, centres = table(callback), samples_of(callback.evaluation.parts)
    assert {s for s, *_ in found} == {12}  # optimizer steps of the run
    assert len(batches) == steps
    points = descent(start, batches, [lr] * steps)
    decay = 1 - 4 / steps
    ema = points[0]
    for point in points[1:]:
        ema = decay * ema + (1 - decay) * point
    averages = {"EMA": ema, "SWA": points[-6:].mean(0), "two points": (points[-1] + points[-7]) / 2}
    weights = {
        "EMA": [decay**12, *((1 - decay) * decay ** (steps - k) for k in range(1, steps + 1))],
        "SWA": [0.0] * 7 + [1 / 6] * 6,
        "two points": [0.0] * 6 + [0.5] + [0.0] * 5 + [0.5],
    }
    assert near(found[12, "loss", "last", ""], loss_at(points[-1], centres))
    assert near(found[12, "distance from the start", "last", ""], float((points[-1] - start).norm()))
    for name, average in averages.items():
        rates = [lr * sum(weights[name][t + 1 :]) for t in range(steps)]
        scheduled = descent(start, batches, rates)[-1]
        assert near(found[12, "loss", name, ""], loss_at(average, centres)), name
        assert near(found[12, "loss", f"{name}, schedule", ""], loss_at(scheduled, centres)), name
        assert near(found[12, "distance from the start", name, ""], float((average - start).norm()))
        assert near(found[12, "distance of average and schedule", name, ""], float((average - scheduled).norm()))
        assert near(found[12, "distance of average and last", name, ""], float((average - points[-1]).norm()))
    for spacing in (1, 2, 4, 8):
        one, other = points[-1], points[-1 - spacing]
        gain = (loss_at(one, centres) + loss_at(other, centres)) / 2 - loss_at((one + other) / 2, centres)
        for quantity in ("two-point gain", "predicted two-point gain"):
            assert near(found[12, quantity, "", spacing], gain), quantity
        assert near(found[12, "squared distance", "", spacing], float((one - other).square().sum()))


def test_average_and_schedule_come_together_as_the_rate_falls(make_trainer):
    """To first order they are one: their distance over that of average and last falls with the rate."""
    shares: dict[str, list[float]] = {}
    for lr in (2e-3, 2e-4):
        found = table(averaging(make_trainer, samples=8, steps=16, lr=lr)[0])
        for name in ("EMA", "SWA", "two points"):
            apart = found[12, "distance of average and schedule", name, ""]
            shares.setdefault(name, []).append(apart / found[12, "distance of average and last", name, ""])
    for name, (large, small) in shares.items():
        assert large < 0.1, name
        assert small == pytest.approx(large / 10, rel=0.2), name


@pytest.mark.parametrize(("rate", "expected"), [(1e-3, 1e-3), (0.5, None)])
def test_the_rate_of_the_averaging_experiment_is_that_of_the_optimizer_or_a_stable_one(make_trainer, rate, expected):
    callback = AveragingExperiment(samples=8, steps=8)
    kept = drawn(callback.evaluation, "draw")
    module = Bowl(partial(torch.optim.SGD, lr=rate))
    make_trainer(callbacks=[callback], max_steps=1).fit(module, bowls())
    if expected is None:
        gradient = gradient_at(module.flat().detach(), kept[1][0][0][0])
        expected = float(gradient @ gradient / (gradient @ HESSIAN @ gradient))
    assert near(table(callback)[1, "lr", "", ""], expected)
