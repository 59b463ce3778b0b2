"""Gradients of groups of samples one by one, and what each group weighs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sums import draw
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from nsgd import sample_losses
from nsgd.directions.samples import gradient_moment


def test_of_single_samples_it_is_the_closed_form_of_linear_regression():
    x, y = torch.from_numpy(draw(9, 4)), torch.from_numpy(draw(9, seed=1))
    weight = torch.from_numpy(draw(4, seed=2)).requires_grad_()
    losses = sample_losses(lambda x, y: 0.5 * (x @ weight - y).square().mean(), x, y)
    weights, gradients = gradient_moment(losses, [weight])
    expected = (x @ weight.detach() - y)[:, None] * x
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, torch.full((9,), 1 / 9, dtype=torch.float64))
    assert weight.grad is None


@pytest.mark.parametrize(
    "problem", ["tanh_mlp", "conv_batchnorm", "partly_frozen", "unused_parameter", "regression"], indirect=True
)
@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_groups_of_unequal_size_weigh_as_many_as_they_are(problem, scale):
    named = dict(problem.model.named_parameters())

    def gradient(loss_of):
        def at(parameters):
            buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
            return loss_of(lambda *inputs: functional_call(problem.model, {**parameters, **buffers}, inputs))

        found = torch.func.grad(at)({name: p.detach() for name, p in named.items()})
        return torch.cat([found[name].reshape(-1) * named[name].requires_grad for name in named])

    losses = [(lambda c=closure: c() * scale, n) for closure, n in problem.batches()]
    weights, gradients = gradient_moment(losses, problem.params, scale=scale)
    torch.testing.assert_close(weights, torch.tensor([3 / 20, 7 / 20, 10 / 20], dtype=torch.float64))
    expected = torch.stack([gradient(loss_of) for loss_of, _ in problem.parts])
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)  # exact; the order of summation differs


def test_with_labels_of_the_model_its_expectation_is_the_hessian_of_a_linear_softmax():
    """The Fisher matrix is the Gauss-Newton matrix (Martens 2020, section 9), here the Hessian: logits are linear."""
    counts = torch.tensor([[1, 2, 5], [4, 3, 1], [2, 2, 4]])  # eighths: what the model gives each label of a sample
    x = torch.from_numpy(draw(3, 3))
    weight = torch.linalg.solve(x, (counts / 8).double().log()).T.contiguous().requires_grad_()  # (labels, inputs)

    def loss(i, label):
        return F.cross_entropy((weight @ x[i])[None], torch.tensor([label]))

    losses = [(lambda i=i, y=y: loss(i, y), int(counts[i, y])) for i in range(3) for y in range(3)]
    weights, gradients = gradient_moment(losses, [weight])
    moment = (gradients.T * weights) @ gradients
    p = counts / 8
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # of the cross-entropy in the logits, any label
    hessian = torch.einsum("nab,ni,nj->aibj", curvature.double(), x, x) / 3
    torch.testing.assert_close(moment, hessian.reshape(9, 9), rtol=0, atol=1e-12)


def test_no_graph_of_second_order_is_made():
    """Fused attention, which has no double backward, will do."""
    weight = nn.Parameter(torch.ones(1))
    q, k, v = torch.randn(3, 4, 2, 8, 16, generator=torch.Generator().manual_seed(0))

    def loss(q, k, v):
        return F.scaled_dot_product_attention(weight * q, k, v).square().mean()

    _, gradients = gradient_moment(sample_losses(loss, q, k, v), [weight])
    assert torch.isfinite(gradients).all()
    assert not gradients.requires_grad


def test_half_precision_gives_float32_gradients():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weights, gradients = gradient_moment([(lambda i=i: (weight[i] ** 2).sum(), 1) for i in range(4)], [weight])
    torch.testing.assert_close(gradients, 2 * torch.eye(4))
    assert weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda w: [(lambda: w.sum(), 3)], ValueError, "two or more groups of samples, got 1: .*solver='lanczos'"),
        (lambda w: [], ValueError, "pairs of a closure .* sample count, got an empty list"),
        (lambda w: [(lambda: w, 1), (lambda: w, 1)], ValueError, "expected a scalar loss"),
        (lambda w: [(lambda: w.sum(), 1), (lambda: w.detach().sum(), 1)], ValueError, "no graph"),
        (lambda w: [(lambda: w.sum(), 1), (lambda: w.sum(), 0)], ValueError, "sample count"),
        (lambda w: (lambda: w.sum(), 5), ValueError, "sample count"),  # a pair in place of pairs
        (lambda w: [(lambda: w.sum(), 1), (lambda: w.sum() * np.nan, 1)], FloatingPointError, "the loss is NaN"),
        (lambda w: [(lambda: w.sum(), 1), (lambda: (w - 1).sqrt().sum(), 1)], FloatingPointError, "gradient of the"),
    ],
)
def test_what_is_no_group_of_losses_is_refused(losses, error, message):
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        gradient_moment(losses(weight), [weight])
