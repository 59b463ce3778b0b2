from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd import sample_losses
from nsgd.curvature.hessian import loss_hessian

# Both sides are exact in float64; what differs is the order of summation.
CLOSE = {"rtol": 1e-7, "atol": 1e-10}


def dense(hvp, size):
    return torch.stack([hvp(row) for row in torch.eye(size, dtype=torch.float64)])


# -- products -------------------------------------------------------------------------------------------------


def test_products_of_a_loss_equal_the_dense_hessian(problem):
    with loss_hessian(problem.loss(), problem.params) as hessian:
        found = dense(hessian.hvp, problem.size)
    torch.testing.assert_close(found, problem.hessian(), **CLOSE)


def test_products_of_a_closure_equal_the_dense_hessian(problem):
    with loss_hessian(problem.loss, problem.params) as hessian:
        found = dense(hessian.hvp, problem.size)
    torch.testing.assert_close(found, problem.hessian(), **CLOSE)


@pytest.mark.parametrize(
    "problem", ["regression", "tanh_mlp", "conv_batchnorm", "partly_frozen", "unused_parameter"], indirect=True
)
def test_batches_of_unequal_size_are_weighted_by_their_samples(problem):
    total = sum(n for _, n in problem.parts)
    expected = sum(problem.hessian(part) * (n / total) for part, n in problem.parts)
    with loss_hessian(problem.batches(), problem.params) as hessian:
        found = dense(hessian.hvp, problem.size)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_batches_of_a_sample_mean_are_the_whole_batch():
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def loss(part):
        return (part @ weight).tanh().square().mean()

    with loss_hessian(loss(x), [weight]) as whole:
        expected, gradient = dense(whole.hvp, 3), whole.gradient
    with loss_hessian([(lambda: loss(x[:2]), 2), (lambda: loss(x[2:]), 7)], [weight]) as parts:
        torch.testing.assert_close(dense(parts.hvp, 3), expected, **CLOSE)
        torch.testing.assert_close(parts.gradient, gradient, **CLOSE)


@pytest.mark.parametrize("source", ["loss", "batches"])
def test_the_gradient_is_that_of_backward(problem, source):
    total = sum(n for _, n in problem.batches())
    loss = problem.loss() if source == "loss" else sum(closure() * (n / total) for closure, n in problem.batches())
    loss.backward()
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in problem.params])
    with loss_hessian(problem.loss() if source == "loss" else problem.batches(), problem.params) as hessian:
        torch.testing.assert_close(hessian.gradient, expected, **CLOSE)
        assert not hessian.gradient.requires_grad


@pytest.mark.parametrize("problem", ["tanh_mlp"], indirect=True)
@pytest.mark.parametrize("source", ["loss", "closure", "batches"])
def test_the_scale_is_taken_out_of_gradient_and_products(problem, source):
    def scaled(scale):
        return {
            "loss": problem.loss() * scale,
            "closure": lambda: problem.loss() * scale,
            "batches": [(lambda c=c: c() * scale, n) for c, n in problem.batches()],
        }[source]

    with (
        loss_hessian(scaled(1.0), problem.params) as plain,
        loss_hessian(scaled(1024.0), problem.params, scale=1024.0) as h,
    ):
        torch.testing.assert_close(h.gradient, plain.gradient, **CLOSE)
        torch.testing.assert_close(dense(h.hvp, problem.size), dense(plain.hvp, problem.size), **CLOSE)


@pytest.mark.parametrize("problem", ["tanh_mlp"], indirect=True)
def test_cost_counts_two_gradients_a_product_on_a_kept_graph_and_three_on_a_rebuilt_one(problem):
    with (
        loss_hessian(problem.loss(), problem.params) as kept,
        loss_hessian(problem.batches(), problem.params) as rebuilt,
    ):
        assert kept.cost(5) == 1 + 2 * 5
        assert rebuilt.cost(5) == 1 + 3 * 5


@pytest.mark.parametrize("problem", ["tanh_mlp"], indirect=True)
def test_products_are_taken_under_no_grad_too(problem):
    with torch.no_grad(), loss_hessian(problem.loss, problem.params) as hessian:
        found = dense(hessian.hvp, problem.size)
    torch.testing.assert_close(found, problem.hessian(), **CLOSE)


def test_mixed_dtypes_give_one_float64_operator():
    low = nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.bfloat16))
    mid = nn.Parameter(torch.tensor([0.75], dtype=torch.float32))
    high = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    theta = torch.cat([low.double(), mid.double(), high]).detach()

    def of(theta):
        return theta.square().sum().square()  # Hessian 4 |t|^2 I + 8 t t^T

    loss = of(torch.cat([low.double(), mid.double(), high]))
    expected = 4 * theta.square().sum() * torch.eye(4, dtype=torch.float64) + 8 * torch.outer(theta, theta)
    with loss_hessian(loss, [low, mid, high]) as hessian:
        found = dense(hessian.hvp, 4)
    assert found.dtype == torch.float64
    # Rows and columns of the bfloat16 parameter are rounded to its 8 bits.
    torch.testing.assert_close(found[2:, 2:], expected[2:, 2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


# -- noise: one fixed operator --------------------------------------------------------------------------------


def test_dropout_masks_repeat_so_that_the_operator_is_symmetric_and_fixed(noisy):
    model, losses = noisy
    size = sum(p.numel() for p in model.parameters())
    with loss_hessian(losses, model.parameters()) as hessian:
        first = dense(hessian.hvp, size)
        again = dense(hessian.hvp, size)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, first.T, **CLOSE)
    assert first.abs().max() > 0.1  # not symmetric for being zero


def test_dropout_masks_repeat_whatever_the_caller_draws_between_products(noisy):
    model, losses = noisy
    vector = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with loss_hessian(losses, model.parameters()) as hessian:
        first = hessian.hvp(vector)
        torch.rand(3), random.random(), np.random.rand()
        assert torch.equal(hessian.hvp(vector), first)


def test_batches_draw_different_dropout_masks():
    weight = nn.Parameter(torch.ones(50, dtype=torch.float64))
    seen = []

    def loss():
        mask = F.dropout(torch.ones(50, dtype=torch.float64), 0.5)
        seen.append(mask)
        return (mask * weight).square().sum()

    with loss_hessian([(loss, 1), (loss, 1)], [weight]) as hessian:
        hessian.hvp(torch.ones(50, dtype=torch.float64))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


# -- groups of samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group_size", "counts"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (7, [7]), (100, [7])]
)
def test_samples_are_cut_into_groups_of_which_the_last_may_be_smaller(group_size, counts):
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7.0)
    called = []

    def loss(x, y):
        called.append((x, y))
        return x.mean() + y.mean()

    pairs = sample_losses(loss, x, y, group_size=group_size)
    assert [n for _, n in pairs] == counts
    assert called == []  # until a refresh is due
    values = [closure() for closure, _ in pairs]
    assert torch.equal(torch.cat([part for part, _ in called]), x)
    assert torch.equal(torch.cat([part for _, part in called]), y)
    # Each group is its own: not all of them the last, as closures over a loop's variable would be.
    assert float(sum(v * n for v, n in zip(values, counts, strict=True))) == pytest.approx(7 * float(x.mean() + 3))
