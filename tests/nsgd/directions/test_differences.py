"""Directions from the gradients that training leaves: what is averaged, and what is left out."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from given import Given, averaged, draws, plain_loop
from torch import nn
from torch.optim import SGD

from nsgd import NSGD, damp
from nsgd.directions import differences
from nsgd.directions.differences import ROWS


@pytest.fixture
def unclipped(monkeypatch):
    """Rows of any length count in full."""
    monkeypatch.setattr(differences, "_MOST", 1e9)


# -- what is averaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.98])
@pytest.mark.parametrize("steps", [2, 3, 9, 41])
def test_the_weights_and_directions_are_those_of_the_decayed_mean_of_differences(unclipped, decay, steps):
    given, gradients = Given(step_decay=decay), draws(steps)
    for gradient in gradients:
        given.step(*gradient)
    pending = given.optimizer._directions.differences.pending
    flat = [torch.cat(gradient) for gradient in gradients][: steps - pending]
    expected = averaged([new - old for old, new in itertools.pairwise(flat)], decay)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-10)  # of rank 3, of five that are kept
    vectors = given.optimizer.directions(given.params)[: len(given.optimizer.weights)]
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)).double(), rtol=0, atol=1e-10)


def test_directions_overlap_the_hessians_outliers_and_the_step_is_damped_along_them(training, flat):
    """A quadratic with three outlying eigenvalues and batches whose noise is like its curvature."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([50.0, 30.0, 20.0, *[0.1] * 37], dtype=torch.float64)
    hessian, root = (axes * values) @ axes.T, (axes * values.sqrt()) @ axes.T
    weight = nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = NSGD([weight], lr=0.01, k=3, gamma=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        noise = root @ torch.randn(40, generator=generator, dtype=torch.float64)
        (0.5 * weight @ hessian @ weight + noise @ weight).backward()
        before = weight.detach().clone()
        optimizer.step()
    vectors = optimizer.directions([weight])
    assert float((vectors @ axes[:, :3]).square().sum() / 3) > 0.99
    change = weight.detach() - before
    torch.testing.assert_close(vectors @ change, torch.zeros(3).double(), rtol=0, atol=1e-12)
    expected = -0.01 * (weight.grad - vectors.T @ (vectors @ weight.grad))
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-12)
    assert optimizer.eigenvalues == ()
    assert 0 < optimizer.overlap <= 1
    assert 0 < optimizer.alignment <= 1
    assert (optimizer.steps, optimizer.hvps, optimizer.cost_gradients) == (60, 0, 0.0)
    assert optimizer.refreshes > 6


def test_a_flat_descent_direction_is_not_damped():
    """Where all gradients agree there is no difference: the first number falls as under SGD."""
    theta = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = NSGD([theta], lr=0.005, k=2)
    for _ in range(100):
        optimizer.zero_grad()
        rest = theta[2:] - 0.001
        (-theta[0] + 10 * (theta[1] - 0.01) ** 2 + 0.05 * rest.square().sum()).backward()
        optimizer.step()
    assert float(theta[0].detach()) == pytest.approx(0.5, rel=1e-6)


def test_a_spike_of_the_gradient_counts_for_little_more_than_the_usual():
    given = Given(step_decay=0.5)
    gradients = draws(30)
    for gradient in gradients:
        given.step(*gradient)
    before = sum(given.optimizer.weights)
    given.step(*[100 * g for g in gradients[0]])
    for _ in range(ROWS):
        given.step(*[100 * g for g in gradients[0]])  # the same again: differences of zero
    assert sum(given.optimizer.weights) < 1.5 * before


# -- gradients that are not there -----------------------------------------------------------------------------


def test_a_row_has_entries_only_where_a_parameter_has_this_gradient_and_the_last(unclipped):
    """A parameter that is used every other step is not taken for one whose gradient comes and goes."""
    given, gradients = Given(step_decay=0.9), draws(21)
    for i, (one, other) in enumerate(gradients):
        given.step(one, other if i % 2 else None)
    pending = given.optimizer._directions.differences.pending
    flat = [torch.cat([one, torch.zeros(20)]) for one, _ in gradients][: 21 - pending]
    expected = averaged([new - old for old, new in itertools.pairwise(flat)], 0.9)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-10)
    assert not given.optimizer.directions(given.params[1:]).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
@pytest.mark.parametrize("at", [0, 1, 7, 19])
def test_a_gradient_that_is_not_finite_leaves_its_row_out_and_no_more(unclipped, value, at):
    given, gradients = Given(step_decay=0.9), draws(41)
    for i, (one, other) in enumerate(gradients):
        one = one.clone()
        if i == at:
            one[:3] = value * torch.tensor([1.0, 1.0, 1.0])
        given.step(one, other)
        with torch.no_grad():
            for p in given.params:
                p.zero_()
    pending = given.optimizer._directions.differences.pending
    flat = [torch.cat(gradient) for i, gradient in enumerate(gradients[: 41 - pending])]
    rows, shares, last = [], [], None
    for i, gradient in enumerate(flat):
        if i == at:
            if last is not None:
                rows.append(torch.zeros(32, dtype=torch.float64)), shares.append(0.0)
            continue
        if last is not None:
            rows.append(gradient - last), shares.append(1.0)
        elif i > 0:
            rows.append(torch.zeros(32, dtype=torch.float64)), shares.append(0.0)
        last = gradient
    weights = [share * 0.9 ** (len(rows) - 1 - i) for i, share in enumerate(shares)]
    outer = [0.5 * w * torch.outer(row, row) for w, row in zip(weights, rows, strict=True)]
    torch.testing.assert_close(given.moment(), sum(outer) / sum(weights), rtol=0, atol=1e-10)


def test_sparse_gradients_pass_by_and_are_said_once():
    table, head = nn.Embedding(20, 6, sparse=True), nn.Linear(6, 3)
    optimizer = damp(SGD([*table.parameters(), *head.parameters()], lr=0.1), k=3, gamma=0.0)
    said = []
    for i in range(20):
        optimizer.zero_grad()
        words = torch.arange(i, i + 8) % 20
        nn.functional.cross_entropy(head(table(words)), words % 3).backward()
        before, gradient = table.weight.detach().clone(), table.weight.grad.to_dense()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += caught
        torch.testing.assert_close(table.weight.detach(), before - 0.1 * gradient)
    assert len(optimizer.weights) == 3
    assert torch.equal(optimizer.directions([table.weight]), torch.zeros(3, 120))
    (once,) = said
    assert "sparse gradients (1)" in str(once.message)
    assert once.filename == __file__  # the line of the user's step


def test_frozen_parameters_join_when_they_train(training):
    run = training()
    first = list(run.model[0].parameters())
    for p in first:
        p.requires_grad_(False)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 12)
    assert not optimizer.directions(first).any()
    for p in first:
        p.requires_grad_(True)
    plain_loop(run, optimizer, 12, 40)
    assert optimizer.directions(first).any()
    vectors = optimizer.directions(run.model.parameters())
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), rtol=0, atol=1e-5)


def test_a_group_that_is_added_joins_and_one_without_curvature_stays_out(training):
    run = training()
    optimizer = NSGD(run.model[2].parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 6)
    optimizer.add_param_group({"params": [run.model[0].weight]})
    optimizer.add_param_group({"params": [run.model[0].bias], "curvature": False})
    plain_loop(run, optimizer, 6, 40)
    assert optimizer.directions([run.model[0].weight]).any()
    assert not optimizer.directions([run.model[0].bias]).any()


def test_a_model_that_changes_its_precision_takes_its_directions_along(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 12)
    before = optimizer.directions(run.model.parameters())
    run.model.double()
    twin = training(torch.float64)
    run = type(run)(run.model, twin.batches)
    optimizer.zero_grad()
    run.loss(0).backward()
    optimizer.step()
    after = optimizer.directions(run.model.parameters())
    assert after.dtype == torch.float64
    assert float((before.double() @ after.T).square().sum() / 3) > 0.5
