"""SAM with our classifier: its step against NumPy, and all else against plain SGD under automatic optimization."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from strangers import Memory
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import Classifier, Digits, SharpnessMonitor
from lightning_modules.models.batch_loss import batch_loss
from lightning_modules.models.sharpness_aware import SharpnessAware

NETS: dict[str, dict[str, Any]] = {
    "mlp": {"net": "mlp"},
    "BatchNorm": {"net": "resnet-20", "sizes": {"depth": 8, "widths": [4, 8, 8]}},
}

# Of a scheduler, with the number of rates in 3 epochs of 4 steps; the third step of an epoch is its only third one.
SCHEDULES = [(None, 1), ({}, 4), ({"frequency": 2}, 2), ({"interval": "step", "frequency": 3}, 4)]


class Plain(Classifier):
    """SGD under automatic optimization."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)


class HalfSquare(nn.Module):
    """Half the mean squared distance from the labels as unit vectors."""

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0.5 * (outputs - F.one_hot(labels, 3)).square().sum(1).mean()


def build(kind: type[Classifier], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(lr=0.1, **options)


def digits() -> Digits:
    return Digits(batch_size=50, limit=250)  # 4 steps an epoch


def states(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# -- the step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.05, 2.0])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_steps_on_least_squares_are_the_closed_form(make_trainer, rho, momentum, weight_decay):
    """Half the mean square of W x - y has gradient (W X^T - Y^T) X / n; SAM in NumPy, SGD as torch defines it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (12,), generator=generator)
    module = build(SharpnessAware, num_classes=3, rho=rho, momentum=momentum, weight_decay=weight_decay)
    module.net = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    module.loss = HalfSquare()
    w, velocity = module.net.weight.detach().numpy().copy(), 0.0
    loader = DataLoader(TensorDataset(x, labels), batch_size=4)
    make_trainer(max_epochs=2).fit(module, loader, loader)
    for _ in range(2):
        for rows, marks in zip(x.numpy().reshape(3, 4, 4), np.eye(3)[labels.numpy()].reshape(3, 4, 3), strict=True):
            gradient = (w @ rows.T - marks.T) @ rows / 4
            there = w + rho * gradient / np.linalg.norm(gradient)
            velocity = momentum * velocity + (there @ rows.T - marks.T) @ rows / 4 + weight_decay * w
            w = w - 0.1 * velocity
    # The library takes the norm in float32, whose rounding of 6e-8 moves the weights of the second gradient.
    np.testing.assert_allclose(module.net.weight.detach().numpy(), w, rtol=0, atol=1e-7 * rho)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("schedule", "rates"), SCHEDULES, ids=str)
def test_rho_0_is_sgd_bit_for_bit_and_so_is_what_it_logs(make_trainer, net, schedule, rates):
    """Weights, statistics, losses, accuracies, steps and rates: each batch counts once."""

    def fit(kind: type[Classifier], **options: Any) -> tuple[pl.Trainer, Any, list[Any]]:
        class Scheduled(kind):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                scheduler = {"scheduler": StepLR(optimizer, 1, 0.7), **(schedule or {})}
                return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

            def on_train_batch_end(self, *_: Any) -> None:
                used.append(self.trainer.optimizers[0].param_groups[0]["lr"])

        used: list[float] = []
        logger, module = Memory(), build(Scheduled, **NETS[net], **options)
        trainer = make_trainer(max_epochs=3, logger=logger)
        trainer.fit(module, datamodule=digits())
        return trainer, module, [logger.rows, used, trainer.global_step, trainer.callback_metrics]

    _, plain, told = fit(Plain)
    trainer, module, found = fit(SharpnessAware, rho=0.0, momentum=0.9, weight_decay=0.01)
    assert_same(states(module), states(plain))
    assert found == told
    assert trainer.global_step == 12
    assert len(set(found[1])) == rates


def test_a_larger_rho_is_another_path(make_trainer):
    ends = []
    for rho in (0.0, 0.05):
        module = build(SharpnessAware, rho=rho)
        make_trainer(max_steps=3).fit(module, datamodule=digits())
        ends.append(module.net[-1].weight)
    assert not torch.equal(*ends)


# -- what the second gradient leaves --------------------------------------------------------------------------


def test_statistics_are_those_of_the_first_pass_and_a_step_takes_two_gradients(make_trainer):
    module = build(SharpnessAware, **NETS["BatchNorm"], rho=0.5)
    twin, seen = copy.deepcopy(module.net), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            twin.load_state_dict(module.net.state_dict())
            twin.train()(batch[0])
            seen.append(0)

        def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
            seen[-1] += 1

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            assert_same(dict(twin.named_buffers()), dict(module.net.named_buffers()))

    make_trainer(callbacks=[Watch()]).fit(module, datamodule=digits())
    assert seen == [module.gradients_per_step] * 4 == [2] * 4
    assert next(b for name, b in twin.named_buffers() if name.endswith("num_batches_tracked")) == 4


def test_a_measured_run_is_bitwise_the_unmeasured_one(make_trainer, tmp_path):
    ends = []
    for callbacks in ([], [SharpnessMonitor(path=tmp_path / "sharpness.csv", every=2)]):
        module = build(SharpnessAware, **NETS["BatchNorm"])
        make_trainer(callbacks=callbacks).fit(module, datamodule=digits())
        ends.append(states(module))
    assert_same(*ends)
    assert (tmp_path / "sharpness.csv").read_text().count("\n") > 2


def test_the_curvature_loss_is_the_cross_entropy_of_the_batch():
    module = build(SharpnessAware)
    images, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    assert torch.equal(batch_loss(module, (images, labels)), F.cross_entropy(module(images), labels))


# -- checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_resuming_at_an_epochs_end_is_bitwise_uninterrupted(make_trainer, tmp_path, epoch):
    class Scheduled(SharpnessAware):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [StepLR(optimizer, 1, 0.7)]

    def fit(resume: str | None = None) -> tuple[pl.Trainer, Any]:
        pl.seed_everything(3, verbose=False)
        saves = [ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)] if resume is None else []
        trainer = make_trainer(max_epochs=4, callbacks=saves, enable_checkpointing=bool(saves))
        module = Scheduled(**NETS["BatchNorm"], rho=0.2)
        trainer.fit(module, datamodule=digits(), ckpt_path=resume)
        return trainer, module

    (whole, module), (resumed, again) = fit(), fit(str(tmp_path / f"epoch={epoch}.ckpt"))
    assert_same(states(again), states(module))
    assert resumed.global_step == whole.global_step == 16
    one, other = (t.optimizers[0].state_dict() for t in (whole, resumed))
    assert one["param_groups"] == other["param_groups"]
    assert one["param_groups"][0]["lr"] == pytest.approx(0.1 * 0.7**4)
    for i, entry in one["state"].items():
        assert entry.keys() == {"momentum_buffer"}
        assert torch.equal(entry["momentum_buffer"], other["state"][i]["momentum_buffer"])


def test_a_checkpoint_rebuilds_the_module(make_trainer, tmp_path):
    module = SharpnessAware("mlp", [1, 8, 8], 10, 0.02, sizes={"hidden": [8]}, rho=0.3, momentum=0.5, weight_decay=0.1)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=digits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SharpnessAware.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.lr, loaded.rho, loaded.momentum, loaded.weight_decay) == (0.02, 0.3, 0.5, 0.1)
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), module.eval()(images))


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "rho", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_an_option_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"expected {name} to be a finite number >= 0, got {value}"):
        SharpnessAware(**{name: value})


def test_a_gradient_scaler_is_refused(make_trainer):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"float32 or bfloat16 for SAM.*bf16-mixed"):
        make_trainer(plugins=[plugin]).fit(SharpnessAware(), datamodule=digits())


def test_several_processes_are_refused(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="expected one process for SAM, got 2"):
        trainer.fit(SharpnessAware(), datamodule=digits())


def test_a_scheduler_that_needs_a_metric_is_refused(make_trainer):
    class Scheduled(SharpnessAware):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [ReduceLROnPlateau(optimizer)]

    with pytest.raises(ValueError, match="got ReduceLROnPlateau"):
        make_trainer().fit(Scheduled(), datamodule=digits())


def test_it_trains_in_bfloat16(make_trainer):
    module = build(SharpnessAware)
    before = states(module)
    trainer = make_trainer(precision="bf16-mixed")
    trainer.fit(module, datamodule=digits())
    assert trainer.global_step == 4
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in module.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
