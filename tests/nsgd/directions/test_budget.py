"""refresh_every="auto": what refreshes may cost together, and when one comes early."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from nsgd import NSGD, damp
from nsgd.directions.alarm import Alarm
from nsgd.directions.on_host import OnHost

pytestmark = pytest.mark.usefixtures("averaging_is_free")

INSIDE, OUTSIDE = torch.eye(3, dtype=torch.float64)[:2]


class Toy:
    """Three numbers whose one direction is the first; the gradient of a step is what the test says."""

    def __init__(self, make=lambda params, **options: NSGD(params, lr=0.01, **options), **options):
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.optimizer = make([self.weight], k=1, **options)

    def groups(self):
        return [(lambda c=c: c * self.weight[0], 1) for c in (1.0, 2.0)]

    def refresh_if_due(self, batch_fraction=1.0):
        return self.optimizer.refresh_if_due(self.groups(), batch_fraction=batch_fraction)

    def step(self, gradient):
        self.weight.grad = gradient.clone()
        self.optimizer.step()


# -- the budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overhead", [0.03, 0.1, 0.25, 2.0])
@pytest.mark.parametrize("cost", [0.05, 1.0, 7.3])
def test_refreshes_together_cost_the_overhead_and_one_refresh_at_most(overhead, cost):
    toy = Toy(overhead=overhead)
    for steps in range(300):
        toy.refresh_if_due(batch_fraction=cost)
        spent = toy.optimizer.cost_gradients
        assert spent <= overhead * steps + cost + 1e-9
        assert spent >= min(overhead, cost) * steps - 1e-9  # at most one a step
        toy.step(INSIDE + OUTSIDE)
    assert toy.optimizer.refreshes > 1


def test_products_have_the_same_budget(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.01, k=2)
    most = 1 + 2 * (2 * 2 + 2)
    for i in range(300):
        optimizer.zero_grad()
        optimizer.backward(value := run.loss(i), curvature=value)
        assert optimizer.cost_gradients <= 2 * 0.1 * i + most  # twice the budget where a step left the basis
        optimizer.step()
    assert 300 * 0.1 / most <= optimizer.refreshes <= 2 * 300 * 0.1 / 4 + 1  # of three products at least, or 7


@pytest.mark.parametrize("warmup", [0, 4])
def test_it_begins_with_a_refresh_after_the_warmup(warmup):
    toy = Toy(warmup_steps=warmup)
    came = []
    for _ in range(8):
        came.append(toy.refresh_if_due(batch_fraction=100.0))
        toy.step(OUTSIDE)
    assert came == [step == warmup for step in range(8)]


@pytest.mark.parametrize("period", [1, 4, 50])
def test_a_period_in_steps_knows_neither_budget_nor_alarm(period):
    toy = Toy(refresh_every=period, overhead=1e-6)
    came = []
    for step in range(100):
        if toy.refresh_if_due():
            came.append(step)
        toy.step(OUTSIDE * (100.0 if step in (30, 61) else 1.0))
    assert came == list(range(0, 100, period))


def test_a_refresh_by_hand_is_paid_from_the_budget():
    toy = Toy(overhead=0.5)
    assert toy.refresh_if_due()
    toy.step(OUTSIDE)
    toy.optimizer.refresh(toy.groups(), batch_fraction=2.0)
    came = []
    for step in range(1, 12):
        if toy.refresh_if_due():
            came.append(step)
        toy.step(OUTSIDE)
    assert came == [6, 8, 10]  # 3 gradients, at half a gradient a step


# -- the alarm ------------------------------------------------------------------------------------------------

MAKERS = {
    "known": lambda params, **options: NSGD(params, lr=0.01, **options),
    "measured": lambda params, **options: NSGD(params, lr=0.01, bulk_scale=0.5, **options),
    "damp": lambda params, **options: damp(SGD(params, lr=0.01), **options),
    "gamma_one": lambda params, **options: NSGD(params, lr=0.01, gamma=1.0, **options),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("factor", [1.0, 1.9, 2.1, 10.0, -10.0])  # the alarm is at twice the length
@pytest.mark.parametrize("jump", [2, 4, 6, 8])
def test_a_step_out_of_the_basis_brings_the_next_refresh_within_twice_the_budget(maker, jump, factor):
    toy = Toy(MAKERS[maker], overhead=0.1)
    assert toy.refresh_if_due()  # for one gradient: the next is due after ten steps, or five
    for _ in range(jump - 1):
        toy.step(INSIDE + OUTSIDE)
        assert not toy.optimizer.refresh_due
    toy.step(INSIDE + factor * OUTSIDE)
    early = abs(factor) > 2 and jump >= 5
    assert toy.optimizer.refresh_due == early
    assert toy.refresh_if_due() == early
    assert not toy.optimizer.refresh_due
    toy.step(INSIDE + OUTSIDE)
    assert not toy.optimizer.refresh_due  # the alarm is of the last step


def test_a_long_step_inside_the_basis_is_no_alarm():
    toy = Toy(overhead=0.1)
    toy.refresh_if_due()
    for step in range(8):
        toy.step((100.0 if step == 7 else 1.0) * INSIDE + OUTSIDE)
    assert not toy.optimizer.refresh_due


def test_the_usual_length_is_learned_anew_after_a_jump():
    """A schedule that makes every step longer is one alarm, not one at every step."""
    toy = Toy(overhead=1e-3)
    toy.refresh_if_due()
    alarms = []
    for step in range(40):
        toy.step(OUTSIDE * (1.0 if step < 20 else 10.0))
        alarms.append(toy.optimizer._directions.alarm.is_on())
    assert [step for step, alarm in enumerate(alarms) if alarm] == [20]


SCHEDULED = {
    "known": lambda params, lr, **options: NSGD(params, lr=lr, **options),
    "measured": lambda params, lr, **options: NSGD(params, lr=lr, bulk_scale=0.5, **options),
    "damp": lambda params, lr, **options: damp(SGD(params, lr=lr), **options),
}


def set_lr(optimizer, lr):
    group = optimizer.param_groups[0]
    group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr


def alarms_of(toy, steps):
    """At which of the steps, given as rate and gradient, the alarm is on."""
    found = []
    for i, (lr, gradient) in enumerate(steps):
        set_lr(toy.optimizer, lr)
        toy.step(gradient)
        if toy.optimizer._directions.alarm.is_on():
            found.append(i)
    return found


def scheduled(maker, lr):
    toy = Toy(lambda params, **options: SCHEDULED[maker](params, lr, **options), overhead=1e-3)
    toy.refresh_if_due()
    return toy


def rate(kind, value=0.01):
    return torch.tensor(value, dtype=torch.float64) if kind is torch.Tensor else value


@pytest.mark.parametrize("maker", SCHEDULED)
@pytest.mark.parametrize("kind", [float, torch.Tensor])
@pytest.mark.parametrize("factor", [10.0, 0.1, 1e-4])
def test_a_schedule_of_the_rate_is_no_alarm_and_an_escape_under_it_is(maker, kind, factor):
    rates = [0.01] * 10 + [0.01 * factor] * 10 + [0.01] * 10
    steps = [(lr, INSIDE + OUTSIDE) for lr in rates]
    assert alarms_of(scheduled(maker, rate(kind)), steps) == []
    for escape in (10, 15, 20, 29):
        steps[escape] = (rates[escape], INSIDE + 10 * OUTSIDE)
        assert alarms_of(scheduled(maker, rate(kind)), steps[: escape + 1]) == [escape]
        steps[escape] = (rates[escape], INSIDE + OUTSIDE)


@pytest.mark.parametrize("maker", SCHEDULED)
@pytest.mark.parametrize("kind", [float, torch.Tensor])
@pytest.mark.parametrize("idle", [(0.01, 0 * OUTSIDE), (0.0, OUTSIDE), (0.0, 0 * OUTSIDE)], ids=["grad", "lr", "both"])
def test_steps_of_no_length_neither_alarm_nor_count(maker, kind, idle):
    steps = [(0.01, INSIDE + (1 + 0.1 * i) * OUTSIDE) for i in range(6)]
    plain, paused = scheduled(maker, rate(kind)), scheduled(maker, rate(kind))
    assert alarms_of(plain, steps) == []
    assert alarms_of(paused, [idle, idle, *steps[:3], idle, *steps[3:], idle, idle]) == []
    means = [
        json.loads(toy.optimizer.state_dict()["param_groups"][0]["nsgd_counts"])["mean_square"]
        for toy in (plain, paused)
    ]
    assert means[0] == pytest.approx(means[1], rel=1e-9)
    # A step at a rate of 0 is none: the alarm is of the one before.
    assert alarms_of(paused, [(0.01, 10 * OUTSIDE), idle]) == ([0, 1] if idle[0] == 0 and kind is float else [0])


@pytest.mark.parametrize("value", [float("inf"), 1e200])
def test_a_step_that_is_not_finite_does_not_silence_the_alarm(value):
    toy = Toy(overhead=0.1)
    toy.refresh_if_due()
    for step in range(8):
        toy.step({3: value, 7: 10.0}.get(step, 1.0) * OUTSIDE)
        with torch.no_grad():
            toy.weight.nan_to_num_(0.0, 0.0, 0.0)
    assert toy.optimizer.refresh_due


def test_alarm_and_usual_length_are_those_of_the_uninterrupted_run():
    """A checkpoint after step 6, whose jump makes the next refresh due, or before it, whose mean tells that it is."""
    for stop in (5, 6):
        whole, resumed = Toy(), Toy()
        whole.refresh_if_due()
        for _ in range(5):
            whole.step(OUTSIDE)
        if stop == 6:
            whole.step(10 * OUTSIDE)
        resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        if stop == 5:
            whole.step(10 * OUTSIDE), resumed.step(10 * OUTSIDE)
        assert whole.optimizer.refresh_due
        assert resumed.optimizer.refresh_due


def test_an_alarm_does_not_outlive_the_run_that_raised_it():
    toy, other = Toy(), Toy()
    for each in (toy, other):
        each.refresh_if_due()
        for _ in range(6):
            each.step(OUTSIDE)
    state = copy.deepcopy(other.optimizer.state_dict())
    toy.step(10 * OUTSIDE)
    assert toy.optimizer.refresh_due
    toy.optimizer.load_state_dict(state)
    assert not toy.optimizer.refresh_due


def test_the_dtype_of_the_trained_parameters_may_change_between_steps():
    """A float64 parameter without gradient at times, beside a float32 one that always has one."""
    low, high = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = NSGD([low, high], lr=0.01, k=2)
    optimizer.refresh(low.square().sum() + high.square().sum())
    for step in range(4):
        optimizer.zero_grad()
        (low.square().sum() + (high.square().sum() if step % 2 else 0.0)).backward()
        optimizer.step()
    assert low.dtype == torch.float32
    assert high.dtype == torch.float64


def test_steps_of_no_length_are_no_alarm():
    toy = Toy(lambda params, **options: damp(AdamW(params, lr=0.0, weight_decay=0.0), **options))
    toy.refresh_if_due()
    for _ in range(8):
        toy.step(OUTSIDE)
    assert not toy.optimizer.refresh_due


def test_what_rounding_leaves_outside_the_basis_is_no_alarm():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator)
    weight = nn.Parameter(torch.randn(6, generator=generator))
    optimizer = NSGD([weight], lr=0.1, k=6)  # all of space
    optimizer.refresh(0.5 * (root @ weight).square().sum())
    for _ in range(100):
        weight.grad = torch.randn(6, generator=generator)
        optimizer.step()
        assert not optimizer._directions.alarm.is_on()


# -- values on their way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False])
def test_a_value_on_the_host_is_there_at_once(value):
    assert OnHost(torch.tensor(value)).is_true() is value


def test_off_the_cpu_an_alarm_is_one_step_late_and_waits_for_that_step_alone():
    class Event:
        waited = False

        def synchronize(self):
            self.waited = True

    alarm, events = Alarm(), []
    for jumped in (True, False):
        copy = OnHost(torch.tensor(jumped))
        copy._copied = Event()
        events.append(copy._copied)
        alarm._copies = [*alarm._copies[-1:], copy]
    assert alarm.is_on()  # of the step before the last
    assert [event.waited for event in events] == [True, False]


def test_on_the_cpu_an_alarm_is_the_last_step_s():
    alarm = Alarm()
    for jumped in (True, False, True):
        alarm.note(torch.tensor(jumped))
        assert alarm.is_on() is jumped
