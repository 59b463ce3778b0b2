"""What the measurements of a batch and of the sharpest directions say, against closed forms and dense Hessians."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from measured import (
    CENTRES,
    HESSIAN,
    ROTATION,
    SPECTRUM,
    Bowl,
    Iterates,
    bowls,
    drawn,
    gradient_at,
    loss_at,
    near,
    samples_of,
    table,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import RefreshDirections
from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic
from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor
from nsgd import NSGD

MULTIPLES = (1 / 4, 1 / 3, 1 / 2, 1, 2, 3, 4)  # the papers'
OFFSETS = (-16, -8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8, 16)


# -- one mini-batch --------------------------------------------------------------------------------------------------


def test_a_batch_of_a_quadratic_is_as_predicted(make_trainer):
    callback, iterates = BatchQuadratic(every=5), Iterates()
    kept = drawn(callback.evaluation, "draw_batches")
    make_trainer(callbacks=[iterates, callback], max_epochs=2).fit(
        Bowl(partial(torch.optim.SGD, lr=0.1, momentum=0.5)), bowls(12)
    )
    found = table(callback)
    assert sorted({r["step"] for r in callback.rows}) == [0, 5, 10, 15]
    for step, batches in zip([0, 5, 10, 15], kept[1:], strict=True):  # the first draw is a trial
        (own, sizes), (other, more) = batches
        assert (sizes, more, len(own[0]), len(other[0])) == (12, 12, 12, 12)
        assert len({tuple(c) for c in torch.cat([own[0], other[0]]).tolist()}) == 24  # none is in both
        theta = iterates.found[step]
        gradient = gradient_at(theta, own[0])
        best = float(gradient @ gradient / (gradient @ HESSIAN @ gradient))
        assert near(found[step, "lr", "", ""], 0.1)
        assert near(found[step, "squared gradient", "", ""], float(gradient @ gradient))
        assert near(found[step, "curvature", "", ""], float(gradient @ HESSIAN @ gradient))
        assert near(found[step, "best rate", "", ""], best)
        assert near(found[step, "R^2", "", ""], 1.0)
        rates = [at for s, quantity, of, at in found if (s, quantity, of) == (step, "loss", "own")]
        assert rates == pytest.approx([0, best / 4, best / 2, best, 1.5 * best, 2 * best])
        for rate in rates:
            for quantity in ("loss", "predicted loss"):
                assert near(found[step, quantity, "own", rate], loss_at(theta - rate * gradient, own[0]))
        rates = [at for s, quantity, of, at in found if (s, quantity, of) == (step, "loss", "held out")]
        assert rates == pytest.approx([0, 0.025, 0.05, 0.1, 0.15, 0.2, best])
        for rate in rates:
            assert near(found[step, "loss", "held out", rate], loss_at(theta - rate * gradient, other[0]))
    assert not torch.equal(kept[1][0][0][0], kept[2][0][0][0])  # fresh batches each time


def test_one_batch_is_the_same_along_the_whole_path(make_trainer):
    callback, iterates = BatchQuadratic(every=5, seed=3), Iterates()
    kept = drawn(callback.evaluation, "draw")
    make_trainer(callbacks=[iterates, callback], max_epochs=2).fit(
        Bowl(partial(torch.optim.SGD, lr=0.1, momentum=0.5)), bowls(12)
    )
    found = table(callback)
    fixed = [samples_of(parts) for parts in kept if len(parts) == 1]  # the fresh ones come in pairs
    assert len(fixed) == 4
    assert fixed[0].shape == (12, 7)
    assert all(torch.equal(batch, fixed[0]) for batch in fixed)
    for step in (0, 5, 10, 15):
        theta = iterates.found[step]
        gradient = gradient_at(theta, fixed[0])
        best = float(gradient @ gradient / (gradient @ HESSIAN @ gradient))
        assert near(found[step, "loss", "fixed", 0.0], loss_at(theta, fixed[0]))
        (at,) = {at for s, _, of, at in found if s == step and of == "fixed" and at}
        assert near(at, best)
        for quantity in ("loss", "predicted loss"):
            assert near(found[step, quantity, "fixed", at], loss_at(theta - best * gradient, fixed[0])), quantity


# -- the sharpest directions -----------------------------------------------------------------------------------------


class Small(pl.LightningModule):
    """Twelve parameters in float64 and a loss that is no quadratic."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.parametrize("samples", [10, 30])  # one graph, and several batches
def test_eigenvalues_are_those_of_the_dense_hessian(make_trainer, samples):
    x = CENTRES[:48, :2].contiguous()
    data = TensorDataset(x, (x.sum(1) > 0).long())
    callback, states = SharpnessMonitor(samples=samples, every=1, k=3, products=12), []

    class Before(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states.append(copy.deepcopy(pl_module.net.state_dict()))

    module = Small()
    make_trainer(callbacks=[Before(), callback], max_steps=2).fit(module, DataLoader(data, batch_size=12))
    x, y = (torch.cat([batch[i] for batch, _ in callback.evaluation.parts]) for i in (0, 1))
    assert len(x) == samples
    for step, state in enumerate(states):
        names, sizes = list(state), [v.numel() for v in state.values()]

        def loss(flat: Tensor, names: Any = names, sizes: Any = sizes, state: Any = state) -> Tensor:
            blocks = {n: b.view_as(state[n]) for n, b in zip(names, flat.split(sizes), strict=True)}
            return F.cross_entropy(torch.func.functional_call(module.net, blocks, (x,)), y)

        theta = torch.cat([v.reshape(-1) for v in state.values()])
        expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta)).flip(0)
        rows = [r for r in callback.rows if r["step"] == step]
        found = [r["value"] for r in rows if r["quantity"] == "eigenvalue"]
        assert [r["of"] for r in rows if r["quantity"] == "eigenvalue"] == ["e1", "e2", "e3"]
        # Lanczos stops at residuals of 1e-3 of the largest; eigenvalues err by the square of that.
        assert found == pytest.approx(expected[:3].tolist(), abs=2e-6 * float(expected[0]))
        total = next(r["value"] for r in rows if r["quantity"] == "root-sum-square")
        assert total == pytest.approx(float(expected.norm()), rel=1e-4)


def test_steps_along_the_sharpest_directions_of_a_quadratic(make_trainer):
    callback, iterates = SharpnessMonitor(samples=20, every=6, k=5, products=7, batches=3), Iterates()
    kept = drawn(callback.evaluation, "draw_batches")
    lr = 0.15
    make_trainer(callbacks=[iterates, callback]).fit(Bowl(partial(torch.optim.SGD, lr=lr, momentum=0.5)), bowls())
    found: dict[tuple[Any, ...], list[float]] = {}
    for r in callback.rows:
        found.setdefault((r["step"], r["quantity"], r["of"], r["at"]), []).append(r["value"])
    centres, vectors = samples_of(callback.evaluation.parts), ROTATION.T  # (7, 7), rows in the order of the eigenvalues
    assert len(kept) == 3  # the first draw is a trial
    for step, batches in zip((0, 6), kept[1:], strict=True):
        theta = iterates.found[step]
        full = gradient_at(theta, centres)
        gradients = [gradient_at(theta, batch[0]) for batch, _ in batches]
        assert len(gradients) == 3
        start = loss_at(theta, centres)
        assert near(found[step, "loss", "", ""][0], start)
        assert near(found[step, "stability limit", "", ""][0], 3 / lr)
        assert near(found[step, "root-sum-square", "", ""][0], float(SPECTRUM.norm()))
        sharpness = [float(g @ HESSIAN @ g / (g @ g)) for g in gradients]
        assert found[step, "batch sharpness", "", ""] == pytest.approx(sharpness, rel=1e-10)
        cosines = [float(g @ full / (g.norm() * full.norm())) for g in gradients]
        assert found[step, "alignment", "full gradient", ""] == pytest.approx(cosines, rel=1e-10)
        for i in range(5):
            name, e, bend = f"e{i + 1}", vectors[i], float(SPECTRUM[i])
            assert near(found[step, "eigenvalue", name, ""][0], bend)
            along = [abs(float(g @ e / g.norm())) for g in gradients]  # eigenvectors have no sign
            assert [abs(v) for v in found[step, "alignment", name, ""]] == pytest.approx(along, abs=1e-8)
            assert near(
                abs(found[step, "alignment of the full gradient", name, ""][0]), abs(float(full @ e / full.norm()))
            )
            slope, slopes = float(full @ e), torch.stack([g @ e for g in gradients])
            best = slope**2 / (lr * bend * float(slopes.square().mean()))
            assert found[step, "predicted best multiple", name, ""][0] == pytest.approx(best, rel=1e-6)
            for a in MULTIPLES:
                change = (
                    -a * lr * slope * float(slopes.mean()) + (a * lr) ** 2 * bend * float(slopes.square().mean()) / 2
                )
                assert near(found[step, "change after a step", name, a][0], change), (name, a)
            if i + 1 in (1, 3, 5):
                scale = lr * float(slopes.abs().mean())
                for offset in OFFSETS:
                    mirrored = {
                        round(start + sign * slope * scale * offset + bend * (scale * offset) ** 2 / 2, 6)
                        for sign in (1, -1)
                    }
                    assert round(found[step, "cross-section", name, offset][0], 6) in mirrored
        assert (step, "cross-section", "e2", 0) not in found
        for a in MULTIPLES:
            after = [loss_at(theta - a * lr * g, centres) - start for g in gradients]
            assert near(found[step, "change after a step", "whole step", a][0], sum(after) / 3)
        inside = [float(torch.stack([g @ e for e in vectors[:5]]).norm() / g.norm()) for g in gradients]
        assert found[step, "alignment", "basis", ""] == pytest.approx(inside, rel=1e-8)
        # Along one random direction: a parabola in the multiple, through 0.
        at = torch.tensor(MULTIPLES, dtype=torch.float64)
        change = torch.tensor([found[step, "change after a step", "random", a][0] for a in MULTIPLES], dtype=at.dtype)
        design = torch.stack([at, at**2], 1)
        fit = torch.linalg.lstsq(design, change[:, None]).solution
        assert float((design @ fit - change[:, None]).abs().max()) < 1e-10
        assert fit[1] > 0


@pytest.mark.parametrize("gamma", [0.0, 0.25, 4.0])
def test_the_sharpness_that_a_damped_step_feels(make_trainer, basis_of, gamma):
    callback = SharpnessMonitor(samples=8, every=4, k=1, products=7)
    optimizer = partial(NSGD, lr=0.05, momentum=0.5, k=2, gamma=gamma, refresh_every=100, decay=0.0, solver="lanczos")
    trainer = make_trainer(callbacks=[RefreshDirections(8), callback])
    trainer.fit(Bowl(optimizer), bowls())
    basis = basis_of(trainer.optimizers[0]).double()
    # Turned off the eigenvectors, so that the damped and the true sharpness differ by more than gamma.
    root = torch.eye(7, dtype=torch.float64) - (1 - gamma**0.5) * basis.T @ basis
    expected = float(torch.linalg.eigvalsh(root @ HESSIAN @ root)[-1])
    rows = [r for r in callback.rows if r["quantity"] == "felt sharpness"]
    assert [r["step"] for r in rows] == [4, 8]  # none before the first directions
    assert [r["value"] for r in rows] == pytest.approx([expected] * 2, rel=1e-5)
    limits = {(r["quantity"], r["step"]): r["value"] for r in callback.rows if "limit" in r["quantity"]}
    assert limits["stability limit", 4] == pytest.approx(3 / 0.05)
    assert limits["damped stability limit", 4] == (pytest.approx(3 / 0.05 / gamma) if gamma else float("inf"))
