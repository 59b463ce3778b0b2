"""Measuring along the way leaves training as it would have been, whatever the module."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from measured import EACH, FREQUENT, MAKERS, SGD, all_four
from strangers import Adversarial, Everything, Memory, Regression, Rows, Smooth, classes, loader, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from lightning_modules import ReadOuts, RefreshDirections
from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic
from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor
from lightning_modules.callbacks.measurements.valley import ValleyWalk
from lightning_modules.support.files import read_csv
from nsgd import NSGD

# -- training stays bit-identical ------------------------------------------------------------------------------------


class Jittered(Dataset[Any]):
    """Draws from the global generator for every sample, as random transforms do."""

    def __init__(self) -> None:
        self.x, self.y = classes(64).tensors

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(6), self.y[i]


class Watched(Everything):
    """The same with a network that stays in eval mode, and validation."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.still = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.still.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.still.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert not self.still.training
        return super().training_step([self.still(batch[0]), batch[1]], batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]).float(), batch[1]) + torch.rand(()))


def train(make_trainer: Any, random_state: Any, optimizer: Any, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    module, logger = Watched(optimizer), Memory()
    torch.manual_seed(11)
    refresh = [RefreshDirections(8)] if optimizer in (OPTIMIZERS["NSGD"],) else []
    trainer = make_trainer(
        max_epochs=2, logger=logger, callbacks=[*refresh, *callbacks], val_check_interval=3, **options
    )
    trainer.fit(module, DataLoader(Jittered(), batch_size=8, shuffle=True), loader(samples=16, seed=5))
    return {
        "module": module.plain_state(),
        "optimizer": _plain(trainer.optimizers[0].state_dict()),
        "logged": [
            (step, {k: repr(v) for k, v in row.items()})
            for step, row in logger.rows
            if not any(name.startswith("sharpness/") for name in row)
        ],
        "callback_metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "modes": [m.training for m in module.modules()],
        "random": random_state(),
        "frozen": [p.requires_grad for p in module.parameters()],
        "grads": _plain([p.grad for p in module.parameters()]),
        "read-outs": _plain([c.state_dict() for c in callbacks if isinstance(c, ReadOuts)]),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return repr(value)  # NaN equals NaN


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "NSGD": partial(NSGD, lr=0.05, momentum=0.9, k=2, gamma=0.1, refresh_every=3),
}
PRECISIONS = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        ("SGD", "plain"),
        ("SGD", "accumulated and clipped"),
        ("AdamW", "bf16-mixed"),
        ("NSGD", "plain"),
        ("NSGD", "accumulated and clipped"),
        ("NSGD", "bf16-mixed"),
    ],
)
def test_measuring_leaves_training_bit_identical(make_trainer, random_state, optimizer, way):
    make, options = OPTIMIZERS[optimizer], PRECISIONS[way]
    without = train(make_trainer, random_state, make, [ReadOuts()], **options)
    layers = [SharpnessMonitor(8, every=3, k=1, products=4, params=["net.0.*"], brief=brief) for brief in (False, True)]
    callbacks = [*all_four(), *layers]
    measured = train(make_trainer, random_state, make, [ReadOuts(), *callbacks], **options)
    assert all(len(c.rows) > 20 for c in callbacks)
    for what in without:
        assert measured[what] == without[what], what


@EACH
def test_each_measurement_alone_leaves_training_bit_identical(make_trainer, random_state, name):
    without = train(make_trainer, random_state, SGD, [])
    callback = FREQUENT[name]()
    measured = train(make_trainer, random_state, SGD, [callback])
    assert callback.rows
    for what in without:
        assert measured[what] == without[what], what


def test_the_comparison_sees_one_more_random_number(make_trainer, random_state):
    """So that the tests above compare with something that acts."""

    class Draws(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.rand(())

    plain = train(make_trainer, random_state, SGD, [])
    assert train(make_trainer, random_state, SGD, [Draws()])["module"] != plain["module"]


# -- strange modules -------------------------------------------------------------------------------------------------


class Recurrent(pl.LightningModule):
    """A recurrent network with a frozen part and a part that its loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.GRU(6, 5, batch_first=True, num_layers=2, dropout=0.2), nn.Linear(5, 3)
        self.spare = nn.Linear(2, 2)
        self.rnn.weight_ih_l0.requires_grad_(False)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        states = self.rnn(batch[0].unsqueeze(1).expand(-1, 4, -1))[0]
        return F.cross_entropy(self.out(states[:, -1]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NSGD(self.parameters(), lr=0.1, k=2, refresh_every=3)


@pytest.mark.filterwarnings("ignore:the directions have no share in the parameter")  # the idle one
def test_a_recurrent_network_with_frozen_and_idle_parts(make_trainer):
    module, callbacks = Recurrent(), all_four()
    frozen, idle = module.rnn.weight_ih_l0.detach().clone(), module.spare.weight.detach().clone()
    make_trainer(callbacks=[RefreshDirections(8), *callbacks]).fit(module, loader(samples=112))
    assert all(c.rows for c in callbacks)
    assert torch.equal(module.rnn.weight_ih_l0, frozen)
    assert torch.equal(module.spare.weight, idle)


def test_batches_in_dictionaries_and_schedulers(make_trainer):
    callbacks = [BatchQuadratic(every=3), FREQUENT["sharpness"](every=30), FREQUENT["averaging"]()]
    trainer = make_trainer(callbacks=callbacks, max_epochs=6)
    trainer.fit(Regression(SGD), DataLoader(Rows(), batch_size=16))
    assert all(c.rows for c in callbacks)
    rates = [(r["step"], r["value"]) for r in callbacks[0].rows if r["quantity"] == "lr"]
    assert rates == [(s, 0.05 if s < 30 else 0.025) for s in range(0, 36, 3)]


class WithCurvature(Adversarial):
    def curvature_loss(self, batch: list[Tensor]) -> Tensor:
        return sum(self.losses(batch[0]), torch.zeros(()))


@pytest.mark.parametrize("name", ["quadratic", "sharpness", "averaging"])
def test_two_networks_with_a_curvature_loss_stay_bit_identical(make_trainer, name):
    weights = []
    for callbacks in ([], [FREQUENT[name]()]):
        module = WithCurvature(SGD, toggle=True)
        make_trainer(callbacks=callbacks).fit(module, loader(samples=112))
        weights.append([p.tolist() for p in module.parameters()])
        assert all(c.rows for c in callbacks)
    assert weights[0] == weights[1]


def test_several_loaders_are_refused(make_trainer):
    loaders = [loader(features=2, number=2), loader(features=2, number=2)]

    class Both(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0], batch_idx)

    with pytest.raises(ValueError, match=r"expected a DataLoader over a data set with a length.*got list"):
        make_trainer(callbacks=[BatchQuadratic(every=1)]).fit(Both(SGD), loaders)


def test_samples_are_drawn_as_the_trainer_moves_them(make_trainer):
    """on_after_batch_transfer is part of a batch."""

    class Scaled(Smooth):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [10 * batch[0], batch[1]]

    callback = ValleyWalk(samples=16, length=2)
    data = TensorDataset(torch.ones(48, 2), torch.randint(2, (48,), generator=seeded(0)))
    make_trainer(callbacks=[callback]).fit(Scaled(SGD), DataLoader(data, batch_size=16))
    assert callback.evaluation.parts[0][0][0].tolist() == [[10.0, 10.0]] * 16


def test_samples_are_drawn_from_the_whole_data_set_whatever_the_sampler(make_trainer):
    callback = ValleyWalk(samples=48, length=2)
    data = TensorDataset(torch.arange(96.0).reshape(48, 2), torch.arange(48) % 2)
    sampler = SubsetRandomSampler(range(16), generator=seeded(0))
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), DataLoader(data, batch_size=8, sampler=sampler))
    drawn = torch.cat([batch[0][:, 0] for batch, _ in callback.evaluation.parts])
    assert drawn.sort().values.tolist() == data.tensors[0][:, 0].tolist()


@EACH
def test_only_training_is_measured(make_trainer, name):
    class Validated(Smooth):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.training_step(batch, batch_idx))

    callback = MAKERS[name]()
    make_trainer(callbacks=[callback]).test(Validated(SGD), loader(features=2, number=2), verbose=False)
    assert not callback.rows


def test_rows_are_read_back(make_trainer, tmp_path):
    callback = FREQUENT["valley"]()
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(features=2, number=2, samples=112))
    found = read_csv(tmp_path / "valley.csv")
    assert [repr(r["value"]) for r in found] == [repr(r["value"]) for r in callback.rows]
