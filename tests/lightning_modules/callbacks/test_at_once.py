"""Gradients of the samples all at once: for which training steps, and one by one for the others, said once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strangers import Adversarial, Memory, classes, loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules import RefreshDirections
from lightning_modules.callbacks import refresh
from nsgd import NSGD
from nsgd.directions import samples

pytestmark = pytest.mark.usefixtures("averaging_is_free")  # costs are those of the samples

SETTINGS = {"lr": 0.05, "momentum": 0.9}


class Classes(pl.LightningModule):
    """A classifier of pairs; a subclass changes the network, the batch or the step."""

    hidden: Callable[[], nn.Module] = nn.Tanh

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), type(self).hidden(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())

    @staticmethod
    def collate(x: Tensor, y: Tensor) -> Any:
        return x, y


class Dropping(Classes):
    hidden = staticmethod(lambda: nn.Dropout(0.4))


class Normalising(Classes):
    hidden = staticmethod(lambda: nn.BatchNorm1d(8))


class OfDictionaries(Classes):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step((batch["x"], batch["y"]), batch_idx), "size": len(batch["x"])}

    @staticmethod
    def collate(x: Tensor, y: Tensor) -> Any:
        return {"x": x, "y": y}


class OfNestedTuples(Classes):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, (y, weight)), more = batch
        return super().training_step((x * weight[:, None], y), batch_idx) + 0.1 * more["offset"].mean()

    @staticmethod
    def collate(x: Tensor, y: Tensor) -> Any:
        return (x, (y, x[:, 0].abs())), {"offset": x[:, 1]}


class OfNames(Classes):
    @staticmethod
    def collate(x: Tensor, y: Tensor) -> Any:
        return x, y, [f"row {i}" for i in range(len(x))]


class OfScalars(Classes):
    """A tensor without dimensions in every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[2] * super().training_step(batch, batch_idx)

    @staticmethod
    def collate(x: Tensor, y: Tensor) -> Any:
        return x, y, torch.tensor(0.5)


class Manual(Classes):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.curvature_loss(batch))
        optimizer.step()

    def curvature_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])


class Logging(Classes):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"random": torch.rand(())})
        self.last = loss.detach()
        return loss


class OfItems(Classes):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last = loss.item()
        return loss


class Measuring(Classes):
    """torchmetrics looks for labels out of range by ``unique``."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.accuracy = MulticlassAccuracy(num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("accuracy", self.accuracy(self.net(batch[0]), batch[1]), on_epoch=True)
        return super().training_step(batch, batch_idx)


class Recurrent(Classes):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        kind = nn.LSTM if isinstance(self, LongShort) else nn.GRU
        self.net = nn.ModuleDict({"cells": kind(2, 5, batch_first=True), "head": nn.Linear(5, 3)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        states, _ = self.net["cells"](batch[0].unflatten(1, (3, 2)))
        return F.cross_entropy(self.net["head"](states[:, -1]).float(), batch[1])


class LongShort(Recurrent):
    """Of the recurrent ones the one whose cells vmap runs on the CPU, at least in torch 2.13."""


class Checkpointed(Classes):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False).float(), batch[1])


AT_ONCE = [Classes, Dropping, Normalising, OfDictionaries, OfNestedTuples, Manual, Logging]
OTHER_BATCHES = [OfNames, OfScalars]
NOT_BY_VMAP = [OfItems, Measuring, Recurrent, Checkpointed]


def names(kinds: list[type]) -> dict[str, Any]:
    return {"argvalues": kinds, "ids": [kind.__name__ for kind in kinds]}


def batches(kind: type[Classes], n: int = 64, size: int = 16) -> DataLoader[Any]:
    x, y = classes(n).tensors
    return DataLoader(
        [kind.collate(*columns) for columns in zip(x.split(size), y.split(size), strict=True)], batch_size=None
    )


@pytest.fixture
def watch(monkeypatch):
    """What is said, and which gradients are taken at once and which one by one."""
    said: list[str] = []
    taken: list[str] = []
    monkeypatch.setattr(refresh, "rank_zero_info", said.append)
    for name in ("_at_once", "_one_by_one"):

        def noted(found: Any, name: str, *args: Any) -> Any:
            result = found(*args)
            taken.append(name)
            return result

        monkeypatch.setattr(samples, name, partial(noted, getattr(samples, name), name))
    return said, taken


def fit(make_trainer, random_state, kind, make, callbacks, **options):
    module, logger = kind(make), Memory()
    torch.manual_seed(11)
    trainer = make_trainer(callbacks=callbacks, logger=logger, max_epochs=2, **options)
    trainer.fit(module, batches(kind))
    state = trainer.optimizers[0].state
    return trainer.optimizers[0], {
        "tensors": {name: value.tolist() for name, value in module.state_dict().items()},
        "momentum": [state[p]["momentum_buffer"].tolist() for p in module.net.parameters()],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "attributes": set(vars(module)),
        "last": float(getattr(module, "last", 0.0)),
        "modes": [m.training for m in module.modules()],
        "logged": logger.without_nsgd(),
        "random": random_state(),
    }


TRAINERS = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("kind", **names([*AT_ONCE, *OTHER_BATCHES, *NOT_BY_VMAP, LongShort]))
def test_training_is_bit_identical_and_the_slow_way_is_said_once(make_trainer, random_state, watch, kind, options):
    said, taken = watch
    if kind is Manual and "gradient_clip_val" in options:
        pytest.skip("Lightning refuses these for manual optimization")
    if kind is LongShort and "precision" in options:
        pytest.skip("not every CPU has it in bfloat16")
    _, plain = fit(make_trainer, random_state, kind, partial(torch.optim.SGD, **SETTINGS), [], **options)
    observed = partial(NSGD, **SETTINGS, k=3, gamma=1.0, refresh_every=1)
    callback = RefreshDirections()
    optimizer, monitored = fit(make_trainer, random_state, kind, observed, [callback], **options)
    refreshes = 8 // options.get("accumulate_grad_batches", 1)
    assert (optimizer.refreshes, optimizer.hvps) == (refreshes, 0)
    assert len(optimizer.weights) >= 2
    for what, value in plain.items():
        assert monitored[what] == value, what
    if kind is not LongShort:
        assert taken == ["_at_once" if kind in AT_ONCE else "_one_by_one"] * refreshes
        assert len(said) == (kind not in AT_ONCE)
        assert callback.one_by_one == (kind not in AT_ONCE)
    for message in said:
        assert message.startswith("RefreshDirections takes the gradients of the samples one by one, which is slower")
        assert "\n" not in message


@pytest.mark.parametrize("kind", **names([Classes, OfDictionaries, OfNestedTuples, Manual]))
@pytest.mark.parametrize("group_size", [1, 5])
def test_both_ways_give_the_same_directions(make_trainer, random_state, monkeypatch, watch, kind, group_size):
    make = partial(NSGD, **SETTINGS, k=3, gamma=0.1, refresh_every=1)
    optimizer, found = fit(make_trainer, random_state, kind, make, [RefreshDirections(None, group_size)])
    assert "_at_once" in watch[1]
    monkeypatch.setattr(refresh, "columns_of", lambda parts: None)
    watch[1].clear()
    other, expected = fit(make_trainer, random_state, kind, make, [RefreshDirections(None, group_size)])
    assert set(watch[1]) == {"_one_by_one"}
    assert optimizer.weights == pytest.approx(other.weights, rel=1e-3)  # float32, and eight steps
    assert optimizer.cost_gradients == other.cost_gradients == 8
    for name, value in expected["tensors"].items():
        torch.testing.assert_close(torch.tensor(found["tensors"][name]), torch.tensor(value), rtol=0, atol=1e-4)


def test_a_chunk_size_says_how_many_are_taken_at_once(make_trainer, random_state, groups_at_once):

    make = partial(NSGD, **SETTINGS, k=3, gamma=0.1, refresh_every=8)
    fit(make_trainer, random_state, Classes, make, [RefreshDirections(8, chunk_size=3)])
    assert groups_at_once == [3, 3, 2]
    with pytest.raises(
        ValueError, match="expected chunk_size to be None for what 1 GiB holds, or a whole number of at least 1, got 0"
    ):
        RefreshDirections(chunk_size=0)


@pytest.mark.parametrize("at", [2, 3])
def test_a_step_that_fails_raises_its_own_error(make_trainer, watch, at):
    class Fails(Classes):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            if self.calls >= at:
                raise ArithmeticError("of its own")
            return super().training_step(batch, batch_idx)

    module = Fails(partial(NSGD, **SETTINGS, k=3, refresh_every=1, solver="gradients"))  # "auto" would take products
    with pytest.raises(ArithmeticError, match=r"^of its own\n"):
        make_trainer(callbacks=[RefreshDirections()]).fit(module, batches(Fails))
    assert "log" not in vars(module)


@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero or alike")
def test_a_gan_takes_the_directions_of_each_network_at_once(make_trainer, watch):
    class WithLoss(Adversarial):
        def curvature_loss(self, batch: list[Tensor]) -> Tensor:
            return sum(self.losses(batch[0]))

    make = partial(NSGD, lr=0.01, k=3, refresh_every=1)
    trainer = make_trainer(callbacks=[RefreshDirections(6)])
    trainer.fit(WithLoss(make, toggle=True), loader(samples=32))
    assert [(o.refreshes, o.hvps) for o in trainer.optimizers] == [(2, 0), (2, 0)]
    assert watch == ([], ["_at_once"] * 4)
    assert not any(block.basis.requires_grad for o in trainer.optimizers for block in o._directions.blocks)


# -- what is logged, and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 3, 50])
@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_metrics_are_logged_at_most_once_in_an_interval(make_trainer, every, refresh_every):
    logger = Memory()
    trainer = make_trainer(callbacks=[RefreshDirections()], logger=logger, log_every_n_steps=every, max_epochs=2)
    trainer.fit(Classes(partial(NSGD, **SETTINGS, k=3, refresh_every=refresh_every)), batches(Classes))
    steps, expected = [step for step, row in logger.rows if any(name.startswith("nsgd/") for name in row)], []
    for step in range(0, 8, refresh_every):
        if every and (not expected or step - expected[-1] >= every):
            expected.append(step)
    assert steps == expected
    assert trainer.optimizers[0].refreshes == 8 // refresh_every


def test_each_of_several_optimizers_is_logged(make_trainer):
    logger = Memory()
    trainer = make_trainer(callbacks=[RefreshDirections(None)], logger=logger, log_every_n_steps=4)
    trainer.fit(Adversarial(partial(NSGD, lr=0.01, k=3, refresh_every=1), toggle=True), loader(samples=96))
    for prefix in ("nsgd-0/", "nsgd-1/"):
        steps = [step for step, row in logger.rows if any(name.startswith(prefix) for name in row)]
        assert len(steps) > 1
        assert all(b - a >= 4 for a, b in itertools.pairwise(steps))


# -- what a module may keep beside its parameters ----------------------------------------------------------------------


class Meter:
    """As in many a training script: no module, nor a container."""

    total = 0.0

    def update(self, value: Tensor) -> None:
        self.total = self.total + value


class Metered(Classes):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.meter.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        float(self.meter.total)


def test_a_meter_that_is_no_module_ends_nothing(make_trainer):
    make = partial(NSGD, **SETTINGS, k=3, refresh_every=1)
    make_trainer(callbacks=[RefreshDirections()]).fit(Metered(make), batches(Metered))


class Partly(Classes):
    def configure_optimizers(self) -> Any:
        parts = [{"params": self.net[0].parameters(), "curvature": False}, {"params": self.net[2].parameters()}]
        return self.make(parts)


def test_directions_of_some_parameters_keep_no_graph(make_trainer, watch):
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(Partly(partial(NSGD, **SETTINGS, k=3, refresh_every=1)), batches(Partly))
    assert watch == ([], ["_at_once"] * 4)
    assert not any(block.basis.requires_grad for block in trainer.optimizers[0]._directions.blocks)


class Penalised(Classes):
    """Keeps a list of the parameters that it penalises."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.penalised = [p for p in self.net.parameters() if p.ndim > 1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.5 * sum(p.square().sum() for p in self.penalised)


class Hooked(Classes):
    """Lets a part of the gradient pass only."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.1)


@pytest.mark.parametrize("kind", **names([Penalised, Hooked]))
def test_parameters_that_are_used_past_the_module_give_the_same_directions(make_trainer, monkeypatch, kind):
    weights = []
    for _ in range(2):
        trainer = make_trainer(callbacks=[RefreshDirections()], limit_train_batches=1)
        trainer.fit(kind(partial(NSGD, **SETTINGS, k=3, refresh_every=1)), batches(kind))
        weights.append(trainer.optimizers[0].weights)
        monkeypatch.setattr(refresh, "columns_of", lambda parts: None)
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)
