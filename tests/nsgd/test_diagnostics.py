"""What the optimizer tells its user, and what it holds on to."""

from __future__ import annotations

import gc

import pytest
import torch
from loops import train

from nsgd import NSGD


def test_diagnostics_before_the_first_refresh(training):
    optimizer = NSGD(training().model.parameters(), k=3)
    assert optimizer.eigenvalues == optimizer.weights == ()
    assert (optimizer.refreshes, optimizer.skipped_refreshes, optimizer.hvps, optimizer.cost_gradients) == (
        0,
        0,
        0,
        0.0,
    )
    assert optimizer.overlap != optimizer.overlap  # NaN
    assert optimizer.alignment != optimizer.alignment


def test_alignment_and_overlap_are_those_of_a_dense_computation(training, flat, basis_of):
    run = training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, gamma=0.3, decay=0)
    optimizer.refresh(run.loss(0))
    first = basis_of(optimizer)
    run.loss(0).backward()
    step = -0.1 * torch.cat([p.grad.reshape(-1) for p in run.model.parameters()])
    optimizer.step()
    assert optimizer.alignment == pytest.approx(float((first @ step).norm() / step.norm()), rel=1e-12)
    optimizer.refresh(run.loss(1))
    second = basis_of(optimizer)
    assert optimizer.overlap == pytest.approx(float((first @ second.T).square().sum() / 3), rel=1e-12)
    assert 0.0 < optimizer.overlap < 1.0
    optimizer.refresh(run.loss(1), 1.0)
    # The same loss again: the start is its gradient again, and only the seed differs, which is not used.
    assert optimizer.overlap == pytest.approx(1.0, rel=1e-9)


def test_directions_are_the_basis_in_the_order_of_the_parameters_asked_for(training, basis_of):
    run = training(torch.float64)
    params = list(run.model.parameters())
    rest, own = params[:2], params[2:]
    optimizer = NSGD([{"params": own}, {"params": rest, "curvature": False}], lr=0.1, k=3)
    assert optimizer.directions(params).shape == (0, sum(p.numel() for p in params))  # before the first refresh
    optimizer.refresh(run.loss(0))
    found, size = optimizer.directions(params), sum(p.numel() for p in rest)
    assert torch.equal(found[:, size:], optimizer.directions(own))
    assert not found[:, :size].any()  # zero along parameters without
    assert torch.allclose(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("several", "product_cost"), [(False, 2), (True, 3)])
def test_cost_is_counted_in_gradients_of_a_training_batch(training, several, product_cost):
    run = training()
    optimizer = NSGD(run.model.parameters(), k=3)
    products = []
    for fraction in (1.0, 0.25):
        before = optimizer.hvps
        optimizer.refresh([(lambda: run.loss(1), 16)] if several else run.loss(1), batch_fraction=fraction)
        products.append(optimizer.hvps - before)
    assert all(3 <= m <= 2 * 3 + 2 for m in products)
    expected = sum(f * (1 + product_cost * m) for f, m in zip((1.0, 0.25), products, strict=True))
    assert optimizer.cost_gradients == pytest.approx(expected)
    assert optimizer.refreshes == 2


@pytest.mark.parametrize(
    "name",
    [
        "eigenvalues",
        "weights",
        "overlap",
        "alignment",
        "refreshes",
        "skipped_refreshes",
        "hvps",
        "cost_gradients",
        "refresh_due",
    ],
)
def test_diagnostics_are_read_only(training, name):
    with pytest.raises(AttributeError):
        setattr(NSGD(training().model.parameters(), k=3), name, 1)


def test_memory_stays_flat_over_200_refreshes_and_no_grad_holds_a_graph(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.01, momentum=0.9, k=2, refresh_every=1)

    def tensors():
        gc.collect()
        # Exact type by type(): isinstance would ask proxies in other modules, which may warn.
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    train(run, optimizer, 20)
    before = tensors()
    train(run, optimizer, 200)
    assert optimizer.refreshes == 220
    assert tensors() == before
    for p in run.model.parameters():
        assert p.grad.grad_fn is None
        assert not p.grad.requires_grad
