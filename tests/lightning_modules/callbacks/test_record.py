"""Rows and seconds of a run, on the CPU and on a device that works on by itself, which is made up."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules import Classifier, Digits, ReadOuts
from lightning_modules.callbacks import record, stopwatch
from lightning_modules.callbacks.evaluation_weights import EvaluationWeights
from lightning_modules.callbacks.record import RecordSteps
from lightning_modules.callbacks.stopwatch import Stopwatch
from nsgd import NSGD

CPU = torch.device("cpu")


class Device:
    """A stream whose work takes time of its own; an event tells its time once it has been waited for."""

    def __init__(self) -> None:
        self.time = 0.0  # seconds of the device's work so far
        self.waits = 0


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, device.time

    def synchronize(self) -> None:
        self.device.waits += 1

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(stopwatch, "now", lambda _: Event(made))
    return made


def test_a_watch_leaves_pauses_out_and_waits_for_nothing_until_it_is_read(device):
    watch = Stopwatch(torch.device("cuda"))
    device.time += 1
    first = watch.mark()
    with watch.paused():
        device.time += 10
        with watch.paused():
            device.time += 100
    device.time += 2
    second = watch.mark()
    watch.pause()
    device.time += 5
    within = watch.mark()
    watch.resume()
    assert device.waits == 0
    assert [watch.seconds(mark) for mark in (first, second, within)] == pytest.approx([1, 3, 8])
    device.time += 4
    assert watch.seconds(watch.mark()) == pytest.approx(7)


def test_a_pause_ends_with_an_exception():
    watch = Stopwatch(CPU)
    with pytest.raises(ZeroDivisionError), watch.paused():
        1 / 0  # noqa: B018
    mark = watch.mark()
    time.sleep(0.02)
    assert watch.seconds(watch.mark()) >= watch.seconds(mark) + 0.02


class Loss(torch.Tensor):
    """One that only a read of several together may bring to the host."""

    read = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.item, torch.Tensor.__float__):
            raise AssertionError("a step waited for its loss")
        cls.read += function is torch.Tensor.tolist
        return super().__torch_function__(function, types, args, kwargs or {})


def test_no_step_waits_on_a_device_that_works_on_by_itself(device, monkeypatch):
    """Three steps of 1, 2 and 3 seconds, a validation of 10, and one more step of 4."""
    monkeypatch.setattr(record, "_READ_AFTER", math.inf)
    told: list[tuple[int, float]] = []
    steps = RecordSteps(lambda step, loss: told.append((step, loss)), ["val_loss"])
    trainer: Any = SimpleNamespace(
        optimizers=[torch.optim.SGD([torch.zeros(1)], lr=0.1)],
        current_epoch=0,
        max_steps=4,
        global_step=0,
        callback_metrics={"val_loss": torch.tensor(0.25)},
    )
    module: Any = SimpleNamespace(device=torch.device("cuda"))

    def step(seconds: float) -> None:
        device.time += seconds
        trainer.global_step += 1
        steps.on_after_backward(trainer, module)
        loss = torch.tensor(seconds / 8).as_subclass(Loss)
        steps.on_train_batch_end(trainer, module, {"loss": loss}, None, 0)

    steps.on_train_start(trainer, module)
    for seconds in (1, 2, 3):
        step(seconds)
    assert (device.waits, told, Loss.read) == (0, [], 0)
    steps.on_validation_start(trainer, module)
    device.time += 10
    steps.on_validation_end(trainer, module)
    assert told == [(3, 0.375)]
    assert Loss.read == 1
    with steps.apart():
        device.time += 20
    step(4)
    assert trainer.should_stop
    steps.on_train_end(trainer, module)
    assert told == [(3, 0.375), (4, 0.5)]
    assert [row["seconds"] for row in steps.rows] == pytest.approx([1, 3, 6, 10])
    assert [row["loss"] for row in steps.rows] == [0.125, 0.25, 0.375, 0.5]
    assert steps.rows[2]["val_loss"] == 0.25


def test_a_long_epoch_is_heard_of_between_its_validations(device, monkeypatch):
    monkeypatch.setattr(record, "_READ_AFTER", 0.0)
    told: list[int] = []
    steps = RecordSteps(lambda step, loss: told.append(step))
    trainer: Any = SimpleNamespace(
        optimizers=[torch.optim.SGD([torch.zeros(1)], lr=0.1)], current_epoch=0, max_steps=9, global_step=1
    )
    module: Any = SimpleNamespace(device=torch.device("cuda"))
    steps.on_train_start(trainer, module)
    steps.on_train_batch_end(trainer, module, {"loss": torch.tensor(1.0)}, None, 0)
    assert told == [1]


@pytest.mark.parametrize("read_after", [0.0, math.inf])
def test_directions_are_described_at_each_validation_whenever_losses_were_read(
    device, monkeypatch, make_trainer, read_after
):
    """Validations after steps 8 and 16, as on a GPU; at 0 seconds every step's loss was read before."""
    monkeypatch.setattr(record, "_READ_AFTER", read_after)

    class Noted(RecordSteps):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, SimpleNamespace(device=torch.device("cuda")))

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_start(trainer, pl_module)
            found.append((trainer.global_step, trainer.optimizers[0].alignment, list(trainer.optimizers[0].weights)))

    found: list[Any] = []
    steps = Noted(lambda step, loss: None, ["val_loss"])
    torch.manual_seed(0)
    module: Any = Classifier()
    module.configure_optimizers = lambda: NSGD(module.parameters(), lr=0.1, k=3)
    trainer = make_trainer(max_epochs=-1, max_steps=16, callbacks=[steps])
    trainer.fit(module, datamodule=Digits())
    described = [row for row in steps.rows if "alignment" in row]
    assert [row["step"] for row in described] == [8, 16]
    for row, (step, alignment, weights) in zip(described, found, strict=True):
        assert (row["step"], row["alignment"]) == (step, alignment)
        assert "overlap" in row
        assert [row[f"weight_{i}"] for i in range(1, len(weights) + 1)] == weights
        assert weights


class Slow(torch.optim.SGD):
    """With a second set of weights, to which it takes long to switch."""

    switches = 0

    def train(self) -> None:
        time.sleep(0.05)

    def eval(self) -> None:
        type(self).switches += 1
        time.sleep(0.05)


def test_seconds_of_training_are_without_switches_and_averages(make_trainer):
    module: Any = Classifier()
    module.configure_optimizers = lambda: Slow(module.parameters(), lr=0.1)
    steps, read_outs = RecordSteps(lambda step, loss: None), ReadOuts()
    read_outs.apart = steps.apart
    trainer = make_trainer(
        max_steps=8, max_epochs=-1, callbacks=[steps, read_outs, EvaluationWeights(steps.apart)], accelerator="cpu"
    )
    trainer.fit(module, datamodule=Digits(batch_size=50, limit=300))
    assert Slow.switches == 8 + 2 + 1  # steps, validations, and the end
    assert 0 < steps.rows[-1]["seconds"] < 0.4  # one second or more with them
