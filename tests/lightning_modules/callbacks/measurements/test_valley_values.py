"""The valley between iterates, against closed forms on a quadratic, and against the loss itself."""

from __future__ import annotations

import copy
import itertools
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from measured import CENTRES, HESSIAN, Bowl, Iterates, bowls, gradient_at, loss_at, near, samples_of, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_modules import RefreshDirections
from lightning_modules.callbacks.measurements.valley import ValleyWalk
from nsgd import NSGD, damp

# -- the valley ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum and weight decay": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "NSGD": partial(NSGD, lr=0.1, k=2, gamma=0.1, refresh_every=4, solver="lanczos"),
    "damped Adam": lambda params: damp(torch.optim.Adam(params, lr=0.3), k=2, gamma=0.0, solver="lanczos"),
}


@pytest.mark.parametrize(
    ("optimizer", "accumulate"),
    [("SGD", 1), ("SGD", 2), ("momentum and weight decay", 1), ("NSGD", 1), ("NSGD", 2), ("damped Adam", 1)],
)
def test_the_valley_of_a_quadratic_is_as_predicted(make_trainer, optimizer, accumulate):
    callback, iterates = ValleyWalk(samples=20, every=8, length=6, points=5), Iterates()
    refresh = [RefreshDirections(8)] if optimizer in ("NSGD", "damped Adam") else []
    trainer = make_trainer(
        callbacks=[*refresh, callback, iterates], accumulate_grad_batches=accumulate, max_epochs=2 * accumulate
    )
    module = Bowl(OPTIMIZERS[optimizer])
    trainer.fit(module, bowls())
    found, centres = table(callback), samples_of(callback.evaluation.parts)
    steps = sorted({r["step"] for r in callback.rows})
    assert steps == [*range(6), *range(8, 14), *range(16, 22)]
    assert len(centres) == 20
    for step in steps:
        here, there = iterates.found[step], iterates.found[step + 1]
        for i in range(6):
            alpha = i / 5
            assert near(found[step, "loss", "", alpha], loss_at((1 - alpha) * here + alpha * there, centres))
        move = there - here
        bend = float(move @ HESSIAN @ move)
        best = -float(gradient_at(here, centres) @ move) / bend
        floor = loss_at(here + best * move, centres)
        height = (loss_at(here, centres) + loss_at(there, centres)) / 2 - floor
        for quantity in ("position", "predicted position"):
            # The vertex divides differences of losses, of about 10 with an error of 1e-15, by the bend.
            assert near(found[step, quantity, "", ""], best, abs=1e-8 + 1e-12 / bend), quantity
        for quantity in ("height", "predicted height"):
            assert near(found[step, quantity, "", ""], height), quantity
        assert near(found[step, "floor", "", ""], floor)
        inner = [loss_at(here + i / 5 * move, centres) for i in range(1, 5)]
        assert near(found[step, "grid floor", "", ""], min(inner))
        assert near(found[step, "grid position", "", ""], (1 + inner.index(min(inner))) / 5)
        assert found[step, "barrier", "", ""] == 0
        assert near(found[step, "distance", "", ""], float((there - iterates.found[0]).norm()))
        assert found[step, "loss", "", 1.0] == found.get((step + 1, "loss", "", 0.0), found[step, "loss", "", 1.0])
        if step - 1 in steps:
            one, other = (
                torch.stack([gradient_at(iterates.found[s], batch) for batch in iterates.batches[s]]).mean(0)
                for s in (step - 1, step)
            )
            assert near(found[step, "cosine", "", ""], float(F.cosine_similarity(one, other, dim=0)))
        else:
            assert np.isnan(found[step, "cosine", "", ""])


def test_barriers_along_the_floor_are_those_of_the_floors(make_trainer):
    callback = ValleyWalk(samples=20, every=30, length=30, points=2)
    make_trainer(callbacks=[callback], max_epochs=3, max_steps=30).fit(Bowl(partial(torch.optim.SGD, lr=0.2)), bowls())
    floors = [r["value"] for r in callback.rows if r["quantity"] == "floor"]
    expected, height = [], 0.0
    for one, other in itertools.pairwise(floors):
        if other >= one:
            height += other - one
        elif height > 0:
            expected.append(height)
            height = 0.0
    found = [r for r in callback.rows if r["quantity"] == "floor barrier"]
    assert len(expected) > 1
    assert [r["at"] for r in found] == list(range(len(expected)))
    assert [r["value"] for r in found] == pytest.approx(expected, abs=1e-12)


class Random(pl.LightningModule):
    """Draws from every generator in its step: dropout, BatchNorm, and augmentation by torch, Python and NumPy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2))

    def flat(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters()])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        shift = random.random() + np.random.rand() + torch.rand(())
        return self.net(batch[0] + shift).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Jittered(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> list[Tensor]:
        return [CENTRES[i, :4].float() + torch.randn(4) + random.random()]


@pytest.mark.parametrize("samples", [8, 24])
def test_segments_join_to_the_bit_with_dropout_and_augmentation(make_trainer, samples):
    callback, iterates = ValleyWalk(samples=samples, every=8, length=8, points=3), Iterates()
    module = Random()
    states: dict[int, Any] = {}

    class Buffers(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

    make_trainer(callbacks=[callback, iterates, Buffers()], max_epochs=2).fit(module, DataLoader(Jittered(), 8))
    found, other = table(callback), Random().train()
    assert [n for _, n in callback.evaluation.parts] == [8] * (samples // 8)
    for step in range(16):
        for at, alpha in ((step, 0.0), (step + 1, 1.0)):
            other.load_state_dict(states[at])
            total = torch.zeros((), dtype=torch.float64)
            for batch, n in callback.evaluation.parts:
                torch.manual_seed(0)
                random.seed(0)
                np.random.seed(0)
                total += other.training_step(batch, 0).detach() * n / samples
            # Sums of float32 losses in another order where there are several batches.
            expected = pytest.approx(float(total), rel=0 if samples == 8 else 1e-6)
            assert found[step, "loss", "", alpha] == expected, (step, alpha)
        assert found[step, "loss", "", 1.0] == found.get((step + 1, "loss", "", 0.0), found[step, "loss", "", 1.0])
