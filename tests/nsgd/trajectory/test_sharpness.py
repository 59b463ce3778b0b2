"""Sharpness measurements on quadratics whose eigenvectors are known, and against the dense Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nsgd.curvature.hessian import loss_hessian
from nsgd.trajectory.line import vertex
from nsgd.trajectory.sharpness import (
    MULTIPLES,
    OFFSETS,
    alignment,
    batch_sharpness,
    best_multiple,
    cross_section,
    damped_sharpness,
    own_batch,
    random_direction,
    root_sum_square,
    stability_limit,
    step_losses,
)

VALUES = torch.tensor([20.0, 5.0, 1.0, 0.2, -0.5], dtype=torch.float64)


class Quadratic:
    """Loss of a batch: (theta - c)^T H (theta - c) / 2 with H of known eigenvectors, the rows of ``axes``."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.axes = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
        self.hessian = self.axes.T @ torch.diag(VALUES) @ self.axes
        self.minima = torch.randn(40, 5, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def loss(self, batch=slice(None)):
        z = self.weight - self.minima[batch]
        return 0.5 * ((z @ self.hessian) * z).sum(-1).mean()

    def gradient(self, batch=slice(None)):
        return torch.autograd.grad(self.loss(batch), self.weight)[0]


@pytest.fixture
def quadratic():
    return Quadratic()


def test_alignment_is_the_cosine_with_each_direction(quadratic):
    gradient = quadratic.gradient()
    found = alignment(gradient, quadratic.axes)
    torch.testing.assert_close(found, quadratic.axes @ gradient / gradient.norm())
    assert float(found.square().sum()) == pytest.approx(1)  # of a whole basis
    assert alignment(gradient.float(), quadratic.axes[:2].float()).dtype == torch.float64
    assert alignment(torch.zeros(5), quadratic.axes[:2].float()).isnan().all()


def test_the_norm_of_the_top_eigenvalues():
    assert root_sum_square(torch.tensor([3.0, 4.0])) == pytest.approx(5)


def test_batch_sharpness_is_the_mean_of_the_rayleigh_quotients(quadratic):
    expected = []
    for i in range(6):
        g = quadratic.gradient(i)
        expected.append(float(g @ quadratic.hessian @ g / (g @ g)))
    losses = [lambda i=i: quadratic.loss(i) for i in range(6)]
    assert batch_sharpness(losses, [quadratic.weight]) == pytest.approx(sum(expected) / 6, rel=1e-10)
    assert quadratic.weight.grad is None
    for loss in (quadratic.loss(2), losses[2]):
        gradient, batch = own_batch(loss, [quadratic.weight])
        torch.testing.assert_close(gradient, quadratic.gradient(2))
        assert batch.loss == pytest.approx(quadratic.loss(2).item())
        assert batch.squared_gradient == pytest.approx(float(gradient @ gradient))
        assert batch.sharpness == pytest.approx(expected[2], rel=1e-10)
    with pytest.raises(ValueError, match="loss of one batch or more"):
        batch_sharpness([], [quadratic.weight])


def test_a_cross_section_is_the_parabola_of_its_eigenvalue(quadratic):
    start, slopes = quadratic.loss().item(), quadratic.axes @ quadratic.gradient()
    offsets = torch.tensor(OFFSETS, dtype=torch.float64) * 0.3
    for axis, value, slope in zip(quadratic.axes, VALUES, slopes, strict=True):
        found = cross_section(quadratic.loss, [quadratic.weight], axis, scale=0.3)
        torch.testing.assert_close(found, start + offsets * slope + offsets**2 * value / 2, rtol=0, atol=1e-8)


@pytest.mark.parametrize("lr", [0.02, 0.3])
@pytest.mark.parametrize("i", range(4))
def test_the_best_multiple_is_that_of_the_mean_over_batches(quadratic, lr, i):
    axis, weight = quadratic.axes[i], [quadratic.weight]
    gradients = [quadratic.gradient(b) for b in range(40)]
    best = best_multiple(
        lr=lr,
        eigenvalue=float(VALUES[i]),
        slope=float(quadratic.gradient() @ axis),
        second_moment=float(torch.stack([g @ axis for g in gradients]).square().mean()),
    )
    multiples = torch.tensor([0.0, 0.5 * best, 1.2 * best, 2 * best], dtype=torch.float64)
    options = {"lr": lr, "direction": axis, "multiples": multiples.tolist()}
    losses = torch.stack([step_losses(quadratic.loss, weight, g, **options) for g in gradients]).mean(0)
    assert vertex(multiples, losses)[0] == pytest.approx(best, rel=1e-6)
    assert float(losses[-1]) == pytest.approx(float(losses[0]), rel=1e-10)
    standard = step_losses(quadratic.loss, weight, gradients[0], lr=lr, direction=axis)
    assert len(standard) == len(MULTIPLES)
    alone = step_losses(quadratic.loss, weight, gradients[0], lr=lr, direction=axis, multiples=[1.0])
    assert standard[MULTIPLES.index(1.0)] == alone[0]


def test_the_whole_step_is_that_of_sgd(quadratic):
    g = quadratic.gradient(3)
    found = step_losses(quadratic.loss, [quadratic.weight], g, lr=0.1, multiples=(1.0, 2.0))
    for multiple, value in zip((1.0, 2.0), found, strict=True):
        with torch.no_grad():
            quadratic.weight.sub_(0.1 * multiple * g)
            expected = quadratic.loss().item()
            quadratic.weight.add_(0.1 * multiple * g)
        assert float(value) == pytest.approx(expected, rel=1e-10)


def test_without_curvature_the_longest_step_is_best():
    assert best_multiple(lr=0.1, eigenvalue=-1.0, slope=1.0, second_moment=2.0) == math.inf


# -- stability ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2])
def test_damped_sharpness_is_that_of_the_dense_operator(quadratic, gamma, k):
    mixed = torch.linalg.qr(quadratic.axes[:k].T + 0.2).Q.T  # a stale basis
    root = torch.eye(5, dtype=torch.float64) - (1 - gamma**0.5) * mixed.T @ mixed
    expected = torch.linalg.eigvalsh(root @ quadratic.hessian @ root).max()
    with loss_hessian(quadratic.loss, [quadratic.weight]) as hessian:
        found = damped_sharpness(hessian.hvp, [quadratic.weight], mixed, gamma=gamma, tol=1e-10)
    torch.testing.assert_close(found.eigenvalues[0], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("sine", [0.0, 0.2, 1.0])
def test_the_limit_is_where_damped_steps_on_a_rank_one_quadratic_begin_to_grow(momentum, gamma, sine):
    lr = 0.05
    limit = stability_limit(lr=lr, momentum=momentum, gamma=gamma, sine=sine)
    if limit == math.inf:
        assert gamma == sine == 0
        return
    for curvature, grows in ((0.98 * limit, False), (1.02 * limit, True)):
        axis = torch.tensor([1.0, 0.0], dtype=torch.float64)
        basis = torch.tensor([math.sqrt(1 - sine**2), sine], dtype=torch.float64)
        damping = torch.eye(2, dtype=torch.float64) - (1 - gamma) * torch.outer(basis, basis)
        hessian = curvature * torch.outer(axis, axis)
        theta = torch.tensor([1.0, 0.3], dtype=torch.float64)
        velocity = torch.zeros(2, dtype=torch.float64)
        for _ in range(3000):
            velocity = momentum * velocity + hessian @ theta
            theta = theta - lr * damping @ velocity
            if theta.norm() > 1e3:
                break
        assert (float(theta.norm()) > 1e3) == grows


def test_a_random_direction_is_that_of_its_seed():
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    before = torch.get_rng_state()
    one, same, other = (random_direction(params, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert one.shape == (17,)
    assert float(one.norm()) == pytest.approx(1)
    assert abs(float(one @ other)) < 0.9
    assert random_direction([p.double() for p in params], seed=0).dtype == torch.float64
