"""How often refreshes come by their price in seconds, of a clock that the test turns."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import pickle

import pytest
import torch
from loops import through_a_file
from torch import nn

from nsgd import NSGD
from nsgd.directions import pace
from nsgd.directions.pace import interval_of

STEP = 0.01


class Clock:
    """Goes as the test says, and knows how often it was looked at."""

    def __init__(self):
        self.time, self.looks = 5.0, 0

    def now(self, device):
        self.looks += 1
        return self.time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "now", clock.now)
    return clock


class Run:
    """Numbers whose refreshes and steps take what the test says, and where refreshes came."""

    def __init__(self, clock, price, solver="gradients", fraction=0.02, **options):
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
        options = {"overhead": 0.1, **options}
        self.optimizer = NSGD([self.weight], lr=1e-3, k=2, solver=solver, **options)
        self.clock, self.price, self.fraction, self.came = clock, price, fraction, []

    def curvature(self):
        def loss(c):
            self.clock.time += self.price * STEP / 2
            return 0.5 * c * (torch.arange(1, 5) * self.weight.square()).sum()

        if self.optimizer.options.solver != "gradients":
            return lambda: 2 * loss(0.5) + 0 * loss(1.0)
        return [(lambda c=c: loss(c), 1) for c in (1.0, 2.0)]

    def steps(self, count, pause=()):
        optimizer = self.optimizer
        for _ in range(count):
            if optimizer.refresh_if_due(self.curvature(), batch_fraction=self.fraction):
                self.came.append(optimizer.steps)
            self.clock.time += STEP * (100 if optimizer.steps in pause else 1)
            self.weight.grad = torch.ones_like(self.weight)
            optimizer.step()
        return self


def settled_at(run, most=200):
    for _ in range(most):
        if run.optimizer.refresh_interval:
            return run.optimizer.steps
        run.steps(1)
    return None


# -- the interval ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refresh", "step", "overhead", "expected"),
    [(3.0, 1.0, 0.1, 30), (3.01, 1.0, 0.1, 31), (0.01, 1.0, 0.1, 1), (2.0, 0.5, 2.0, 2), (1.0, 0.0, 0.1, 10**9)],
)
def test_refreshes_cost_the_overhead_at_most(refresh, step, overhead, expected):
    assert interval_of(refresh, step, overhead) == expected


@pytest.mark.parametrize("solver", ["gradients", "lanczos"])
@pytest.mark.parametrize(("price", "interval"), [(0.05, 1), (0.39, 4), (2.85, 29)])
def test_the_interval_is_settled_from_the_price_and_kept(clock, solver, price, interval):
    run = Run(clock, price, solver, fraction=0.002)
    at = settled_at(run)
    assert run.optimizer.refresh_interval == interval
    run.price *= 10  # what comes later is not looked at
    seen = clock.looks
    run.steps(3 * interval + 10)
    assert clock.looks == seen
    assert run.optimizer.refresh_interval == interval
    later = [i for i in run.came if i >= at + interval]
    assert len(later) >= 2
    assert {b - a for a, b in itertools.pairwise(later)} == {interval}


def test_it_is_settled_at_a_step_that_does_not_depend_on_the_times(clock):
    found = {settled_at(Run(clock, price)) for price in (0.01, 0.7, 5.0, 300.0)}
    assert len(found) == 1


def test_until_then_refreshes_go_by_the_count_of_gradients(clock, no_clock):
    run = Run(clock, 50.0, overhead=0.2)
    at = settled_at(run)
    by_count = Run(clock, 50.0, overhead=0.2)
    by_count.optimizer._directions.pace.end_step = lambda device: None  # never knows
    by_count.steps(at)
    assert run.came == by_count.came
    assert len(run.came) >= 4


def test_where_every_step_refreshes_the_price_is_taken_out_of_the_step(clock):
    run = Run(clock, 1.7, fraction=1e-6)
    at = settled_at(run)
    assert run.came == list(range(at))
    assert run.optimizer.refresh_interval == 17


def test_a_pause_and_a_first_refresh_that_is_slow_do_not_count(clock):
    run = Run(clock, 500.0)
    run.steps(1)
    run.price = 0.75
    run.steps(40, pause=(3, 7))
    assert run.optimizer.refresh_interval == 8


def test_two_refreshes_in_one_step_are_one(clock):
    run = Run(clock, 0.58)
    for _ in range(20):
        for _ in range(2):
            run.optimizer.refresh(run.curvature(), batch_fraction=1e-6)
        run.steps(1)
    assert run.optimizer.refresh_interval == 12


def test_an_alarm_brings_the_next_refresh_after_half_the_interval(clock):
    run = Run(clock, 1.0)
    settled_at(run)
    assert run.optimizer.refresh_interval == 10
    for escaped in (False, True):
        while not run.came or run.came[-1] != run.optimizer.steps - 1:  # up to a refresh
            run.steps(1)
        run.came.clear()
        since = run.optimizer.steps - 1
        run.steps(3)
        for _ in range(12):
            if escaped:
                run.optimizer._directions.alarm._copies = []
                run.optimizer._directions.alarm._on = True
            if run.optimizer.refresh_due:
                break
            run.weight.grad = torch.ones_like(run.weight)
            run.optimizer.step()
        assert run.optimizer.steps - since == (5 if escaped else 10)


@pytest.mark.parametrize(
    "options", [{"refresh_every": 3}, {"solver": "random"}, {"solver": "differences"}, {"solver": "auto"}]
)
def test_nothing_is_timed_where_nothing_is_to_be_settled(clock, options):
    weight = nn.Parameter(torch.ones(4))
    optimizer = NSGD([weight], lr=1e-3, k=2, **{"solver": "gradients", **options})
    for _ in range(40):
        if "refresh_every" in options or options["solver"] == "random":
            optimizer.refresh_if_due([(lambda c=c: c * weight.sum(), 1) for c in (1.0, 2.0)], batch_fraction=0.01)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert clock.looks == 0
    assert optimizer.refresh_interval == options.get("refresh_every")


def test_it_is_said_once(clock, caplog):
    run = Run(clock, 2.0)
    with caplog.at_level(logging.INFO, "nsgd"):
        run.steps(120)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the directions are refreshed every 20 steps from here on: a refresh took 20 ms, a step 10 ms, and overhead is "
        "0.1; refresh_every=20 repeats it"
    )


# -- kept -----------------------------------------------------------------------------------------------------


def refuse(device):
    raise AssertionError("the clock was looked at")


@pytest.mark.parametrize(
    "copied",
    [through_a_file, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))],
    ids=["file", "copy", "pickle"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one_once_it_is_settled(clock, monkeypatch, copied):
    whole = Run(clock, 0.7)
    settled_at(whole)
    whole.steps(2)
    resumed = Run(clock, 30.0, overhead=3.0)
    resumed.weight.data.copy_(whole.weight)
    resumed.optimizer.load_state_dict(copied(whole.optimizer.state_dict()))
    monkeypatch.setattr(pace, "now", refuse)
    whole.came.clear()
    whole.steps(40), resumed.steps(40)
    assert resumed.optimizer.refresh_interval == whole.optimizer.refresh_interval == 7
    assert resumed.came == whole.came
    assert len(whole.came) > 4
    assert torch.equal(resumed.weight, whole.weight)
    assert str(resumed.optimizer.state_dict()) == str(whole.optimizer.state_dict())


def test_a_run_with_that_number_is_the_same_whatever_the_times(clock):
    ends = []
    for price in (0.1, 9.0):
        run = Run(clock, price, refresh_every=7).steps(50)
        ends.append(run.weight.detach().clone())
        assert run.came == list(range(0, 50, 7))
    assert torch.equal(*ends)


def test_a_copy_before_it_is_settled_measures_for_itself(clock):
    run = Run(clock, 0.7).steps(4)
    twin = copy.deepcopy(run.optimizer)
    assert twin._directions.pace._ended is None
    run.steps(60)
    assert run.optimizer.refresh_interval == 7
    assert twin.refresh_interval is None


# -- other devices, several processes -------------------------------------------------------------------------


class Event:
    """As torch.cuda.Event: a time that is known once the device has come so far."""

    waits = 0

    def __init__(self, time):
        self.time = time

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, other):
        assert Event.waits, "asked before the device has come so far"
        return 1000 * (other.time - self.time)


def test_events_are_asked_after_one_wait_in_the_step_that_settles(clock, monkeypatch):
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(pace, "now", lambda device: Event(clock.time))
    run = Run(clock, 2.45)
    waits = []
    for _ in range(60):
        run.steps(1)
        waits.append(Event.waits)
    assert run.optimizer.refresh_interval == 25
    assert set(waits) == {0, 1}


def test_events_are_recorded_in_the_stream_of_the_device(monkeypatch):
    class Recorded:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream = stream

    class Module:
        Event = Recorded

        @staticmethod
        def current_stream(device):
            return f"stream of {device}"

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert pace.now(torch.device("meta")).stream == "stream of meta"


def test_events_are_recorded_on_a_device_whose_streams_have_no_names(monkeypatch):
    class Recorded:
        """As torch.mps.Event, whose making alone needs a Mac."""

        def __init__(self, enable_timing=False):
            self.timed, self.recorded = enable_timing, 0

        def record(self):
            self.recorded += 1

    monkeypatch.setattr(torch.mps, "Event", Recorded)  # the rest of the module is as it is
    event = pace.now(torch.device("mps"))
    assert (event.timed, event.recorded) == (True, 1)


def test_the_first_of_several_processes_decides(monkeypatch):
    class Timed:
        def price(self):
            return 3.0, 6.0

    assert pace.settled_interval(Timed(), 0.1, torch.device("cpu")) == 5
    monkeypatch.setattr(pace, "of_the_first", lambda device, number: [torch.full_like(number, 12)])
    assert pace.settled_interval(Timed(), 0.1, torch.device("cpu")) == 12


def test_the_real_clock_settles_some_interval(clock, monkeypatch):
    monkeypatch.undo()
    run = Run(Clock(), 0.0).steps(60)
    assert run.optimizer.refresh_interval >= 1
    assert math.isfinite(run.optimizer.refresh_interval)
