"""Faults found in the measurements: each of these fails as the source stands."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from measured import FREQUENT, MAKERS, SGD, Counted, Stream, Tally
from pytorch_lightning.callbacks import BaseFinetuning
from strangers import Everything, Smooth, loader
from test_measurements import WithCurvature
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_modules import RefreshDirections
from lightning_modules.callbacks.measurements.averaging import AveragingExperiment
from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic
from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor
from lightning_modules.callbacks.measurements.valley import ValleyWalk
from lightning_modules.report.measurements.report import write_measurements
from lightning_modules.support.files import read_csv
from nsgd import NSGD
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.valley import segment

SMALL = {"features": 2, "number": 2}


@pytest.mark.parametrize("options", [{}, {"every": 8, "length": 5}], ids=["shorter than a burst", "ends in a burst"])
def test_a_burst_that_training_cuts_off_is_in_the_file(make_trainer, tmp_path, options):
    callback = ValleyWalk(samples=8, points=2, **options)
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(samples=160, **SMALL))  # ten steps
    assert len(read_csv(tmp_path / "valley.csv")) == len(callback.rows) > 0
    assert callback._last is None
    assert callback._gradient is None


def test_bursts_of_a_short_run_do_not_cut_each_other(make_trainer):
    callback = ValleyWalk(samples=4, points=2, length=10, overhead=100.0)
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(samples=16 * 24, **SMALL))
    steps = [[r["step"] for r in callback.rows if r["measurement"] == m and r["quantity"] == "height"] for m in (1, 2)]
    assert [len(s) for s in steps] == [10, 10]


@pytest.mark.parametrize("name", ["valley", "sharpness", "averaging"])
def test_batchnorm_never_sees_one_sample(make_trainer, name):
    make_trainer(callbacks=[FREQUENT[name](samples=17)]).fit(Everything(SGD), loader(samples=112))


class Penalised(Smooth):
    """A gradient penalty, as in WGAN-GP and in physics-informed networks."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        out = self.net(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + slope.square().mean()


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_penalty_in_training_step_can_be_measured(make_trainer, name):
    callback = FREQUENT[name]()
    make_trainer(callbacks=[callback]).fit(Penalised(SGD), loader(samples=112, **SMALL))
    assert callback.rows


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


@pytest.mark.parametrize("every", [2, 5])  # 5: in the middle of a burst
def test_a_valley_goes_on_where_layers_are_unfrozen(make_trainer, every):
    callback = ValleyWalk(samples=8, every=every, length=2, points=2)
    module = Smooth(lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1))
    make_trainer(callbacks=[Unfreeze(), callback], max_epochs=3).fit(module, loader(**SMALL))
    assert callback.rows


class Private(Smooth):
    """Noise from a generator of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__(SGD)
        self.kind = kind
        self.own: Any = torch.Generator().manual_seed(0) if kind == "torch" else np.random.default_rng(0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        shape = batch[0].shape
        if self.kind == "torch":
            noise = torch.randn(shape, generator=self.own)
        else:
            noise = torch.from_numpy(self.own.normal(size=shape)).float()
        return super().training_step([batch[0] + noise, batch[1]], batch_idx)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_generator_of_the_modules_own_is_put_back(make_trainer, kind):
    weights = []
    for callbacks in ([], [BatchQuadratic(every=1)]):
        module = Private(kind)
        make_trainer(callbacks=callbacks).fit(module, loader(**SMALL))
        weights.append([p.tolist() for p in module.parameters()])
    assert weights[0] == weights[1]


def test_points_of_a_line_see_the_same_buffers():
    """Spectral normalisation iterates at every forward pass."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()  # training has moved on since the last forward pass
    x, params = torch.randn(8, 4), list(layer.parameters())
    direction = torch.zeros(sum(p.numel() for p in params))
    found = losses_along(lambda: layer(x).square().mean(), params, direction, [0.0, 1.0, 2.0])
    assert found[0] == found[1] == found[2]


def test_products_of_a_damped_step_over_several_batches_cost_three(make_trainer, monkeypatch):
    tally = Tally(monkeypatch)
    callback = tally.around(SharpnessMonitor(samples=40, every=3, k=2, products=6))
    monkeypatch.setattr(Counted, "tally", tally)
    module = Counted(partial(NSGD, lr=0.1, k=2, gamma=0.1, refresh_every=2))
    make_trainer(callbacks=[callback, RefreshDirections(4)]).fit(module, loader(samples=112, **SMALL))
    assert callback.gradients == pytest.approx(tally.work / 16, rel=1e-12)


@pytest.mark.parametrize("name", ["quadratic", "sharpness", "valley"])
def test_a_run_of_several_optimizers_meets_its_starts(make_trainer, name):
    """The global step goes up by two, and starts may be odd."""
    callback = MAKERS[name](overhead=1e-6, **({"length": 3} if name == "valley" else {}))
    make_trainer(callbacks=[callback]).fit(
        WithCurvature(SGD, toggle=True), loader(samples=160 if name == "valley" else 176)
    )
    assert callback.rows


@pytest.mark.parametrize("name", MAKERS)
def test_what_cannot_be_measured_is_said_before_the_first_step(make_trainer, name):
    module = Smooth(SGD)
    before = [p.tolist() for p in module.parameters()]
    with pytest.raises(ValueError, match="over an IterableDataset"):
        make_trainer(callbacks=[MAKERS[name](overhead=1e-6)], max_steps=8, max_epochs=-1).fit(
            module, DataLoader(Stream(), batch_size=4)
        )
    assert [p.tolist() for p in module.parameters()] == before


def test_the_averaging_experiment_does_not_stand_still_after_a_schedule_to_zero(make_trainer):
    class Cooled(Smooth):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    callback = AveragingExperiment(samples=8, steps=8)
    make_trainer(callbacks=[callback]).fit(Cooled(SGD), loader(samples=160, **SMALL))
    assert next(r["value"] for r in callback.rows if r["quantity"] == "lr") > 0


def test_two_measurements_of_one_kind_beside_each_other(make_trainer, tmp_path):
    make_trainer(callbacks=[BatchQuadratic(every=3), BatchQuadratic(every=4, seed=1)]).fit(Smooth(SGD), loader(**SMALL))
    assert {p.name for p in tmp_path.iterdir()} == {"quadratic.csv", "quadratic-1.csv"}


def test_a_barrier_of_nan_losses_is_nan():
    nan = float("nan")
    found = segment(torch.linspace(0, 1, 4), torch.tensor([1.0, nan, nan, nan]))
    assert np.isnan(found.barrier)


class Scheduled(Smooth):
    """A rate that is 0 throughout, or at the first step alone."""

    warms_up = False

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * step if self.warms_up else 0.0)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]


@pytest.mark.parametrize("warms_up", [False, True])
@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=1.0), partial(NSGD, lr=1.0, k=2)], ids=["SGD", "NSGD"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_rate_of_0_is_measured_and_has_a_page(make_trainer, tmp_path, name, make, warms_up):
    module = Scheduled(make)
    module.warms_up = warms_up
    callback = FREQUENT[name](path=tmp_path / f"{name}.csv")
    make_trainer(callbacks=[callback]).fit(module, loader(samples=16 * 8, **SMALL))
    page = write_measurements(tmp_path, {name: tmp_path / f"{name}.csv"}, title="lr 0").read_text(encoding="utf-8")
    assert len(callback.rows) > 0
    if name == "quadratic":
        assert ("no multiple of lr, which was 0" in page) != warms_up
